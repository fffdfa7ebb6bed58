"""Models that call torch's attention themselves, against what torch computes, and left as they were."""

import threading

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_under_another_name
from torch.utils.checkpoint import checkpoint

from lightning_qk import AttentionMonitor, QKSpectrumMonitor
from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.functional import attention_statistics
from lightning_qk.heads.reader import find_attention

ORIGINAL = F.scaled_dot_product_attention
FORWARD = nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward


@pytest.fixture(autouse=True)
def everything_is_left_as_it_was():
    yield
    assert F.scaled_dot_product_attention is ORIGINAL
    assert imported_under_another_name is ORIGINAL
    assert (nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward) == FORWARD
    assert not hasattr(Mixer.forward, "__wrapped__")


def helper(query, key, value, causal):
    return imported_under_another_name(query, key, value, is_causal=causal)


class Core(nn.Module):
    """No weights, and a name that says nothing."""

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Mixer(nn.Module):
    """Calls sdpa in the way that it is told."""

    def __init__(self, way: str = "helper") -> None:
        super().__init__()
        self.inputs = nn.Linear(16, 48)
        self.way = way
        self.function = F.scaled_dot_product_attention

    def split(self, x):
        return [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.inputs(x).chunk(3, -1)]

    def forward(self, x):
        query, key, value = self.split(x)
        if self.way == "helper":
            out = helper(query, key, value, causal=True)
        elif self.way == "torch":
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, None, 0.0, True)
        else:
            out = self.function(query, key, value, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class Holder(Mixer):
    """Leaves the attention to a module of its own."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.core = Core()

    def forward(self, x):
        return self.core(*self.split(x)).transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self, way: str = "helper", reentrant: bool | None = None) -> None:
        super().__init__()
        kind = Holder if way == "core" else Mixer
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mixer": kind(way), "heads": nn.MultiheadAttention(16, 4, dropout=0.3)})
            for _ in range(2)
        )
        self.reentrant = reentrant

    def run(self, block, x):
        x = x + F.dropout(block["mixer"](x), 0.2, self.training)
        return x + block["heads"](x, x, x, need_weights=False)[0]

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = self.run(block, x)
            else:
                x = checkpoint(self.run, block, x, use_reentrant=self.reentrant)
        return x.square().mean()


def listening(model, listener, **kwargs):
    names = {module: name for name, module in find_attention(model).items()}
    capture = AttentionCapture(names, listener, model=model)
    capture.install()
    capture.enabled = True
    return capture


def statistics(model, *args, **kwargs):
    """Statistics per sequence and head of every layer, from one forward, and the problems."""
    found = {}

    def listen(name, call):
        found[name] = attention_statistics(call.logits(self_attention=None), per_sequence=True)

    capture = listening(model, listen)
    try:
        model(*args, **kwargs)
    finally:
        capture.remove()
    return found, capture.problems


def check(got, p):
    """p: probabilities (batch, heads, n, m), by torch itself."""
    p = p.double()
    want = {
        "entropy": torch.special.entr(p).sum(-1).mean(-1),
        "participation": (1 / p.square().sum(-1)).mean(-1),
        "max_prob": p.amax(-1).mean(-1),
    }
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)


def x(batch=2, n=6, width=16, seed=0):
    return 3 * torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("way", ["helper", "torch", "attribute", "core"])
def test_every_way_to_call_sdpa_is_found_and_heard(way):
    model = Net(way).eval()
    mixers = [f"blocks.{i}.mixer" + (".core" if way == "core" else "") for i in range(2)]
    names = set(find_attention(model))
    assert names >= {*mixers, "blocks.0.heads", "blocks.1.heads"}
    found, problems = statistics(model, x())
    assert problems == {}
    assert set(found) == {*mixers, "blocks.0.heads", "blocks.1.heads"}
    query, key, _ = model.blocks[0]["mixer"].split(x())
    eye = torch.eye(6).expand(2, 4, 6, 6)
    check(found[mixers[0]], ORIGINAL(query, key, eye, is_causal=True))


def test_modules_are_found_by_what_their_code_calls():
    assert set(find_attention(nn.ModuleDict({"a": Mixer(), "b": Core(), "c": nn.Linear(2, 2)}))) == {"a", "b"}


class Raw(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, **self.options)


def draw(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VISIBLE = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.4
VISIBLE[..., 0] = True
CALLS = {
    "plain": ((2, 3, 5, 4), (2, 3, 7, 4), {}),
    "scale": ((2, 3, 5, 4), (2, 3, 7, 4), {"scale": 0.9}),
    "one head": ((2, 5, 4), (2, 7, 4), {}),
    "one head, a mask each": ((2, 5, 4), (2, 7, 4), {"attn_mask": VISIBLE[:, 0]}),
    "a single sequence": ((5, 4), (7, 4), {"attn_mask": VISIBLE[0, 0]}),
    "blocks of tokens": ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), {}),
    "blocks, masked": ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), {"attn_mask": VISIBLE[:, None]}),
    "causal": ((2, 3, 5, 4), (2, 3, 5, 4), {"is_causal": True}),
    "causal, more keys": ((2, 3, 5, 4), (2, 3, 7, 4), {"is_causal": True}),
    "causal, fewer keys": ((2, 3, 7, 4), (2, 3, 5, 4), {"is_causal": True}),
    "causal, one query": ((2, 3, 1, 4), (2, 3, 7, 4), {"is_causal": True}),
    "boolean mask": ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": VISIBLE}),
    "boolean mask of two axes": ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": VISIBLE[0, 0]}),
    "mask of each head": ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": draw(3, 5, 7, seed=4)}),
    "grouped": ((2, 4, 5, 4), (2, 2, 7, 4), {"enable_gqa": True}),
    "key of one head": ((2, 4, 5, 4), (2, 1, 7, 4), {}),
    "key of one sequence": ((2, 4, 5, 4), (1, 4, 7, 4), {}),
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_mean_what_torch_computes(case):
    shape, keys, options = CALLS[case]
    query, key = draw(*shape, seed=1), draw(*keys, seed=2)
    eye = torch.eye(keys[-2]).expand(*keys[:-1], keys[-2])
    p = ORIGINAL(query, key, eye, **options)
    found, problems = statistics(Raw(**options), query, key, eye)
    assert problems == {}
    if len(shape) < 4:
        p = p.reshape(-1, 1, *p.shape[-2:])
    check(found[""], p.flatten(0, -4))


def test_calls_that_cannot_be_read_are_named():
    nested = torch.nested.nested_tensor([draw(3, 5, 4), draw(3, 6, 4)])
    with torch.no_grad():
        found, problems = statistics(Raw(), nested, nested, nested)
    assert found == {}
    assert "nested tensors" in problems[""]


def test_a_model_without_attention_is_refused():
    job = models.Job(nn.Sequential(nn.Linear(2, 2)))
    for kind in (AttentionMonitor, QKSpectrumMonitor):
        callback = kind(report=False, on_unreadable="raise")
        with pytest.raises(ValueError, match="expected a model that contains transformer attention"):
            models.trainer([callback]).fit(job, models.tokens())


PADDED = torch.zeros(2, 6, dtype=torch.bool)
PADDED[1, 4:] = True
HIDDEN = torch.ones(6, 6, dtype=torch.bool).triu(1)
ADDED = draw(6, 6, seed=7)
ADDED[:, 5] = float("-inf")
HEADS = {
    "plain": ({}, {}),
    "sequence first": ({"batch_first": False}, {}),
    "no bias": ({"bias": False}, {}),
    "padding": ({}, {"key_padding_mask": PADDED}),
    "boolean mask": ({}, {"attn_mask": HIDDEN}),
    "additive mask": ({}, {"attn_mask": ADDED}),
    "mask of each head": ({}, {"attn_mask": draw(8, 6, 6, seed=8)}),
    "both masks": ({}, {"attn_mask": HIDDEN, "key_padding_mask": PADDED}),
    "both masks, additive": ({}, {"attn_mask": ADDED, "key_padding_mask": PADDED.float() * -20}),
    "causal hint": ({}, {"attn_mask": HIDDEN, "is_causal": True}),
    "causal hint, padding": ({}, {"attn_mask": HIDDEN, "is_causal": True, "key_padding_mask": PADDED}),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", HEADS)
def test_multihead_attention(case, need_weights):
    build, call = HEADS[case]
    torch.manual_seed(1)
    module = nn.MultiheadAttention(16, 4, **{"batch_first": True, **build})
    inputs = x() if module.batch_first else x().transpose(0, 1)
    model = nn.Sequential(module)
    names = {module: "0"}
    own = {**call, "is_causal": False}
    _, weights = module(inputs, inputs, inputs, average_attn_weights=False, **own)
    found = {}

    def listen(name, made):
        # Padded tokens are queries too, here and in torch's map.
        found[name] = attention_statistics(made.logits(self_attention=False), per_sequence=True)

    for keep_gradients in (True, False):  # without gradients torch computes it in one operator
        found.clear()
        capture = AttentionCapture(names, listen, model=model)
        want = module.eval()(inputs, inputs, inputs, need_weights=need_weights, **call)[0]
        capture.install()
        capture.enabled = True
        with torch.set_grad_enabled(keep_gradients):
            got = module(inputs, inputs, inputs, need_weights=need_weights, **call)[0]
        capture.remove()
        assert capture.problems == {}
        if keep_gradients:
            assert torch.equal(got, want)
        check(found["0"], weights)


def test_multihead_attention_between_sequences_of_other_widths_and_without_a_batch():
    torch.manual_seed(2)
    module = nn.MultiheadAttention(16, 4, kdim=10, vdim=12, batch_first=True)
    query, key, value = x(n=5), x(n=7, width=10), x(n=7, width=12)
    _, weights = module(query, key, value, average_attn_weights=False)
    found, problems = statistics(module, query, key, value)
    assert problems == {}
    check(found[""], weights)
    found, _ = statistics(module, query[0], key[0], value[0])
    check(found[""], weights[:1])


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_a_key_that_is_no_token_is_refused(option):
    module = nn.MultiheadAttention(16, 4, batch_first=True, **{option: True})
    found, problems = statistics(module, x(), x(), x())
    assert found == {}
    assert "a key that is no token" in problems[""]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_that_torch_fuses_in_evaluation(norm_first):
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    with torch.no_grad():
        fused, problems = statistics(model, x(), src_key_padding_mask=PADDED)
    slow, _ = statistics(model, x(), src_key_padding_mask=PADDED)  # gradients are on
    assert problems == {}
    assert set(fused) == set(slow) == {"layers.0.self_attn", "layers.1.self_attn"}
    for name, values in slow.items():
        for statistic in ("entropy", "max_prob", "distance", "max_logit"):
            torch.testing.assert_close(
                fused[name][statistic], values[statistic], rtol=1e-4, atol=1e-5, equal_nan=True
            )


def test_quantizations_own_multihead_attention():
    quantizable = pytest.importorskip("torch.ao.nn.quantizable")
    torch.manual_seed(4)
    module = quantizable.MultiheadAttention(16, 4, batch_first=True).eval()
    before = type(module).forward
    _, weights = module(x(), x(), x(), average_attn_weights=False)
    found, problems = statistics(module, x(), x(), x())
    assert problems == {}
    check(found[""], weights)
    assert type(module).forward is before


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_training_is_bit_identical_and_a_checkpointed_call_counts_once(reentrant):
    model = Net(reentrant=reentrant).train()
    inputs = x().requires_grad_()
    heard = []

    def run(listen):
        model.zero_grad()
        torch.manual_seed(7)
        capture = listening(model, lambda name, call: heard.append(name)) if listen else None
        loss = model(inputs)
        loss.backward()
        if capture:
            capture.remove()
            assert capture.problems == {}
        return loss, [parameter.grad.clone() for parameter in model.parameters()]

    loss, gradients = run(listen=False)
    loss_heard, gradients_heard = run(listen=True)
    assert sorted(heard) == sorted(find_attention(model))
    assert torch.equal(loss, loss_heard)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_heard, strict=True))


def test_transformers_with_attention_of_their_own():
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        alibi=False,
        multi_query=False,
    )
    model = models.build(FalconForCausalLM, config).eval()
    tokens = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    found, problems = statistics(model, input_ids=tokens)
    assert problems == {}
    eager = models.build(FalconForCausalLM, config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    maps = eager(input_ids=tokens, output_attentions=True).attentions
    assert len(found) == 2
    for (_, values), p in zip(found.items(), maps, strict=True):
        check(values, p)


def test_a_call_through_the_interface_is_heard_once_beside_direct_callers():
    model = nn.ModuleList([models.gpt2(), Mixer()])
    heard = []
    capture = listening(model, lambda name, call: heard.append(name))
    model[0](input_ids=torch.zeros(1, 4, dtype=torch.long))
    model[1](x())
    capture.remove()
    assert heard == ["0.transformer.h.0.attn", "0.transformer.h.1.attn", "1"]


class Encoder(nn.Module):
    """A language model of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, models.VOCABULARY)

    def forward(self, input_ids, labels):
        hidden = self.embedding(input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        loss = F.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Output", (), {"loss": loss})


def test_the_monitor_on_a_job_that_never_heard_of_transformers():
    monitor = AttentionMonitor(report=False, rows=None)
    job = models.Job(Encoder())
    models.trainer([monitor]).fit(job, models.tokens())
    assert not [note for note in monitor.notes if "seen" in note or "left out" in note]
    assert monitor.history.series("entropy").isfinite().all()
    assert monitor.history.series("entropy").shape == (4, 8)


class TestIsolation:
    def test_captures_come_and_go_in_any_order(self):
        model = Net()
        other = Net()
        heard = {"a": 0, "b": 0, "c": 0}

        def count(which):
            return lambda name, call: heard.update({which: heard[which] + 1})

        a, b, c = listening(model, count("a")), listening(model, count("b")), listening(other, count("c"))
        model(x())
        a.remove()
        model(x())
        other(x())
        a.install()
        a.enabled = True
        b.remove()
        c.remove()
        model(x())
        a.remove()
        model(x())
        assert heard == {"a": 8, "b": 8, "c": 4}
        assert not [name for module in model.modules() for name in vars(module) if "lightning_qk" in name]

    def test_somebody_else_stands_at_the_same_place(self):
        model = Mixer("torch")
        capture = listening(model, lambda *_: None)
        mine = F.scaled_dot_product_attention
        calls = []

        def theirs(*args, **kwargs):
            calls.append(1)
            return mine(*args, **kwargs)

        F.scaled_dot_product_attention = theirs
        model(x())
        capture.remove()
        assert F.scaled_dot_product_attention is theirs  # not ours to take away
        model(x())
        heard = []
        again = listening(model, lambda name, call: heard.append(name))
        model(x())
        again.remove()
        assert F.scaled_dot_product_attention is theirs
        assert len(calls) == 3
        assert heard == [""]
        F.scaled_dot_product_attention = ORIGINAL

    def test_threads(self):
        networks = [Net() for _ in range(3)]
        heard = [[] for _ in networks]

        def work(index):
            for _ in range(5):
                capture = listening(networks[index], lambda name, call: heard[index].append(call.module))
                networks[index](x(seed=index))
                capture.remove()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for network, calls in zip(networks, heard, strict=True):
            assert len(calls) == 20
            assert set(calls) == set(find_attention(network).values())

    def test_a_listener_that_fails_names_each_layer_and_harms_nothing(self):
        model = Net().eval()
        want = model(x())

        def fail(name, call):
            raise RuntimeError("out of ideas")

        capture = listening(model, fail)
        assert torch.equal(model(x()), want)
        assert torch.equal(model(x()), want)
        capture.remove()
        assert set(capture.problems) == set(find_attention(model))
        assert all("out of ideas" in problem for problem in capture.problems.values())

    def test_what_a_listener_computes_is_not_heard(self):
        model = Mixer("torch")
        heard = []

        def listen(name, call):
            heard.append(name)
            F.scaled_dot_product_attention(*call.operands, call.value)

        capture = listening(model, listen)
        model(x())
        capture.remove()
        assert heard == [""]
        assert capture.problems == {}
