"""Pictures that are drawn while training goes on."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_qk import AttentionMonitor, QKSpectrumMonitor
from lightning_qk.callbacks.monitors import _drawing as _monitor
from lightning_qk.loggers import pictures as module
from lightning_qk.loggers.pictures import Pictures


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lightning-qk-pictures")]


def test_training_goes_on_while_they_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_draw, drawn_in, steps_before = threading.Event(), set(), []
    draw = _monitor._draw_heatmap

    def slow(*args: Any) -> bytes:
        drawn_in.add(threading.current_thread() is threading.main_thread())
        assert may_draw.wait(30)
        return draw(*args)

    class Steps(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if not may_draw.is_set():
                steps_before.append(trainer.global_step)
            if trainer.global_step == 3:
                may_draw.set()

    monkeypatch.setattr(_monitor, "_draw_heatmap", slow)
    board = TensorBoardLogger(tmp_path)
    monitor = AttentionMonitor(every_n_steps=2, figures_every=1, report=False)
    trainer = models.trainer([monitor, Steps()], max_steps=6, logger=board)
    trainer.fit(models.Job(), models.tokens())
    assert steps_before == [1, 2, 3]
    assert drawn_in == {False}
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("attn/heatmap/distance")] == [1, 3, 5]
    assert threads() == []


def test_nothing_is_drawn_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> bytes:
        raise AssertionError("drawn for a logger that shows no images")

    monkeypatch.setattr(_monitor, "_draw_heatmap", never)
    monitor = QKSpectrumMonitor(figures_every=1, report=False)
    models.trainer([monitor], logger=CSVLogger(tmp_path)).fit(models.Job(), models.tokens())
    assert monitor.notes == []
    assert threads() == []


def test_drawing_that_fails_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("no font")

    monkeypatch.setattr(_monitor, "_draw_heatmap", fail)
    monitor = QKSpectrumMonitor(figures_every=1, report=False)
    trainer = models.trainer([monitor], logger=TensorBoardLogger(tmp_path))
    trainer.fit(models.Job(), models.tokens())
    assert trainer.global_step == 4
    assert monitor.notes[0] == (
        "drawing failed once (RuntimeError: no font); it is tried again, and training goes on"
    )
    assert len(set(monitor.notes)) == len(monitor.notes) <= 2  # the second one says that it was given up
    assert threads() == []


def test_the_thread_ends_with_the_last_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, bytes, int]] = []
    monkeypatch.setattr(module, "log_png", lambda _, key, png, step: logged.append((key, png, step)))
    first, second, trainer = Pictures(), Pictures(), SimpleNamespace()
    first.draw("a", 1, lambda: b"1")
    second.draw("b", 1, lambda: b"2")
    assert len(threads()) == 1
    first.log(trainer)  # type: ignore[arg-type]
    assert len(threads()) == 1
    second.log(trainer)  # type: ignore[arg-type]
    first.log(trainer)  # type: ignore[arg-type]
    assert threads() == []
    assert logged == [("a", b"1", 1), ("b", b"2", 1)]
