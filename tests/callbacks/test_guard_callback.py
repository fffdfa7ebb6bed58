"""The guard on jobs that collapse, and on one that does not."""

import itertools
import warnings
from pathlib import Path

import lightning as L
import models
import pytest
import torch
from guard_job import Sharpen, fit
from processes import run_script

from lightning_qk import AttentionMonitor, CollapseGuard, LocAteR, QKClip, QKSpectrumMonitor
from lightning_qk.callbacks.guard._healthy import CHECKPOINT_NAME
from lightning_qk.callbacks.guard._watch import HiddenCosine


def weights(job):
    return torch.cat([parameter.detach().flatten() for parameter in job.parameters()])


def test_warns_of_a_collapse_and_names_the_head(tmp_path):
    guard = CollapseGuard(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"head \d of inner.network.transformer.h.1.attn"):
        trainer, _ = fit(guard, Sharpen(), default_root_dir=tmp_path)
    assert trainer.global_step == 20  # a warning ends nothing
    assert 8 <= guard.verdicts[0].step < 16
    assert trainer.callback_metrics["guard/fired"] >= 1


def test_is_silent_on_a_healthy_run_and_changes_nothing(tmp_path):
    guard = CollapseGuard("stop", every_n_steps=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer, watched = fit(guard, default_root_dir=tmp_path)
    assert not [one for one in said if "CollapseGuard" in str(one.message)]
    assert not guard.verdicts
    assert trainer.global_step == 20
    assert (tmp_path / CHECKPOINT_NAME).is_file()
    _, plain = fit(CollapseGuard(every_n_steps=10**6, checkpoint_every=0), default_root_dir=tmp_path)
    assert torch.equal(weights(watched), weights(plain))


@pytest.mark.parametrize("guard_first", [True, False])
def test_reads_the_trainers_monitors(tmp_path, guard_first):
    guard = CollapseGuard(every_n_steps=2)
    monitors = [
        AttentionMonitor(1, rows=None, report=False, figures_every=0),
        QKSpectrumMonitor(1, report=False, figures_every=0),
    ]
    torch.manual_seed(1)
    callbacks = [guard, *monitors] if guard_first else [*monitors, guard]
    trainer = models.trainer([Sharpen(), *callbacks], max_steps=20, max_epochs=-1, default_root_dir=tmp_path)
    seen = []
    observe = guard.detector.observe
    guard.detector.observe = lambda reading: seen.append(reading) or observe(reading)
    trainer.fit(models.Job(lr=1e-3, optimizer="adamw"), models.tokens(64))
    assert guard.verdicts
    for reading in seen:
        index = monitors[0].history.steps.index(reading.step)
        want = monitors[0].history.values["max_abs_logit"][index]
        assert torch.equal(reading.values["attn/max_abs_logit"], want)
        assert "qk/frobenius_sq" in reading.values
        assert len(reading.losses) == 2


@pytest.mark.parametrize("action", ["stop", "remedy"])
def test_the_place_in_the_list_makes_no_difference(tmp_path, action):
    """Every reading is judged, the last step's too, and what is done about it is done at the same step."""
    found = []
    for number, guard_first in enumerate((True, False)):
        guard = CollapseGuard("stop" if action == "stop" else QKClip(5.0), every_n_steps=1, lr_factor=0.5)
        monitors = [
            AttentionMonitor(1, rows=None, report=False, figures_every=0),
            QKSpectrumMonitor(1, report=False, figures_every=0),
        ]
        torch.manual_seed(1)
        callbacks = [guard, *monitors] if guard_first else [*monitors, guard]
        trainer = models.trainer(
            [Sharpen(), *callbacks], max_steps=20, max_epochs=-1, default_root_dir=tmp_path / str(number)
        )
        job = models.Job(lr=1e-3, optimizer="adamw")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(job, models.tokens(64))
        assert not any("could not be logged" in str(one.message) for one in said)
        assert guard.verdicts
        assert guard.event_log.curves.steps == list(range(trainer.global_step))
        assert guard._pending is None
        found.append((trainer.global_step, guard.verdicts, guard.event_log.state_dict(), weights(job)))
    assert found[0][:2] == found[1][:2]
    assert str(found[0][2]) == str(found[1][2])
    assert torch.equal(found[0][3], found[1][3])


def test_a_last_step_that_alone_is_alarming_is_told(tmp_path):
    class Breaks(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 9:
                with torch.no_grad():
                    module.inner["network"].transformer.h[1].attn.c_attn.weight.fill_(torch.nan)

    guard = CollapseGuard(QKClip(5.0), every_n_steps=1, checkpoint_every=0)
    monitors = [AttentionMonitor(1, report=False, figures_every=0), QKSpectrumMonitor(1, report=False)]
    trainer = models.trainer([Breaks(), guard, *monitors], max_steps=10, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="CollapseGuard: step 9"):
        trainer.fit(models.Job(), models.tokens(64))
    assert [verdict.step for verdict in guard.verdicts] == [9]


def test_stop(tmp_path):
    guard = CollapseGuard("stop", every_n_steps=1)
    trainer, _ = fit(guard, Sharpen(), default_root_dir=tmp_path)
    assert trainer.global_step < 20


def test_rolls_back_once_and_wakes_the_remedy(tmp_path):
    clip = QKClip(5.0)
    guard = CollapseGuard(clip, every_n_steps=1, rollback=True, lr_factor=0.1, checkpoint_every=2)
    kept, back = {}, []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            kept[trainer.global_step] = weights(module).clone()
            assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3  # no schedule sees the factor

    restore = guard._healthy.restore

    def restored(trainer):
        done = restore(trainer)
        back.append((guard._healthy.step, weights(trainer.lightning_module).clone()))
        return done

    guard._healthy.restore = restored
    trainer, job = fit(guard, Sharpen(), Watch(), default_root_dir=tmp_path)
    ((step, found),) = back  # once
    assert guard.rolled_back_to == step < guard.verdicts[0].step
    assert torch.equal(found, kept[step + 1])  # loggers count steps from 0
    assert clip.maxima  # it watched
    assert not any(callback is clip for callback in trainer.callbacks)
    assert guard._rate.factor == 0.1
    largest = max(float(values.max()) for values in clip.maxima.values())
    assert largest < 30
    assert torch.isfinite(weights(job)).all()


def test_goes_back_to_the_start_where_nothing_later_was_confirmed(tmp_path):
    guard = CollapseGuard(every_n_steps=1, rollback=True, lr_factor=0.1, lr_warmup=5, checkpoint_every=1)
    start, back, moved = [], [], []

    class Watch(L.Callback):
        def on_train_start(self, trainer, module):
            start.append(weights(module).clone())

        def on_train_batch_end(self, trainer, module, *_):
            moved.append((trainer.global_step, weights(module).clone()))

    restore = guard._healthy.restore

    def restored(trainer):
        assert trainer.optimizers[0].state
        done = restore(trainer)
        back.append(weights(trainer.lightning_module).clone())
        assert not trainer.optimizers[0].state  # Adam begins anew
        return done

    guard._healthy.restore = restored
    with pytest.warns(UserWarning, match="back where training started"):
        fit(guard, Sharpen(start=1, stop=9), Watch(), default_root_dir=tmp_path)
    assert guard.rolled_back_to == -1
    assert torch.equal(back[0], start[0])
    first = guard.verdicts[0].step + 1
    after = [back[0], *(values for step, values in moved if step > first)][:4]
    # The first step of Adam is the rate for every weight: a fifth of a tenth, where it is warmed up over five.
    sizes = [float((b - a).abs().median()) for a, b in itertools.pairwise(after)]
    assert sizes[0] == pytest.approx(1e-3 * 0.1 / 5, rel=0.05)
    assert sizes[2] > 1.2 * sizes[0]


def test_a_checkpoint_counts_once_what_followed_was_healthy(tmp_path):
    guard = CollapseGuard(every_n_steps=1, rollback=True, checkpoint_every=1)
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen[trainer.global_step] = (guard._healthy.step, guard._healthy.is_waiting)

        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 10:
                # What is not confirmed yet is dropped by one reading that is not healthy.
                guard._healthy.doubt(trainer)

    fit(guard, Watch(), default_root_dir=tmp_path, steps=24)
    readings = guard.detector.sensitivity.window
    confirmed = [step for step, _ in seen.values()]
    assert confirmed[0] == -1
    assert all(step == -1 or number - 1 - step >= readings for number, (step, _) in seen.items())
    assert max(confirmed) >= 10  # those after it went on
    assert (tmp_path / "lightning_qk_healthy.ckpt").is_file() or list(
        tmp_path.rglob("lightning_qk_healthy.ckpt")
    )
    torch.load(next(tmp_path.rglob("lightning_qk_healthy.ckpt")), weights_only=False)["state_dict"]


def test_a_checkpoint_that_cannot_be_read_leaves_training_where_it_is(tmp_path):
    guard = CollapseGuard(every_n_steps=1, rollback=True, checkpoint_every=1)

    class Break(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            for path in tmp_path.rglob("lightning_qk_healthy.ckpt"):
                path.write_bytes(b"nothing")

    with pytest.warns(UserWarning, match="could not go back"):
        trainer, _ = fit(guard, Break(), Sharpen(), default_root_dir=tmp_path)
    assert trainer.global_step == 20
    assert guard.rolled_back_to is None


def test_a_checkpoint_that_cannot_be_written_leaves_training_alone(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    guard = CollapseGuard(every_n_steps=1, rollback=True, checkpoint_every=1)
    with pytest.warns(UserWarning, match="keeps no more checkpoints") as said:
        trainer, _ = fit(guard, default_root_dir=tmp_path)
    assert trainer.global_step == 20
    assert sum("keeps no more" in str(one.message) for one in said) == 1


def test_cosine_counts_the_tokens_that_the_mask_keeps():
    hidden = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    watched = HiddenCosine(models.llama())
    watched.listen({"attention_mask": mask})
    found = watched._cosines(hidden)
    watched.stop()

    want = []
    for row, keep in zip(hidden, mask.bool(), strict=True):
        unit = torch.nn.functional.normalize(row[keep].double(), dim=-1)
        pairs = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
        if len(pairs):
            want.append(float(pairs.mean()))
    assert found.tolist() == pytest.approx([sum(want), 2.0], rel=1e-5)


def test_the_rate_never_exceeds_the_factor_of_its_peak():
    from lightning_qk.callbacks.guard._rate import RateLimit

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    limit = RateLimit()
    limit.attach([optimizer])

    def step(rate):
        optimizer.param_groups[0]["lr"] = rate
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate
        return before - parameter.item()

    assert step(0.5) == pytest.approx(0.5)
    limit.tighten(0.1)
    assert step(0.2) == pytest.approx(0.02)
    assert step(4.0) == pytest.approx(0.05)
    limit.detach()
    assert step(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("action", ["locater", "qk_clip"])
def test_named_remedies(tmp_path, action):
    guard = CollapseGuard(action, every_n_steps=1)
    fit(guard, Sharpen(), default_root_dir=tmp_path)
    (remedy,) = guard.remedies
    assert isinstance(remedy, {"locater": LocAteR, "qk_clip": QKClip}[action])
    if action == "locater":
        assert remedy._held.start is not None  # it took the moment of the alarm as the start


def test_a_loss_that_is_no_number_is_an_alarm(tmp_path):
    class Break(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 5:
                with torch.no_grad():
                    next(module.parameters()).fill_(float("nan"))

    guard = CollapseGuard("stop", every_n_steps=2)
    trainer, _ = fit(guard, Break(), default_root_dir=tmp_path)
    assert trainer.global_step == 6
    assert "loss is nan" in guard.verdicts[0].reason


def test_resumes_with_the_remedy_awake(tmp_path):
    guard = CollapseGuard(QKClip(5.0), every_n_steps=1, lr_factor=0.5)
    trainer, _ = fit(guard, Sharpen(), default_root_dir=tmp_path, steps=14)
    assert guard.verdicts
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = CollapseGuard(QKClip(5.0), every_n_steps=1, lr_factor=0.5)
    fit(resumed, default_root_dir=tmp_path, steps=18, ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.verdicts[: len(guard.verdicts)] == guard.verdicts
    assert resumed._rate.factor == guard._rate.factor == 0.5
    assert resumed.remedies[0].maxima


def test_an_alert_falls_back_to_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="CollapseGuard: step"):
        fit(CollapseGuard("alert", every_n_steps=1), Sharpen(), default_root_dir=tmp_path)


def test_an_alert_goes_to_wandb(tmp_path, monkeypatch):
    from unittest.mock import MagicMock

    from lightning.pytorch.loggers import WandbLogger

    run = MagicMock()  # a real one would have to be finished before other tests begin theirs
    monkeypatch.setattr(WandbLogger, "experiment", property(lambda self: run))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(CollapseGuard("alert", every_n_steps=1), Sharpen(), default_root_dir=tmp_path, logger=logger)
    sent = run.alert.call_args_list[0].kwargs
    assert sent["title"] == "CollapseGuard"
    assert "transformer.h.1.attn" in sent["text"]


def test_a_guard_that_cannot_measure_does_not_end_the_run(tmp_path, monkeypatch):
    guard = CollapseGuard("stop", every_n_steps=1)
    monkeypatch.setattr(guard.detector, "observe", lambda reading: 1 / 0)
    with pytest.warns(UserWarning, match="stopped watching"):
        trainer, _ = fit(guard, default_root_dir=tmp_path)
    assert trainer.global_step == 20


@pytest.mark.parametrize(
    "arguments",
    [
        {"action": "explode"},
        {"action": [3]},
        {"every_n_steps": 0},
        {"lr_factor": 0.0},
        {"lr_factor": 2.0},
        {"rollback": True, "checkpoint_every": 0},
        {"rows": 0},
    ],
)
def test_refuses_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected"):
        CollapseGuard(**arguments)


def in_two(script, folder):
    run_script(Path(__file__).with_name(script), folder, processes=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_do_the_same(tmp_path):
    one, other = in_two("guard_job.py", tmp_path)
    assert one["alarms"] == other["alarms"] != []
    assert one["back"] == other["back"] is not None
    assert torch.equal(one["weights"], other["weights"])


def test_goes_back_where_weights_are_sharded_and_in_half_precision(tmp_path):
    for found in in_two("guard_sharded_job.py", tmp_path):
        for name, one in found.items():
            want = {"steps": 8, "back": -1, "is_start": True, "moved": True, "goes_on": True, "finite": True}
            assert one == want, name


def test_what_fails_on_one_rank_makes_no_other_wait(tmp_path):
    for found in in_two("guard_fault_job.py", tmp_path):
        plain = found.pop("plain")
        assert len(plain) == 6
        for name, losses in found.items():
            assert losses == plain, name
