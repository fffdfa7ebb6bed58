"""Events of real runs: alarms, clips, NaN and what was left out, as a program reads them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from guard_job import Sharpen, fit
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_qk import AttentionMonitor, CollapseGuard, QKClip, QKSpectrumMonitor, UpdateCap
from lightning_qk.callbacks._event_log import write_events
from lightning_qk.record.events import EVENTS_NAME, Event, read_events


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / EVENTS_NAME) if event["kind"] in kinds]


class Follow(Callback):
    """Reads the file in the middle of the run, as a program beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[int, list[str]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen[trainer.global_step] = [one["kind"] for one in read_events(self.folder / EVENTS_NAME)]


def guarded() -> CollapseGuard:
    return CollapseGuard(QKClip(5.0), every_n_steps=1, rollback=True, lr_factor=0.1, checkpoint_every=2)


def test_an_alarm_its_remedies_and_clips(tmp_path: Path) -> None:
    guard, follow = guarded(), Follow(tmp_path)
    fit(guard, Sharpen(), follow, default_root_dir=tmp_path)
    verdict = guard.verdicts[0]
    (alarm,) = events(tmp_path, "alarm")[:1]
    assert (alarm["step"], alarm["source"], alarm["threshold"]) == (verdict.step, "CollapseGuard", 1.0)
    assert alarm["value"] == pytest.approx(verdict.score)
    assert alarm["value"] >= 1
    # The layer by the label of the log keys too.
    reason = verdict.reason.replace("transformer.h.1.attn", "transformer.h.1.attn (layer_01)")
    assert reason in alarm["message"]
    # Where it was hurt, by the label of the log keys.
    assert alarm["where"].split("/")[0] == "layer_01"
    remedies = [event["message"] for event in events(tmp_path, "remedy")]
    assert remedies == [
        f"weights and optimizer are back at step {guard.rolled_back_to}",
        "the learning rate is multiplied by 0.1",
        "QKClip set in",
    ]
    clips = events(tmp_path, "clip")
    assert {clip["where"].split("/")[0] for clip in clips} <= {"layer_00", "layer_01"}
    assert clips
    for clip in clips:
        assert (clip["source"], clip["threshold"]) == ("QKClip", 5.0)
        assert clip["value"] > 5.0
    # They were there at once.
    assert "alarm" not in follow.seen[verdict.step]
    assert "alarm" in follow.seen[verdict.step + 2]


def test_a_resumed_run_has_each_event_once(tmp_path: Path) -> None:
    saved: list[Callback] = [ModelCheckpoint(tmp_path, "run", every_n_train_steps=14)]
    fit(guarded(), Sharpen(), *saved, default_root_dir=tmp_path / "a", enable_checkpointing=True)
    before = read_events(tmp_path / "a" / EVENTS_NAME)
    # Steps from the checkpoint on are done again, in the folder where they were, and in a new one.
    for folder in ("a", "b"):
        fit(guarded(), Sharpen(), ckpt_path=tmp_path / "run.ckpt", default_root_dir=tmp_path / folder)
    again = read_events(tmp_path / "a" / EVENTS_NAME)
    assert again[: len(before)] == before
    assert [event["kind"] for event in again[len(before) :]] == ["resume"]
    assert again[-1]["step"] == 14
    other = read_events(tmp_path / "b" / EVENTS_NAME)
    told = [
        [{**event, "time": None} for event in found if event["kind"] in ("alarm", "clip")]
        for found in (before, other)
    ]
    assert told[0] == told[1]


def test_two_runs_with_a_logger_have_two_files(tmp_path: Path) -> None:
    for _ in range(2):
        trainer = models.trainer(
            [QKClip(1e-3)], max_steps=2, logger=CSVLogger(tmp_path), default_root_dir=tmp_path
        )
        trainer.fit(models.Job(), models.tokens())
    files = sorted(tmp_path.rglob(EVENTS_NAME))
    assert [path.parent.name for path in files] == ["version_0", "version_1"]
    assert all([event["kind"] for event in read_events(path)] == ["start", "clip", "clip"] for path in files)


def test_the_first_nan(tmp_path: Path) -> None:
    class Break(Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                # Queries of the third head of the second layer.
                pl_module.inner["network"].transformer.h[1].attn.c_attn.weight[:, 16:24] = torch.nan

    monitors: list[Callback] = [Break(), AttentionMonitor(report=False), QKSpectrumMonitor(report=False)]
    trainer = models.trainer(monitors, max_steps=4, default_root_dir=tmp_path)
    trainer.fit(models.Job(), models.tokens())
    spectrum, attention = sorted(events(tmp_path, "non-finite"), key=lambda event: event["step"])
    assert (spectrum["source"], spectrum["step"], spectrum["where"]) == (
        "QKSpectrumMonitor",
        1,
        "layer_01/head_02",
    )
    assert (attention["source"], attention["step"]) == ("AttentionMonitor", 2)


def test_what_is_left_out_and_what_was_capped(tmp_path: Path) -> None:
    cap = UpdateCap(1e-6, modules="*.0.*")
    monitor = AttentionMonitor(modules="nothing", report=False)
    trainer = models.trainer([cap, monitor], max_steps=2, default_root_dir=tmp_path)
    trainer.fit(models.Job(), models.tokens())
    (skipped,) = events(tmp_path, "skipped")
    assert skipped["source"] == "AttentionMonitor"
    assert "to match at least one attention layer" in skipped["message"]
    (capped,) = events(tmp_path, "cap")
    assert (capped["where"], capped["threshold"]) == ("layer_00", 1e-6)
    assert capped["value"] > 1e-6


def test_a_healthy_run_has_no_file(tmp_path: Path) -> None:
    fit(CollapseGuard(every_n_steps=1), AttentionMonitor(report=False), steps=3, default_root_dir=tmp_path)
    assert not (tmp_path / EVENTS_NAME).exists()


def test_a_fault_in_writing_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / EVENTS_NAME).mkdir()
    trainer = models.trainer([QKClip(1e-3)], max_steps=3, default_root_dir=tmp_path)
    with pytest.warns(
        UserWarning, match="events could not be written to .*: they wait for the next one"
    ) as said:
        trainer.fit(models.Job(), models.tokens())
    assert len([one for one in said if "events could not be written" in str(one.message)]) == 1
    assert trainer.global_step == 3


def test_the_first_rank_alone_writes(tmp_path: Path) -> None:
    class Rank(SimpleNamespace):
        __hash__ = object.__hash__

    for rank in (1, 0):
        state = SimpleNamespace(fn="fit")
        trainer = Rank(is_global_zero=not rank, fast_dev_run=False, state=state, logger=None)
        trainer.default_root_dir = str(tmp_path)
        write_events(trainer, [Event(1, "note", "a test", "a sentence")])
        assert (tmp_path / EVENTS_NAME).exists() == (rank == 0)


def test_tries_and_tests_leave_no_file(tmp_path: Path) -> None:
    trainer = models.trainer([QKClip(1e-3)], fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(models.Job(), models.tokens())
    assert not list(tmp_path.rglob(EVENTS_NAME))
