"""What callbacks leave of events: curves and sentences in the report, and lines in the run's file of events."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lightning_qk.callbacks._trainer import own_run_directory, say
from lightning_qk.record.events import EVENTS_NAME, Event, EventFile
from lightning_qk.record.history import History, RunRecord

_files: "WeakKeyDictionary[Any, EventFile]" = WeakKeyDictionary()
resumed_steps: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()
"""Trainer → step of the checkpoint that its fit goes on from."""


def write_events(trainer: Any, events: Iterable[Event]) -> None:
    """Append events to the file of a fit's run, on rank zero. Nothing raises: what cannot be written is said once.

    Args:
        trainer: the trainer; None where it is gone.
        events: what happened. Those that are in the file already are left out.
    """
    if trainer is None:
        return
    with suppress(Exception):  # no event is worth the training
        if not trainer.is_global_zero or trainer.fast_dev_run or trainer.state.fn != "fit":
            return
        file = _files.get(trainer)
        if file is None:
            path = Path(own_run_directory(trainer)) / EVENTS_NAME
            file = _files[trainer] = EventFile(path, resumed_steps.get(trainer))
        before = file.problem
        file.add(events)
        if file.problem is not None and before is None:
            say(f"events could not be written to {file.path} ({file.problem}): they wait for the next one")


class EventLog:
    """Curves and events of one callback, bounded however long the run.

    Attributes:
        curves: run-level numbers at logged steps, thinned as every history.
        kept: the events, oldest first; of those after :attr:`MAX_EVENTS` only the number is kept.
    """

    MAX_EVENTS = 100

    def __init__(self) -> None:
        self.curves = History(["run"], [1])
        self.kept: list[Event] = []
        self._left_out = 0

    def add_points(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        self.curves.append(step, {name: torch.tensor([float(value)]) for name, value in values.items()})

    @property
    def events(self) -> list[tuple[int, str]]:
        """Step and sentence of each event that is kept."""
        return [(event.step, event.message) for event in self.kept]

    def add_event(self, event: Event) -> None:
        """Add an event."""
        if len(self.kept) < self.MAX_EVENTS:
            self.kept.append(event)
        else:
            self._left_out += 1

    def contribute(self, record: RunRecord) -> None:
        """Add curves and events to a run's record."""
        for name in self.curves.statistics:
            column = self.curves.series(name)[:, 0].tolist()
            points = [
                point for point in zip(self.curves.steps, column, strict=True) if math.isfinite(point[1])
            ]
            if points:
                steps, values = zip(*points, strict=True)
                record.scalars[name] = (list(steps), list(values))
        record.events += self.events
        if self._left_out:
            record.events.append((self.kept[-1].step, f"{self._left_out} more events of this kind followed"))
        record.events.sort(key=lambda event: event[0])

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        return {
            "curves": self.curves.state_dict(),
            "events": [event.state_dict() for event in self.kept],
            "untold": self._left_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was; nothing where a version without event logs wrote it."""
        if state:
            self.curves = History.from_state_dict(state["curves"])
            self.kept = [Event.from_state(one) for one in state["events"]]
            self._left_out = state["untold"]
