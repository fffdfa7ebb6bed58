"""Attention inside graphs of torch.compile: heard as without it, and the graphs left as they were."""

import copy
import pickle
import shutil

import models
import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lightning_qk import AttentionMonitor
from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.functional import attention_statistics
from lightning_qk.heads.reader import find_attention

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Mixer(nn.Module):
    """Calls sdpa itself, with a scale of its own in each layer."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inputs = nn.Linear(16, 48)
        self.scale = scale

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.inputs(x).chunk(3, -1)
        )
        return (
            F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
            .transpose(1, 2)
            .flatten(2)
        )


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.mixer = Mixer(scale)
        self.heads = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        x = x + self.mixer(x)
        return x + self.heads(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    """Both ways to call torch's attention."""

    def __init__(self, reentrant: bool | None = None, scales: tuple[float, ...] = (0.5, 0.5)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(scale) for scale in scales)
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x.square().mean()


def llama(reentrant: bool | None = None, implementation: str = "sdpa") -> nn.Module:
    model = models.llama(attn_implementation=implementation).train()
    model.config.use_cache = False
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


class Probe:
    """A model, run with and without somebody who listens."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.run = model
        self.statistics: dict[str, list[dict[str, torch.Tensor]]] = {}
        names = {module: name for name, module in find_attention(model).items()}
        self.capture = AttentionCapture(names, self.listen, model=model)

    def listen(self, name, call):
        values = attention_statistics(call.logits(self_attention=True))
        self.statistics.setdefault(name, []).append(values)

    def compile(self, mode: str, backend: str, **options) -> CompileCounterWithBackend:
        counter = CompileCounterWithBackend(backend)
        if mode == "whole":
            self.run = torch.compile(self.model, backend=counter, fullgraph=True, **options)
        else:
            layers = self.model.layers if isinstance(self.model, Net) else self.model.model.layers
            for layer in layers:
                layer.compile(backend=counter, fullgraph=True, **options)
        return counter

    def step(self, listen: bool, seed: int = 0, n: int = 8):
        """Loss and gradients."""
        self.capture.enabled = listen
        self.model.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.model, Net):
            loss = self.run(torch.randn(2, n, 16, generator=generator, requires_grad=True))
        else:
            tokens = torch.randint(3, models.VOCABULARY, (2, n), generator=generator)
            mask = torch.ones_like(tokens)
            mask[1, :3] = 0
            loss = self.run(input_ids=tokens, attention_mask=mask).logits.square().mean()
        loss.backward()
        self.capture.enabled = False
        return [loss.detach(), *(p.grad.clone() for p in self.model.parameters() if p.grad is not None)]

    def take(self):
        taken, self.statistics = self.statistics, {}
        return taken


def assert_equal(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_heard(got, want, times, tolerance=0.0):
    """Statistics of each layer, as often as it was listened to, as without torch.compile."""
    assert set(got) == set(want)
    for name, values in got.items():
        assert len(values) == times
        for one in values:
            for statistic, value in want[name][0].items():
                torch.testing.assert_close(
                    one[statistic], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=statistic
                )


@pytest.mark.parametrize(
    ("kind", "mode", "backend", "reentrant", "before"),
    [
        (Net, "whole", "eager", None, True),
        (Net, "whole", "eager", False, False),
        (Net, "whole", "aot_eager", True, True),
        (Net, "regional", "aot_eager", None, False),
        (Net, "regional", "aot_eager", False, True),
        (llama, "whole", "aot_eager", False, False),
        (llama, "regional", "eager", None, True),
        (llama, "regional", "aot_eager", True, False),
    ],
)
def test_graphs_are_heard_and_left_alone(kind, mode, backend, reentrant, before):
    torch.manual_seed(1)
    probe = Probe(kind(reentrant))
    probe.capture.install()
    probe.step(listen=True)
    probe.capture.remove()
    want = probe.take()
    if before:
        counter = probe.compile(mode, backend)
        plain = probe.step(listen=False)
        probe.capture.install()
    else:
        probe.capture.install()
        counter = probe.compile(mode, backend)
        plain = probe.step(listen=False)
    first = counter.frame_count
    for step in range(6):
        assert_equal(probe.step(listen=step % 2 == 1), plain)
    # Those that listen are those that do not; where graphs were dropped, one more for each.
    assert counter.frame_count - first == first * before
    probe.capture.remove()
    assert probe.capture.problems == {}
    assert_heard(probe.take(), want, times=3)
    assert not [name for module in probe.model.modules() for name in vars(module) if "lightning_qk" in name]
    assert_equal(probe.step(listen=False), plain)
    assert probe.take() == {}


class Replayed(CompileCounterWithBackend):
    """A backend that would make CUDA graphs."""

    def __init__(self) -> None:
        super().__init__("eager")
        self.config = {"triton.cudagraphs": True}


def test_a_graph_that_is_replayed_has_two_versions():
    """Replayed without Python, it could not hand anything out: only the one that captures is not replayed."""
    torch.manual_seed(1)
    probe = Probe(Net())
    probe.capture.install()
    probe.step(listen=True)
    want = probe.take()
    counter = Replayed()
    probe.run = torch.compile(probe.model, backend=counter, fullgraph=True)
    for step in range(4):
        probe.step(listen=step % 2 == 1)
    probe.capture.remove()
    assert counter.frame_count == 2
    names = [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs]
    assert [any("lightning_qk" in name for name in graph) for graph in names] == [False, True]
    assert_heard(probe.take(), want, times=2)


def test_models_own_eager_functions():
    probe = Probe(llama(implementation="eager"))
    probe.capture.install()
    probe.step(listen=True)
    want = probe.take()
    probe.compile("whole", "eager")
    probe.step(listen=True)
    probe.capture.remove()
    assert probe.capture.problems == {}
    assert_heard(probe.take(), want, times=1)


def test_shapes_and_scales_that_change():
    torch.manual_seed(2)
    probe = Probe(Net(scales=(0.3, 0.6)))
    probe.capture.install()
    wanted = {}
    for n in (8, 11, 13):
        probe.step(listen=True, n=n)
        wanted[n] = probe.take()
    counter = probe.compile("whole", "aot_eager", dynamic=True)
    probe.step(listen=False)
    first = counter.frame_count
    for n in (8, 11, 13):
        probe.step(listen=True, n=n)
        assert_heard(probe.take(), wanted[n], times=1, tolerance=1e-6)
        probe.step(listen=False, n=n)
    assert counter.frame_count == first
    probe.capture.remove()


def test_without_gradients():
    model = llama().eval()
    probe = Probe(model)
    probe.capture.install()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = torch.randint(3, models.VOCABULARY, (2, 8))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            probe.capture.enabled = False
            want = run(input_ids=tokens).logits
            probe.capture.enabled = True
            assert torch.equal(run(input_ids=tokens).logits, want)
    probe.capture.remove()
    assert [len(values) for values in probe.take().values()] == [2, 2]


@needs_a_compiler
def test_inductor():
    torch.manual_seed(3)
    probe = Probe(Net(scales=(0.5,)))
    probe.capture.install()
    probe.step(listen=True)
    want = probe.take()
    probe.compile("whole", "inductor")
    # In this process: others that compile would have to import torch first.
    with torch._inductor.config.patch(compile_threads=1):
        plain = probe.step(listen=False)
        for value, other in zip(probe.step(listen=True), plain, strict=True):
            torch.testing.assert_close(value, other)
        assert_equal(probe.step(listen=False), plain)
    probe.capture.remove()
    assert probe.capture.problems == {}
    assert_heard(probe.take(), want, times=1, tolerance=1e-4)


def test_layers_are_told_apart_in_a_graph_that_they_share():
    torch.manual_seed(4)
    probe = Probe(Net())
    probe.capture.install()
    counter = probe.compile("regional", "eager")
    probe.step(listen=True)
    probe.capture.remove()
    entropies = [values[0]["entropy"] for values in probe.take().values()]
    assert counter.frame_count == 1
    assert len(entropies) == 4
    assert len({tuple(entropy.tolist()) for entropy in entropies}) == 4


def test_a_copy_of_the_model_is_not_taken_for_it():
    probe = Probe(Net())
    probe.capture.install()
    for average in (copy.deepcopy(probe.model), pickle.loads(pickle.dumps(probe.model))):
        run = torch.compile(average, backend="eager", fullgraph=True)
        probe.capture.enabled = True
        run(torch.randn(2, 8, 16))
        assert probe.take() == {}
    probe.capture.remove()


def test_two_models_in_graphs_do_not_hear_each_other():
    one, other = Probe(Net()), Probe(Net())
    for probe in (one, other):
        probe.compile("whole", "eager")
        probe.capture.install()
    one.step(listen=True)
    assert len(one.take()) == 4
    assert other.take() == {}
    other.step(listen=True)
    one.capture.remove()
    other.step(listen=True)
    assert one.take() == {}
    assert [len(values) for values in other.take().values()] == [2] * 4
    other.capture.remove()


def test_what_cannot_leave_a_graph_is_named_and_training_goes_on():
    class Refused(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.MultiheadAttention(16, 4, batch_first=True, add_zero_attn=True)

        def forward(self, x):
            return self.heads(x, x, x)[0].sum()

    model = Refused()
    capture = AttentionCapture({model.heads: "heads"}, lambda *_: None, model=model)
    capture.install()
    capture.enabled = True
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 5, 16)).backward()
    capture.remove()
    assert "a key that is no token" in capture.problems["heads"]


def test_a_block_mask_in_a_graph_is_named():
    model = models.llama(attn_implementation="flex_attention").eval()
    probe = Probe(model)
    probe.capture.install()
    probe.compile("regional", "aot_eager")
    tokens = torch.randint(3, models.VOCABULARY, (2, 128))
    probe.capture.enabled = True
    with torch.no_grad():
        model(input_ids=tokens)
    probe.capture.remove()
    assert len(probe.capture.problems) == 2
    assert all("cannot leave a graph" in problem for problem in probe.capture.problems.values())


def test_a_listener_that_fails_in_a_graph_harms_nothing():
    probe = Probe(Net())
    probe.compile("whole", "aot_eager")
    plain = probe.step(listen=False)
    probe.capture._listener = lambda name, call: 1 / 0
    probe.capture.install()
    assert_equal(probe.step(listen=True), plain)
    probe.capture.remove()
    assert len(probe.capture.problems) == 4
    assert "ZeroDivisionError" in probe.capture.problems["layers.0.mixer"]


@pytest.mark.parametrize("where", ["network", "configure_model", "module"])
def test_the_monitor_on_a_compiled_job(where):
    class Compiled(models.Job):
        def configure_model(self):
            if where == "configure_model" and not hasattr(self.inner["network"], "_orig_mod"):
                self.inner["network"] = torch.compile(self.inner["network"], backend="eager")

        def training_step(self, batch, batch_idx):
            return self.inner["network"](input_ids=batch).logits.square().mean()

    network = llama()
    job = Compiled(torch.compile(network, backend="eager") if where == "network" else network)
    monitor = AttentionMonitor(every_n_steps=2, report=False)
    fitted = torch.compile(job, backend="eager") if where == "module" else job
    models.trainer([monitor], logger=False).fit(fitted, models.tokens())
    assert monitor.history.steps == [1, 3]
    assert monitor.history.series("entropy").isfinite().all()
    assert monitor.notes == []


def test_a_graph_that_ddp_splits(tmp_path, monkeypatch):
    torch.manual_seed(5)
    probe = Probe(Net())
    probe.capture.install()
    probe.step(listen=True)
    want = probe.take()
    # Buckets smaller than a layer, so that the graph is split within layers.
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 500)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = nn.parallel.DistributedDataParallel(probe.model, bucket_cap_mb=0.001)
        probe.run = torch.compile(network, backend="aot_eager")
        plain = probe.step(listen=False)
        assert_equal(probe.step(listen=True), plain)
        assert_equal(probe.step(listen=False), plain)
    finally:
        torch.distributed.destroy_process_group()
    probe.capture.remove()
    assert probe.capture.problems == {}
    assert_heard(probe.take(), want, times=1)


def test_mixed_precision():
    torch.manual_seed(6)
    probe = Probe(Net())
    probe.capture.install()
    with torch.autocast("cpu", torch.bfloat16):
        probe.step(listen=True)
        want = probe.take()
        probe.compile("whole", "aot_eager")
        plain = probe.step(listen=False)
        assert_equal(probe.step(listen=True), plain)
    probe.capture.remove()
    assert probe.capture.problems == {}
    assert_heard(probe.take(), want, times=1, tolerance=1e-6)
