"""No value by design, did not run, nothing to measure, not finite: told apart in notes, table, record, metrics."""

import math

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lightning_qk import (
    AttentionMonitor,
    HiddenStateMonitor,
    PositionMonitor,
    QKSpectrumMonitor,
    SinkMonitor,
    TokenMonitor,
)
from lightning_qk.record.history import RunRecord
from lightning_qk.record.states import DID_NOT_RUN, KNOWN, NO_DATA, NO_VALUE, NOT_FINITE
from lightning_qk.record.verdicts import head_health, layer_health

ALARM = "not finite"


def watchers() -> list:
    quiet = {"figures_every": 0, "report": False}
    return [
        QKSpectrumMonitor(**quiet),
        AttentionMonitor(rows=None, **quiet),
        SinkMonitor(rows=None, sequences=None, **quiet),
        PositionMonitor(sequences=None, **quiet),
        HiddenStateMonitor(report=False),
        TokenMonitor(tokens=None, predict_every=1, **quiet),
    ]


def record_of(callbacks) -> RunRecord:
    record = RunRecord()
    for callback in callbacks:
        callback.contribute(record)
        record.notes += callback.notes
    return record


def fit(job, loader, callbacks, **kwargs):
    trainer = models.trainer(list(callbacks), **kwargs)
    trainer.fit(job, loader)
    return trainer


class Pairs(models.Job):
    """Batches for an encoder and a decoder."""

    def training_step(self, batch, batch_idx):
        loss = self.inner["network"](input_ids=batch, labels=batch).loss
        self.losses.append(loss.detach().clone())
        return loss


def test_cross_attention_is_healthy():
    callbacks = watchers()
    fit(Pairs(models.t5()), models.tokens(), callbacks)
    record = record_of(callbacks)
    assert not [note for note in record.notes if ALARM in note]
    assert {row.verdict for row in layer_health(record)} <= {"ok", "sink", "fresh", "uniform"}
    assert not [row for row in head_health(record) if row.verdict in ("non-finite", "no data")]
    spectrum = callbacks[0].history
    cross = [label for label in spectrum.layers if "cross" in label]
    assert cross
    for label in spectrum.layers:
        want = NO_VALUE if label in cross else KNOWN
        assert spectrum.state(label).tolist() == [want] * 4
    for label in cross:
        assert callbacks[3].history.state(label).tolist() == [NO_VALUE] * 4


def test_weights_of_cross_attention_that_are_not_finite_are_named():
    job = Pairs(models.t5())
    callbacks = [QKSpectrumMonitor(figures_every=0, report=False)]
    with torch.no_grad():
        job.inner["network"].decoder.block[1].layer[1].EncDecAttention.q.weight[0] = math.nan
    with pytest.warns(
        UserWarning, match=r"are not finite before the first step in .*EncDecAttention \(head 0\)"
    ):
        fit(job, models.tokens(), callbacks, max_steps=1)


class Skipping(models.Job):
    """Runs the second block of its network at every second step alone, as LayerDrop would."""

    def training_step(self, batch, batch_idx):
        network = self.inner["network"].transformer
        whole = network.h
        if batch_idx % 2:
            network.h = whole[:1]
        try:
            return super().training_step(batch, batch_idx)
        finally:
            network.h = whole


def test_a_layer_that_is_skipped_is_no_alarm_and_a_real_nan_is_told_later():
    class Breaks(Skipping):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if batch_idx == 4 else loss

    callbacks = watchers()[1:]
    fit(Skipping(), models.tokens(), callbacks)
    record = record_of(callbacks)
    assert not [note for note in record.notes if ALARM in note]
    rows = {row.label: row for row in layer_health(record)}
    assert rows["layer_01"].verdict != "non-finite"
    assert "measured at step 2: at step 3 it did not run" in rows["layer_01"].reason
    assert math.isfinite(rows["layer_01"].entropy_normalized)
    for callback in callbacks:
        assert callback.history.state("layer_01").tolist() == [DID_NOT_RUN] * callback.history.heads[-1]
    callbacks = watchers()[1:]
    fit(Breaks(), models.tokens(), callbacks, max_steps=6)
    for callback in callbacks:
        assert len([note for note in callback.notes if ALARM in note]) == 1
        assert "at step 5" in next(note for note in callback.notes if ALARM in note)


class Padded(models.Job):
    """Of one step, every token is padding."""

    def training_step(self, batch, batch_idx):
        mask = torch.ones_like(batch)
        if batch_idx == 1:
            mask[:] = 0
        out = self.inner["network"](input_ids=batch, attention_mask=mask, labels=batch)
        return out.loss


@pytest.mark.parametrize("make", [models.bert, models.gpt2])
def test_a_step_of_padding_alone(make):
    callbacks = watchers()[1:]
    trainer = fit(Padded(make()), models.tokens(), callbacks, max_steps=2)
    assert not [note for callback in callbacks for note in callback.notes if ALARM in note]
    assert all(not math.isinf(value) for value in trainer.callback_metrics.values())
    states = {type(callback).__name__: callback.history.states[-1] for callback in callbacks}
    assert NOT_FINITE not in torch.cat(list(states.values())).tolist()
    assert set(states["HiddenStateMonitor"].tolist()) == {NO_DATA}
    assert not [row for row in layer_health(record_of(callbacks)) if row.verdict == "non-finite"]


def test_sequences_of_one_token():
    callbacks = watchers()
    fit(models.Job(models.bert()), models.tokens(length=1), callbacks, max_steps=2)
    record = record_of(callbacks)
    assert not [note for note in record.notes if ALARM in note]
    assert not [row for row in layer_health(record) if row.verdict == "non-finite"]


class Networks(L.LightningModule):
    """Two networks in turn, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = models.gpt2(), models.gpt2()

    def training_step(self, batch, batch_idx):
        network, optimizer = (
            (self.one, self.optimizers()[0]) if batch_idx % 2 else (self.two, self.optimizers()[1])
        )
        loss = network(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.one, self.two)]


def test_networks_in_turn():
    callbacks = watchers()
    fit(Networks(), models.tokens(), callbacks, max_steps=4)
    record = record_of(callbacks)
    assert not [note for note in record.notes if ALARM in note]
    assert not [row for row in layer_health(record) if row.verdict in ("non-finite", "no data")]


@pytest.mark.parametrize("key", ["qk/eig_var/mean", "attn/entropy/mean", "hidden/token_norm/mean"])
def test_metrics_are_nan_once_a_head_is_not_finite(key):
    class Breaks(models.Job):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                with torch.no_grad():
                    self.inner["network"].transformer.h[1].attn.c_attn.weight[0, 0] = math.nan
            super().training_step(batch, batch_idx)
            # The loss itself is of no use here: it would be NaN too.
            return sum(parameter.sum() for parameter in self.parameters()) * 0.0

    stop = EarlyStopping(key, check_finite=True, patience=100, check_on_train_epoch_end=True)
    trainer = fit(Breaks(), models.tokens(), [*watchers(), stop], max_steps=-1, max_epochs=3)
    assert math.isnan(trainer.callback_metrics[key])
    assert trainer.current_epoch == 1


@pytest.mark.parametrize(
    "limits",
    [
        {"max_steps": 3},
        {"max_epochs": 1, "max_steps": -1},
        {"max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": 3},
    ],
)
def test_runs_that_are_shorter_than_the_cadence_are_measured_at_their_last_step(limits):
    callbacks = watchers()
    trainer = fit(models.Job(), models.tokens(), callbacks, log_every_n_steps=50, **limits)
    steps = trainer.global_step - 1
    assert callbacks[0].history.steps == [-1, steps]
    for callback in callbacks[1:]:
        assert callback.history.steps == [steps]


def test_a_run_whose_end_was_not_known_says_that_nothing_was_measured():
    class Stops(models.Job):
        def training_step(self, batch, batch_idx):
            self.trainer.should_stop = batch_idx == 2
            return super().training_step(batch, batch_idx)

    callbacks = watchers()
    fit(Stops(), models.tokens(), callbacks, max_steps=-1, log_every_n_steps=50)
    assert callbacks[0].history.steps == [-1, 2]  # of the weights, after the last step
    rows = layer_health(record_of(callbacks))
    assert {row.verdict for row in rows} == {"no data"}
    assert all("no step was measured: training ended after 3 of them" in row.reason for row in rows)


def test_states_survive_a_record_and_a_resume(tmp_path):
    callbacks = watchers()[:2]
    fit(Pairs(models.t5()), models.tokens(), callbacks)
    record = record_of(callbacks)
    again = RunRecord.load(record.save(tmp_path / "record.safetensors"))
    for name in ("spectrum", "attention"):
        one, other = getattr(record, name), getattr(again, name)
        assert all(torch.equal(a, b) for a, b in zip(one.states, other.states, strict=True))
    assert layer_health(record) == layer_health(again) or str(layer_health(record)) == str(
        layer_health(again)
    )
