"""QK-Clip in training, against logits recorded at torch's own attention."""

from contextlib import contextmanager
from pathlib import Path

import intervention_jobs
import lightning as L
import models
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from processes import run_script
from torch import nn
from torch.nn import functional as F

from lightning_qk import AttentionMonitor, LocAteR, QKClip, QKSpectrumMonitor
from lightning_qk.heads.reader import ProjectionReader


@contextmanager
def recorded_logits():
    """Every call's ``scaling q·k``, (batch, heads, n, m), −inf where hidden."""
    calls, original = [], F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, is_causal=False, scale=None, **kwargs):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            wide = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            logits = query.float() @ wide.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
            if is_causal:
                logits = logits.masked_fill(
                    ~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf
                )
            if attn_mask is not None:
                hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < -1e4
                logits = logits.masked_fill(hidden, -torch.inf)
            calls.append(logits)
        return original(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, **kwargs)

    F.scaled_dot_product_attention = record
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original


def llama(kv_heads: int, bias: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        **{**models._GROUPED, "num_key_value_heads": kv_heads}, attention_bias=bias
    )
    model = models.build(transformers.LlamaForCausalLM, config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gpt2() -> nn.Module:
    model = without_dropout(models.gpt2())
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def first_layer(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with recorded_logits() as calls, torch.no_grad():
        model.eval()(input_ids=batch)
    model.train()
    return calls[0]


def largest(logits: torch.Tensor) -> torch.Tensor:
    return logits.amax((0, 2, 3))


MODELS = {
    "multi-head": lambda: llama(4, bias=False),
    "multi-head, biases": gpt2,
    "grouped": lambda: llama(2, bias=False),
    "grouped, biases": lambda: llama(2, bias=True),
    "multi-query, biases": lambda: llama(1, bias=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_twice_tau_are_halved(name):
    torch.manual_seed(1)
    model = MODELS[name]()
    data = models.tokens(4)
    batch = next(iter(data))
    before = first_layer(model, batch)
    cap = largest(before).max().item() / 2
    clip = QKClip(cap, modules="*.0.*")
    models.trainer([clip], max_steps=1).fit(models.Job(model, lr=0.0), data)
    after = first_layer(model, batch)
    (layer,) = clip.gammas
    kv_heads = clip.gammas[layer].numel()
    gamma = (cap / largest(before).view(kv_heads, -1).amax(1)).clamp(max=1)
    torch.testing.assert_close(clip.gammas[layer], gamma)
    assert gamma.min() == pytest.approx(0.5)
    factor = gamma.repeat_interleave(4 // kv_heads)[:, None, None]
    torch.testing.assert_close(after, factor * before, rtol=1e-4, atol=1e-5)
    assert largest(after).max() == pytest.approx(cap, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ({"accumulate_grad_batches": 2, "max_steps": 1}, 2),
        ({"precision": "bf16-mixed", "max_steps": 1}, 1),
        ({"max_steps": 1, "log_every_n_steps": 50}, 1),
    ],
)
def test_the_maximum_is_over_all_that_ran_since_the_last_step(arguments, batches):
    torch.manual_seed(1)
    clip = QKClip(1.0)
    with recorded_logits() as calls:
        models.trainer([clip], **arguments).fit(models.Job(llama(2, bias=True), lr=0.0), models.tokens(16))
    assert len(calls) == 2 * batches
    for place, name in enumerate(clip.maxima):
        want = torch.stack([largest(call) for call in calls[place::2]]).amax(0)
        assert (want > 1).any()
        got = torch.where(want > 1, clip.maxima[name], want)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def deepseek() -> nn.Module:
    """Latent attention: a part of the keys is shared by all heads."""
    config = transformers.DeepseekV3Config(
        **{**models._GROUPED, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=10,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
    )
    return models.build(transformers.DeepseekV3ForCausalLM, config)


@pytest.mark.parametrize("make", [models.mistral, deepseek])
def test_windows_and_latents(make):
    torch.manual_seed(1)
    model = make()
    batch = next(iter(models.tokens(4)))
    before = first_layer(model, batch)
    cap = largest(before).median().item()
    clip = QKClip(cap, alpha=0.3, modules="*.0.*")
    models.trainer([clip], max_steps=1).fit(models.Job(model, lr=0.0), models.tokens(4))
    (gamma,) = clip.gammas.values()
    group = 4 // len(gamma)
    torch.testing.assert_close(gamma, (cap / largest(before).view(-1, group).amax(1)).clamp(max=1))
    factor = gamma.repeat_interleave(group)[:, None, None]
    torch.testing.assert_close(first_layer(model, batch), factor * before, rtol=1e-4, atol=1e-5)


def test_position_biases_are_no_part_of_it():
    """T5 adds its bias in the mask: the products alone are clipped."""
    torch.manual_seed(1)
    model = without_dropout(models.t5())
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "relative_attention_bias"):
                module.relative_attention_bias.weight.fill_(1e3)
    clip = QKClip(1.0)
    with recorded_logits() as calls:
        models.trainer([clip], max_steps=1).fit(models.Job(model, lr=0.0), models.tokens(4))
    assert len(calls) == len(clip.maxima) == 6
    for call, got in zip(calls, clip.maxima.values(), strict=True):
        torch.testing.assert_close(got, largest(call), rtol=1e-4, atol=1e-4)
        assert got.max() < 100


class Manual(models.Job):
    """Steps by hand, at every second batch."""

    def __init__(self) -> None:
        super().__init__(gpt2(), lr=0.0)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


def test_manual_optimization():
    torch.manual_seed(1)
    clip = QKClip(1.0)
    with recorded_logits() as calls:
        models.trainer([clip], max_steps=1).fit(Manual(), models.tokens(8))
    assert len(calls) == 4
    for place, got in enumerate(clip.maxima.values()):
        want = torch.stack([largest(call) for call in calls[place::2]]).amax(0)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert min(gamma.min() for gamma in clip.gammas.values()) < 1


class SwitchOn(L.Callback):
    """Adds another callback in mid-run, as a guard may."""

    def __init__(self, other: L.Callback) -> None:
        self.other = other

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 2 and self.other not in trainer.callbacks:
            self.other.setup(trainer, pl_module, "fit")
            self.other.on_fit_start(trainer, pl_module)
            trainer.callbacks.append(self.other)


def test_it_can_be_switched_on_in_mid_run():
    clip = QKClip(2.0)
    module, trainer = run([SwitchOn(clip)], max_steps=5)
    assert clip.gammas
    assert trainer.callback_metrics["clip/gamma/min"] < 1
    assert largest(first_layer(module.inner["network"], next(iter(models.tokens())))).max() < 3


class Padded(models.Job):
    """The second half of each sequence is padding, of tokens whose logits are the largest."""

    def __init__(self, mask: bool) -> None:
        torch.manual_seed(2)
        super().__init__(without_dropout(models.bert()), lr=0.0)
        embeddings = self.inner["network"].bert.embeddings
        with torch.no_grad():
            # LayerNorm leaves the direction: that of the first key's largest singular vector.
            head = ProjectionReader(self)["inner.network.bert.encoder.layer.0.attention.self"]
            form = (head.query[0].T @ head.key[0]).double()
            vector = torch.linalg.eigh(form + form.T).eigenvectors[:, -1]
            embeddings.word_embeddings.weight[0] = 1e3 * (vector - vector.mean()).float()
        self.mask = mask

    def training_step(self, batch, batch_idx):
        batch = batch.clone()
        batch[:, 8:] = 0
        mask = (batch != 0).long() if self.mask else None
        return self.inner["network"](input_ids=batch, attention_mask=mask, labels=batch).loss


def test_padding_does_not_count():
    seen = {}
    for mask in (True, False):
        clip = QKClip(1e4, modules="*.0.*")
        module = Padded(mask)
        models.trainer([clip], max_steps=1).fit(module, models.tokens(4))
        seen[mask] = next(iter(clip.maxima.values()))
    short = models.tokens(4, length=16)
    torch.manual_seed(2)
    want = largest(first_layer(Padded(True).inner["network"], next(iter(short))[:, :8]))
    torch.testing.assert_close(seen[True], want, rtol=1e-4, atol=1e-4)
    assert seen[False][0] > seen[True][0] + 1


def run(callbacks, **arguments):
    torch.manual_seed(3)
    module = models.Job(gpt2(), lr=1e-2, optimizer="adamw")
    trainer = models.trainer(callbacks, **arguments)
    trainer.fit(module, models.tokens())
    return module, trainer


def test_training_below_tau_is_bit_identical():
    want, _ = run([])
    got, _ = run([QKClip(1e4)])
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)


def test_optimizers_states_are_left_alone():
    _, plain = run([], max_steps=1)
    _, clipped = run([QKClip(0.5)], max_steps=1)
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (plain, clipped)]
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key])


def test_it_holds_the_logits_and_goes_with_the_rest(tmp_path):
    logger = CSVLogger(tmp_path)
    clip = QKClip(2.0, per_layer=True, per_head=True)
    callbacks = [
        clip,
        LocAteR(0.1),
        QKSpectrumMonitor(report=False),
        AttentionMonitor(rows=None, report=False),
    ]
    module, trainer = run(callbacks, max_steps=6, logger=logger)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text()
    header = rows.splitlines()[0].split(",")
    for key in (
        "clip/gamma/min",
        "clip/layer_01/gamma",
        "clip/clipped_heads",
        "clip/max_logit/max",
        "clip/layer_00/max_logit",
        "clip/layer_00/head_03/gamma",
        "clip/layer_01/head_00/max_logit",
    ):
        assert key in header
    assert trainer.callback_metrics["clip/gamma/min"] <= 1
    assert trainer.callback_metrics["clip/max_logit/max"] == pytest.approx(
        trainer.callback_metrics["attn/max_logit/max"].item(), rel=1e-4
    )
    batch = next(iter(models.tokens()))
    free, _ = run([LocAteR(0.1)], max_steps=6)
    clipped, unclipped = (largest(first_layer(job.inner["network"], batch)).max() for job in (module, free))
    assert clipped < 3 < 6 < unclipped


def test_what_was_clipped_between_logged_steps_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    clip = QKClip(1.0)
    module = models.Job(gpt2(), lr=0.0)
    trainer = models.trainer([clip], max_steps=4, log_every_n_steps=4, logger=logger)
    trainer.fit(module, models.tokens(64, batch_size=4))
    metrics = trainer.callback_metrics
    assert metrics["clip/gamma/min"] < 0.99
    assert metrics["clip/clipped_heads"] >= 1
    assert metrics["clip/max_logit/max"] < 2.0  # the fourth step's own


def test_attention_is_left_as_it_was():
    original = transformers.modeling_utils.AttentionInterface.get_interface
    run([QKClip()], max_steps=1)
    assert transformers.modeling_utils.AttentionInterface.get_interface is original
    clip = QKClip()
    torch.manual_seed(0)
    module = models.Job(loss=lambda _: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        models.trainer([clip]).fit(module, models.tokens())
    assert transformers.modeling_utils.AttentionInterface.get_interface is original


def qwen3() -> nn.Module:
    return models.build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**models._GROUPED))


def test_a_norm_of_queries_and_keys_is_refused():
    with pytest.raises(ValueError, match=r"norm of queries or keys.*layers.0.self_attn"):
        models.trainer([QKClip()]).fit(models.Job(qwen3()), models.tokens())


@pytest.mark.parametrize(("arguments", "message"), [((0.0,), "cap above 0"), ((float("nan"),), "finite cap")])
def test_tau_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        QKClip(*arguments)
    with pytest.raises(ValueError, match="alpha between"):
        QKClip(alpha=1.5)
    with pytest.raises(ValueError, match="match at least one"):
        models.trainer([QKClip(modules="nothing")]).fit(models.Job(), models.tokens())


def no_softmax(module, query, key, value, attention_mask, scaling=None, **kwargs):
    logits = query @ key.mT
    return (logits.relu() @ value).transpose(1, 2).contiguous(), None


def test_attention_that_cannot_be_told_is_refused_before_a_weight_is_changed():
    from transformers import AttentionInterface

    AttentionInterface.register("no_softmax", no_softmax)
    model = models.gpt2(attn_implementation="no_softmax")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"leave such a layer out with QKClip\(modules=…\)"):
        models.trainer([QKClip(0.1)], max_steps=2).fit(models.Job(model, lr=0.0), models.tokens())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_logits_that_are_not_finite_are_left_alone():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 9] = torch.nan  # second head's query
    clip = QKClip(0.1)
    with pytest.warns(UserWarning, match="not finite at step"):
        models.trainer([clip], max_steps=1).fit(models.Job(model, lr=0.0), models.tokens())
    gammas = list(clip.gammas.values())
    assert gammas[1][1] == 1
    assert all(gamma.isfinite().all() for gamma in gammas)


def test_two_processes_agree(tmp_path):
    for processes in (1, 2):
        run_script(Path(__file__).with_name("weights_job.py"), tmp_path, processes, processes=processes)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert first.keys() == {"ddp", "fsdp2", "tensor parallel", "update cap", "sigma reparam"}
    for case in first:
        for name, gamma in first[case]["gammas"].items():
            assert torch.equal(gamma, second[case]["gammas"][name])
            torch.testing.assert_close(gamma, one[case]["gammas"][name], rtol=1e-4, atol=0)
        for name, weight in first[case]["weights"].items():
            assert torch.equal(weight, second[case]["weights"][name])
            torch.testing.assert_close(weight, one[case]["weights"][name], rtol=1e-3, atol=1e-5)
        for key, value in one[case]["metrics"].items():
            if key.startswith(("clip/", "update_cap/", "sigma_reparam/")):
                assert first[case]["metrics"][key] == second[case]["metrics"][key]
                assert first[case]["metrics"][key] == pytest.approx(value, rel=1e-3)
    for case in ("ddp", "fsdp2", "tensor parallel"):
        assert first[case]["metrics"]["clip/gamma/min"] < 1
    assert first["update cap"]["metrics"]["update_cap/factor/min"] < 1
    assert any(name.endswith("gain") for name in first["sigma reparam"]["weights"])


@pytest.mark.parametrize("name", ["SoftCap", "EntropyBand", "AttentionPrior"])
def test_the_place_beside_what_steers_attention_makes_no_difference(name):
    found = []
    for is_first in (True, False):
        clip, other = QKClip(1.0), intervention_jobs.make(name)
        _, job = intervention_jobs.fit([clip, other] if is_first else [other, clip], max_steps=2)
        assert any((gamma < 1).any() for gamma in clip.gammas.values())
        found.append((clip.maxima, intervention_jobs.weights(job)))
    for one, other in zip(*found, strict=True):
        intervention_jobs.assert_same(one, other)
