"""What an intervention or a guard leaves in the report: curves of what it did, and sentences on single events."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from lightning_qk.record.history import History, RunRecord


class EventLog:
    """Curves and events of one callback, bounded however long the run.

    Attributes:
        curves: run-level numbers at logged steps, thinned as every history.
        events: step and sentence, oldest first; of those after :attr:`MAX_EVENTS` only the number is kept.
    """

    MAX_EVENTS = 100

    def __init__(self) -> None:
        self.curves = History(["run"], [1])
        self.events: list[tuple[int, str]] = []
        self._left_out = 0

    def add_points(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        self.curves.append(step, {name: torch.tensor([float(value)]) for name, value in values.items()})

    def add_event(self, step: int, sentence: str) -> None:
        """Add an event."""
        if len(self.events) < self.MAX_EVENTS:
            self.events.append((step, sentence))
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
            record.events.append((self.events[-1][0], f"{self._left_out} more events of this kind followed"))
        record.events.sort(key=lambda event: event[0])

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        return {"curves": self.curves.state_dict(), "events": list(self.events), "untold": self._left_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was; nothing where a version without event logs wrote it."""
        if state:
            self.curves = History.from_state_dict(state["curves"])
            self.events = [(int(step), str(sentence)) for step, sentence in state["events"]]
            self._left_out = state["untold"]
