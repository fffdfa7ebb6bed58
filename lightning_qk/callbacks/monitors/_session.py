"""What the monitors of a fit do together: one measurement a step, and one report."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._guarded import GuardedHooks
from lightning_qk.callbacks._trainer import describe_error
from lightning_qk.callbacks.callback import MEASURES, Callback
from lightning_qk.callbacks.monitors._live import LivePage
from lightning_qk.callbacks.monitors._report import write_run
from lightning_qk.callbacks.monitors._round import Part, measure_together
from lightning_qk.callbacks.run_directory import run_directory


class Member(Protocol):
    """What a session asks of a monitor, see :class:`~lightning_qk.callbacks.monitors.Monitor`."""

    idle: bool
    report: bool
    report_every: float | None

    @property
    def gave_up(self) -> bool: ...
    def hook_failed(self, hook: str, error: Exception) -> None: ...
    def attempt(self, action: Callable[[], Any], what: str = ...) -> Any: ...
    def note(self, sentence: str) -> None: ...
    def end_step(self, trainer: Trainer) -> bool: ...
    def log_late(self, trainer: Trainer) -> None: ...
    def part(self, trainer: Trainer, pl_module: LightningModule) -> Part: ...


class Session(GuardedHooks, Callback):
    """Has the monitors of a fit measure together, once all of them have seen the end of a batch, and reports.

    It stands behind the monitors of a trainer, for one fit: what is shared by them within it is here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._members: list[Member] = []
        self._page: LivePage | None = None
        self._directory: str | None = None
        self._is_over = False

    @property
    def place(self) -> int:
        """Behind all monitors, before who judges by what they have measured."""
        return MEASURES

    def join(self, monitor: Member) -> None:
        """Take a monitor in, once."""
        if all(one is not monitor for one in self._members):
            self._members.append(monitor)

    def members(self, trainer: Trainer) -> list[Member]:
        """The monitors in the order of the trainer's callbacks."""
        own = set(map(id, self._members))
        return [one for one in trainer.callbacks if id(one) in own]  # type: ignore[attr-defined]

    def folder(self, trainer: Trainer) -> Path:
        """Where the report goes."""
        return Path(self._directory or trainer.default_root_dir)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on where the report goes; a collective call."""
        self._is_over = False
        self._directory = run_directory(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure once the optimizer has stepped, and rewrite the report where it is time; collective calls."""
        reporting = [one for one in measure_due(trainer, pl_module, self.members(trainer)) if one.report]
        if reporting and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            reporting[-1].attempt(lambda: self._rewrite(trainer, pl_module), "rewriting the report")

    def _rewrite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The report of the run up to now."""
        if self._page is None:
            self._page = LivePage.as_asked(one.report_every for one in self._members if one.report)
        self._page.keep(trainer, pl_module, self.folder(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report."""
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the report of what was seen until then."""
        self._finish(trainer, pl_module, exception)

    def _finish(
        self, trainer: Trainer, pl_module: LightningModule, ended_by: BaseException | None = None
    ) -> None:
        if not trainer.is_global_zero or self._is_over or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._is_over = True
        if self._page is not None:
            self._page.close()
        reporting = [one for one in self.members(trainer) if one.report]
        if not reporting:
            return
        try:
            write_run(trainer, pl_module, self.folder(trainer), reporting[-1].note, ended_by)
        except Exception as error:
            reporting[-1].note(f"the report could not be written ({describe_error(error)})")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer's callbacks as they were."""
        trainer.callbacks = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]

    def hook_failed(self, hook: str, error: Exception) -> None:
        """The monitors measure nothing more, and say so."""
        for monitor in self._members:
            monitor.hook_failed(hook, error)


def join_session(trainer: Trainer, monitor: Member) -> None:
    """Have a monitor measure and report with the others of its trainer; to be called in ``setup`` of a fit."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    session = next((one for one in callbacks if isinstance(one, Session)), None)
    if session is None:
        session = Session()
        trainer.callbacks = [*callbacks, session]  # type: ignore[attr-defined]
    session.join(monitor)


def measure_due(trainer: Trainer, pl_module: LightningModule, monitors: Iterable[Member]) -> list[Member]:
    """Measure and publish what is due of some monitors, where the optimizer has stepped; collective calls.

    Returns:
        The monitors that were due.
    """
    due = [monitor for monitor in monitors if not monitor.idle and monitor.end_step(trainer)]
    for monitor in due:
        monitor.log_late(trainer)
    parts = [monitor.part(trainer, pl_module) for monitor in due if not monitor.gave_up]
    if parts:
        measure_together(parts)
    return due
