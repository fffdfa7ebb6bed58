"""The report while a run goes on: record and page are rewritten in a thread, off the training's way."""

import copy
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_qk.callbacks._trainer import logging_step
from lightning_qk.callbacks.monitors._report import RECORD_NAME, REPORT_NAME, gather
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.snapshots import Snapshots

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_EVERY = 30.0
"""Seconds. A run of hours has its page soon, and ``benchmarks/live_report.py`` measures what the writing costs."""
_SHARE = 0.05
"""Of the time, at most this share is spent writing: a large page on a slow disk comes less often."""


class LivePage:
    """Rewrites a run's record and report from time to time; one write at a time.

    The training's thread gathers the record, which copies lists of tensors and no tensor; a thread of its own
    does the rest. What fails there is raised by the next :meth:`rewrite`.

    Args:
        every: seconds between the beginnings of two writes, at least.
        clock: seconds, for tests.
    """

    def __init__(self, every: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self._clock = every, clock
        self._thread: threading.Thread | None = None
        self._next = -float("inf")
        self._error: Exception | None = None

    @classmethod
    def as_asked(cls, asked: Iterable[float | None]) -> "LivePage":
        """As often as the monitors of a run ask for it; None has no opinion."""
        return cls(min((every for every in asked if every is not None), default=_EVERY))

    def keep(self, trainer: "Trainer", pl_module: "LightningModule", folder: Path) -> None:
        """Rewrite where it is time, and nothing is being written.

        Raises:
            Exception: what failed in the write before.
        """
        if not self.every or self.is_busy or self._clock() < self._next:
            return
        is_first = self._thread is None
        self.rewrite(trainer, pl_module, folder)
        if is_first and self._thread is not None:
            rank_zero_info(
                f"lightning-qk: report, while the run goes on: {folder / REPORT_NAME} (on another machine: "
                f"lightning-qk watch {folder})"
            )

    def rewrite(self, trainer: "Trainer", pl_module: "LightningModule", folder: Path) -> None:
        """Begin to write what there is.

        Raises:
            Exception: what failed in the write before.
        """
        error, self._error = self._error, None
        self._next = max(self._next, self._clock() + self.every)
        if error is not None:
            raise error
        # Lightning counts a step after its last hook.
        record = frozen(gather(trainer, pl_module, "running", logging_step(trainer) + 1))
        if not any(len(history) for history in record.histories.values()):
            return
        self.start(record, folder)

    @property
    def is_busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, record: RunRecord, folder: Path) -> None:
        """Begin to write a record that nothing changes any more."""
        # No process waits for it at its end; the one that trains does, in close().
        self._thread = threading.Thread(
            target=self._write, args=(record, folder), name="lightning-qk-report", daemon=True
        )
        self._thread.start()

    def _write(self, record: RunRecord, folder: Path) -> None:
        begin = self._clock()
        try:
            from lightning_qk.report.report import write_report

            # A run that is killed leaves its record.
            record.save(folder / RECORD_NAME)
            write_report(record, folder / REPORT_NAME, live=True)
        except Exception as error:
            self._error = error
        self._next = begin + max(self.every, (self._clock() - begin) / _SHARE)

    def close(self) -> None:
        """Wait for a write that goes on: an older page may not come after the last one."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()


def frozen(record: RunRecord) -> RunRecord:
    """A record that does not change with the monitors it came from; tensors are shared, which nothing changes."""
    still = copy.copy(record)
    still.histories = {name: _frozen(history) for name, history in record.histories.items()}
    still.snapshots = {
        kind: Snapshots.from_state_dict(kept.state_dict()) for kind, kept in record.snapshots.items()
    }
    for name in ("eigenvalues", "shapes", "points", "scalars", "info"):
        setattr(still, name, dict(getattr(record, name)))
    still.events, still.notes = list(record.events), list(record.notes)
    return still


def _frozen(history: History) -> History:
    still = copy.copy(history)
    still.steps, still.states = list(history.steps), list(history.states)
    still.values = {name: list(column) for name, column in history.values.items()}
    still.reasons, still.forgotten = dict(history.reasons), None
    return still
