"""What callbacks that steer leave in the run's record and report."""

import lightning as L
import models
import pytest
import torch
from guard_job import Sharpen, fit

from lightning_qk import (
    AttentionMonitor,
    CollapseGuard,
    EntropyBand,
    LocAteR,
    QKClip,
    SigmaReparam,
    UpdateCap,
)
from lightning_qk.callbacks._event_log import EventLog
from lightning_qk.record.events import Event
from lightning_qk.record.history import RunRecord

RECORD, REPORT = "lightning_qk_record.safetensors", "lightning_qk_report.html"


def test_curves_and_events_are_bounded():
    account = EventLog()
    for step in range(1000):
        account.add_points(step, {"a": step, "b": float("nan") if step else 2.0})
        account.add_event(Event(step, "note", "a test", f"event {step}"))
    record = RunRecord(events=[(500, "another's")])
    account.contribute(record)
    assert len(record.events) == EventLog.MAX_EVENTS + 2
    assert record.events[-1] == (500, "another's")
    assert record.events[-2] == (99, "900 more events of this kind followed")
    steps, values = record.scalars["a"]
    assert steps == values
    assert len(steps) <= account.curves.max_points
    assert record.scalars["b"] == ([0], [2.0])  # what is no number is no point


def test_goes_on_after_a_checkpoint():
    account, other = EventLog(), EventLog()
    account.add_points(3, {"a": 1.0})
    account.add_event(Event(3, "clip", "QKClip", "an event", "layer_00", 2.0, 1.0))
    other.load_state_dict(account.state_dict())
    other.add_points(4, {"a": 2.0})
    other.load_state_dict({})  # of an older version: nothing to go on with, nothing lost
    record = RunRecord()
    other.contribute(record)
    assert record.events == [(3, "an event")]
    assert [event.state_dict() for event in other.kept] == [event.state_dict() for event in account.kept[:1]]
    assert record.scalars == {"a": ([3, 4], [1.0, 2.0])}


def test_an_alarm_and_what_was_done_stand_in_the_report(tmp_path):
    guard = CollapseGuard(QKClip(5.0), every_n_steps=1, rollback=True, lr_factor=0.1, checkpoint_every=2)
    monitor = AttentionMonitor(1, figures_every=0)
    fit(guard, Sharpen(), monitor, default_root_dir=tmp_path, log_every_n_steps=1)
    record = RunRecord.load(tmp_path / RECORD)
    alarm = guard.verdicts[0]
    # The layer by the table's name too.
    reason = alarm.reason.replace("transformer.h.1.attn", "transformer.h.1.attn (layer_01)")
    assert (
        alarm.step,
        f"CollapseGuard: {reason}; weights and optimizer are back at step {guard.rolled_back_to}; "
        "the learning rate is multiplied by 0.1; QKClip set in",
    ) in record.events
    # And what the remedy did that it woke.
    clipped = [step for step, sentence in record.events if sentence.startswith("QKClip clipped layer_")]
    assert clipped
    assert min(clipped) > alarm.step
    for name in ("guard/score", "guard/lr_factor", "clip/gamma/min", "clip/max_logit/max"):
        steps, values = record.scalars[name]
        assert len(steps) == len(values) > 0
    assert max(record.scalars["guard/score"][1]) >= 1
    page = (tmp_path / REPORT).read_text()
    assert "Alarms and remedies" in page
    assert "QKClip set in" in page


def test_a_healthy_run_has_no_such_section(tmp_path):
    fit(CollapseGuard(every_n_steps=1), AttentionMonitor(1, figures_every=0), default_root_dir=tmp_path)
    assert RunRecord.load(tmp_path / RECORD).events == []
    assert "Alarms and remedies" not in (tmp_path / REPORT).read_text()


def test_the_first_clip_of_a_layer_is_told_once_also_over_a_resume(tmp_path):
    clip = QKClip(1e-3)
    trainer = models.trainer([clip], max_steps=3, log_every_n_steps=1, default_root_dir=tmp_path)
    trainer.fit(models.Job(models.gpt2()), models.tokens())
    layers = [sentence.split()[2] for _, sentence in clip.event_log.events]
    assert sorted(layers) == ["layer_00", "layer_01"]
    assert {step for step, _ in clip.event_log.events} == {0}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = QKClip(1e-3)
    trainer = models.trainer([resumed], max_steps=6, log_every_n_steps=1, default_root_dir=tmp_path)
    trainer.fit(
        models.Job(models.gpt2()), models.tokens(), ckpt_path=tmp_path / "run.ckpt", weights_only=False
    )
    assert resumed.event_log.events == clip.event_log.events
    assert resumed.event_log.curves.steps == list(range(6))


@pytest.mark.parametrize(
    ("callback", "curve"),
    [
        (lambda: EntropyBand(weight=1.0, low=0.5, high=0.6), "entropy_band/"),
        (UpdateCap, "update_cap/factor/min"),
        (SigmaReparam, "sigma_reparam/gain/mean"),
        (lambda: LocAteR(0.1), "locater/penalty"),
    ],
)
def test_every_remedy_has_its_curve(tmp_path, callback, curve):
    steering = callback()
    trainer = models.trainer(
        [steering, AttentionMonitor(1, figures_every=0)],
        max_steps=3,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    job = models.Job(models.gpt2())
    job.train()
    trainer.fit(job, models.tokens())
    found = {
        name: values
        for name, values in RunRecord.load(tmp_path / RECORD).scalars.items()
        if name.startswith(curve)
    }
    assert found
    for name, (steps, values) in found.items():
        logged = trainer.callback_metrics.get(name)
        assert steps[-1] == 2
        assert torch.isfinite(torch.tensor(values)).all()
        if logged is not None:
            assert values[-1] == pytest.approx(float(logged), rel=1e-5)


def test_callbacks_of_others_are_left_alone(tmp_path):
    class Foreign(L.Callback):
        event_log = "savings"
        remedies = 3

        def contribute(self, record):
            raise AssertionError

    monitor = AttentionMonitor(1, figures_every=0)
    trainer = models.trainer([Foreign(), monitor], max_steps=1, default_root_dir=tmp_path)
    trainer.fit(models.Job(models.gpt2()), models.tokens())
    assert (tmp_path / REPORT).exists()
    assert monitor.notes == []
