"""What is too large to keep of every step: tensors of each layer at a few steps, spread over the run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Snapshots:
    """Tensors of each layer at a few steps: the first, the newest, and some between.

    Of more than ``max_points``, the one with the closest neighbours is dropped, so that the rest stay spread over
    the run. Memory is bounded.

    Args:
        max_points: how many steps to keep, at least 2.

    Attributes:
        steps: the kept steps, in order.
        values: layer label → tensor, one dict a kept step.
    """

    def __init__(self, max_points: int = 4) -> None:
        if max_points < 2:
            raise ValueError(
                f"expected max_points of at least 2, got {max_points}: pass how many steps to keep"
            )
        self.max_points = max_points
        self.steps: list[int] = []
        self.values: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keep a step; one that is kept already is overwritten, and later ones are forgotten.

        Args:
            step: the logger's step.
            values: layer label → tensor, taken to the CPU; it must not be written into afterwards.
        """
        step = int(step)
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append({label: value.detach().cpu() for label, value in values.items()})
        if len(self.steps) > self.max_points:
            inner = range(1, len(self.steps) - 1)
            index = min(inner, key=lambda i: self.steps[i + 1] - self.steps[i - 1])
            del self.steps[index], self.values[index]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "max_points": self.max_points,
            "steps": list(self.steps),
            "values": [dict(values) for values in self.values],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Snapshots":
        """What :meth:`state_dict` described."""
        snapshots = cls(state["max_points"])
        snapshots.steps = [int(step) for step in state["steps"]]
        snapshots.values = [dict(values) for values in state["values"]]
        return snapshots
