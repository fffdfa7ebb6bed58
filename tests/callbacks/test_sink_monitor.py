"""SinkMonitor and PositionMonitor: the models' own maps and values, and a training that does not notice them."""

import copy
from contextlib import contextmanager

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from oracles import sinks_of_maps
from test_monitors import read_csv
from torch import Tensor, nn

from lightning_qk import AttentionMonitor, PositionMonitor, SinkMonitor
from lightning_qk.functional.sinks import SINK_STATISTICS
from lightning_qk.record.history import RunRecord

QUIET = {"figures_every": 0, "report": False}


def sinks(**kwargs) -> SinkMonitor:
    return SinkMonitor(**{"rows": None, "sequences": None, **QUIET, **kwargs})


def position(**kwargs) -> PositionMonitor:
    return PositionMonitor(**{"sequences": None, **QUIET, **kwargs})


class Masked(models.Job):
    """With padding on one side of every second sequence, and no dropout."""

    def __init__(self, model: nn.Module, side: str | None) -> None:
        super().__init__(model, lr=0.0)
        self.side = side
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def mask(self, batch: Tensor) -> Tensor:
        keep = torch.ones_like(batch)
        if self.side is not None:
            keep[::2, slice(0, 5) if self.side == "left" else slice(-5, None)] = 0
        return keep

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.inner["network"](input_ids=batch, attention_mask=self.mask(batch), labels=batch).loss


@contextmanager
def values_of(model: nn.Module):
    """Values of every layer, ``(batch, value_heads, n, d_head)``, by hooks on the model's own projections."""
    found: list[Tensor] = []
    handles = []
    for name, module in model.named_modules():
        if name.endswith(("v_proj", "self.value")):
            handles.append(module.register_forward_hook(lambda m, i, out: found.append(out)))
        elif name.endswith("attn.c_attn"):
            handles.append(module.register_forward_hook(lambda m, i, out: found.append(out.chunk(3, -1)[2])))
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("make", [models.gpt2, models.bert, models.llama, models.mistral, models.gpt_oss])
def test_equals_the_models_own_maps_and_values(make, side):
    job = Masked(make(), side)
    model = copy.deepcopy(job.inner["network"]).eval()
    model.set_attn_implementation("eager")
    (batch,) = models.tokens(4)
    keep = job.mask(batch)
    with torch.no_grad(), values_of(model) as values:
        maps = model(input_ids=batch, attention_mask=keep, output_attentions=True).attentions
    callback = sinks()
    models.trainer([callback], max_steps=1).fit(job, models.tokens(4))
    assert callback.notes == []
    there = keep.bool()
    for layer, (p, flat) in enumerate(zip(maps, values, strict=True)):
        value = flat.unflatten(-1, (-1, 8)).transpose(1, 2)
        # What a map hides is 0 in it; rows of padding may look at anything.
        visible = (p > 0) & there[:, None, :, None] & there[:, None, None, :]
        want = sinks_of_maps(p, value, visible, padding=there)
        for name in SINK_STATISTICS:
            got = callback.history.grid(name)[layer].double()
            torch.testing.assert_close(got, want[name], rtol=2e-3, atol=1e-4, equal_nan=True, msg=name)
    assert callback.history.series("sink_number").max() > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_does_not_notice(checkpointing, precision):
    def fit(callbacks):
        L.seed_everything(11, verbose=False)
        job = models.Job(models.llama(), optimizer="adamw")
        if checkpointing:
            job.inner["network"].gradient_checkpointing_enable({"use_reentrant": False})
        loader = torch.utils.data.DataLoader(models.tokens(32).dataset, batch_size=4, shuffle=True)
        models.trainer(callbacks, max_steps=5, precision=precision).fit(job, loader)
        return job, torch.get_rng_state()

    plain, rng = fit([])
    callbacks = [SinkMonitor(rows=5, sequences=2, **QUIET), PositionMonitor(length=7, **QUIET)]
    heard: list[str] = []
    for callback in callbacks:
        hear = callback.measure_call
        callback.measure_call = lambda name, call, hear=hear: heard.append(name) or hear(name, call)
    watched, rng_watched = fit(callbacks)
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, watched.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert torch.equal(rng, rng_watched)
    # Two layers, five steps, two monitors: what is computed again in the backward pass is not heard again.
    assert len(heard) == 2 * 5 * 2
    for callback in callbacks:
        assert callback.notes == []
        assert callback.history.series(callback.statistics[0]).isfinite().all()


def test_micro_batches_are_pooled():
    def fit(size, accumulate):
        torch.manual_seed(3)
        callback, other = sinks(), position()
        models.trainer([callback, other], max_steps=1, accumulate_grad_batches=accumulate).fit(
            Masked(models.gpt2(), None), models.tokens(8, batch_size=size)
        )
        return callback.history, other.history

    (whole, _), (parts, shares), (_, single) = fit(8, 1), fit(2, 4), fit(1, 8)
    for name in SINK_STATISTICS[:-1]:
        torch.testing.assert_close(parts.series(name), whole.series(name), rtol=1e-4, atol=1e-5, msg=name)
    # One function of the distance for two sequences explains less than one for each.
    assert (shares.series("positional_share") < single.series("positional_share")).all()


def test_a_single_sequence_has_no_share_of_position():
    callback = sinks()
    models.trainer([callback], max_steps=1).fit(models.Job(), models.tokens(4, batch_size=1))
    assert callback.history.series("waiver_position").isnan().all()
    assert callback.history.series("waiver_mass").isfinite().all()
    assert callback.notes == []


def test_keys_next_to_attention_monitors(tmp_path):
    callbacks = [
        AttentionMonitor(**QUIET),
        SinkMonitor(per_layer="waiver_mass", **QUIET),
        PositionMonitor(per_layer=True, per_head=True, **QUIET),
    ]
    trainer = models.trainer(callbacks, max_steps=4, logger=CSVLogger(tmp_path), val_check_interval=2)
    trainer.fit(models.Job(), models.tokens(), models.tokens(8))
    rows = read_csv(tmp_path / "lightning_logs" / "version_0")
    keys = set().union(*rows)
    for key in (
        "attn/query_norm/mean",
        "attn/key_norm/max",
        "attn/sink_rate/mean",
        "attn/sink_output/mean",
        "attn/layer_01/waiver_mass",
        "attn/val/sink_number/mean",
        "attn/positional_share/min",
        "attn/layer_00/positional_share",
        "attn/layer_01/head_03/positional_share",
        "attn/val/layer_01/positional_share",
    ):
        assert key in keys
    assert "attn/layer_01/head_03/sink_output" not in keys
    assert [int(row["step"]) for row in rows if "attn/sink_output/mean" in row] == [0, 1, 2, 3]
    assert trainer.callback_metrics["attn/positional_share/mean"] > 0


def test_curves_of_the_report(tmp_path):
    callbacks = [AttentionMonitor(), SinkMonitor(), PositionMonitor()]
    models.trainer(callbacks, logger=CSVLogger(tmp_path)).fit(models.Job(), models.tokens())
    (path,) = tmp_path.rglob("*.safetensors")
    scalars = RunRecord.load(path).scalars
    for name in ("sink_number", "sink_output", "waiver_mass", "positional_share"):
        steps, values = scalars[f"attn/{name}/mean"]
        assert steps == [0, 1, 2, 3]
        assert all(value == value for value in values)


def test_layers_that_show_no_values_are_named_once():
    from transformers import CodeGenConfig, CodeGenForCausalLM

    config = CodeGenConfig(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    callbacks = [AttentionMonitor(**QUIET), sinks(), position()]
    trainer = models.trainer(callbacks)
    with pytest.warns(UserWarning, match=r"\(2 layers\) are left out: the softmax is taken") as caught:
        trainer.fit(models.Job(models.build(CodeGenForCausalLM, config)), models.tokens())
    said = [str(one.message) for one in caught if "left out" in str(one.message)]
    assert [one.split(":")[0] for one in said] == ["SinkMonitor"]
    assert "logits are seen but not queries, keys and values" in said[0]
    # The share of the distance follows from logits alone; AttentionMonitor has all but the norms.
    assert callbacks[2].history.series("positional_share").isfinite().all()
    assert callbacks[0].notes == []
    assert callbacks[0].history.series("entropy").isfinite().all()
    assert callbacks[0].history.series("query_norm").isnan().all()
    assert trainer.global_step == 4


def test_cross_attention_has_sinks_and_no_positions():
    class Translate(models.Job):
        def training_step(self, batch, batch_idx):
            return self.inner["network"](input_ids=batch, labels=batch[:, :9].contiguous()).loss

    sink, place = callbacks = [sinks(), position()]
    models.trainer(callbacks).fit(Translate(models.t5()), models.tokens())
    assert sink.notes == place.notes == []
    for index, label in enumerate(sink.history.layers):
        assert sink.history.grid("sink_output")[index].isfinite().all()
        assert place.history.grid("positional_share")[index].isnan().all() == ("cross" in label)


def test_values_that_are_not_finite_are_named():
    job = models.Job(lr=0.0)
    with torch.no_grad():
        job.inner["network"].transformer.h[1].attn.c_attn.weight[:, 9] = torch.nan  # query of head 1
    with pytest.warns(UserWarning, match="probabilities or values are not finite at step 0") as caught:
        models.trainer([sinks()]).fit(job, models.tokens())
    (said,) = [str(one.message) for one in caught if "not finite" in str(one.message)]
    assert "transformer.h.1.attn (head 1):" in said


def test_positional_share_is_that_of_the_models_own_logits():
    """Of BERT's first layer, whose queries and keys are made by hand."""
    from lightning_qk import head_projections
    from lightning_qk.functional import positional_share

    job = Masked(models.bert(), None)
    callback = position()
    models.trainer([callback], max_steps=1).fit(job, models.tokens(4))
    network = job.inner["network"].eval()
    (batch,) = models.tokens(4)
    head = next(iter(head_projections(network).values()))
    with torch.no_grad():
        x = network.bert.embeddings(input_ids=batch)
        query = torch.einsum("hde,bne->bhnd", head.query, x) + head.query_bias[:, None]
        key = torch.einsum("hde,bne->bhnd", head.key, x) + head.key_bias[:, None]
        want = positional_share(query, key, scaling=head.scaling)
    torch.testing.assert_close(callback.history.grid("positional_share")[0], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinkMonitor(rows=0), "rows to be at least 1"),
        (lambda: SinkMonitor(sequences=0), "sequences to be at least 1"),
        (lambda: PositionMonitor(sequences=0), "sequences to be at least 1"),
        (lambda: PositionMonitor(length=2), "length of at least 3"),
        (lambda: PositionMonitor(every_n_eval_batches=-1), "every_n_eval_batches"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
