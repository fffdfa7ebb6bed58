"""What the monitors of a fit do together: one measurement a step."""

from collections.abc import Iterable
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._guarded import GuardedHooks
from lightning_qk.callbacks.callback import MEASURES, Callback
from lightning_qk.callbacks.monitors._round import Part, measure_together


class Measured(Protocol):
    """What a session asks of a monitor, see :class:`~lightning_qk.callbacks.monitors.Monitor`."""

    idle: bool

    @property
    def gave_up(self) -> bool: ...
    def hook_failed(self, hook: str, error: Exception) -> None: ...
    def end_step(self, trainer: Trainer) -> bool: ...
    def log_late(self, trainer: Trainer) -> None: ...
    def part(self, trainer: Trainer, pl_module: LightningModule) -> Part: ...


class Session(GuardedHooks, Callback):
    """Has the monitors of a fit measure together, once all of them have seen the end of a batch.

    It stands behind the monitors of a trainer, for one fit.

    Attributes:
        monitors: of the fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.monitors: list[Measured] = []

    @property
    def place(self) -> int:
        """Behind all monitors, before who judges by what they have measured."""
        return MEASURES

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure once the optimizer has stepped; collective calls."""
        own = set(map(id, self.monitors))
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        measure_due(trainer, pl_module, [one for one in callbacks if id(one) in own])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer's callbacks as they were."""
        trainer.callbacks = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]

    def hook_failed(self, hook: str, error: Exception) -> None:
        """The monitors measure nothing more, and say so."""
        for monitor in self.monitors:
            monitor.hook_failed(hook, error)


def join_session(trainer: Trainer, monitor: Measured) -> None:
    """Have a monitor measure with the others of its trainer; to be called in ``setup`` of a fit."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    session = next((one for one in callbacks if isinstance(one, Session)), None)
    if session is None:
        session = Session()
        trainer.callbacks = [*callbacks, session]  # type: ignore[attr-defined]
    if all(one is not monitor for one in session.monitors):
        session.monitors.append(monitor)


def measure_due(trainer: Trainer, pl_module: LightningModule, monitors: Iterable[Measured]) -> None:
    """Measure and publish what is due of some monitors, where the optimizer has stepped; collective calls."""
    due = [monitor for monitor in monitors if not monitor.idle and monitor.end_step(trainer)]
    for monitor in due:
        monitor.log_late(trainer)
    parts = [monitor.part(trainer, pl_module) for monitor in due if not monitor.gave_up]
    if parts:
        measure_together(parts)
