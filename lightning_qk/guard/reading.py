"""What a detector is shown at one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """Where in a model a number was taken.

    Attributes:
        layer: qualified name of the attention layer.
        head: index of the query head; None for a number of the whole layer.
    """

    layer: str
    head: int | None = None

    def __str__(self) -> str:
        return self.layer if self.head is None else f"head {self.head} of {self.layer}"


@dataclass(frozen=True)
class Reading:
    """Numbers of one step, the same on every rank.

    Attributes:
        step: the optimizer step.
        losses: training loss of each optimizer step since the last reading, oldest first.
        values: statistic → one number a place, on the CPU; NaN where a place has none.
        places: statistic's group (what stands before the ``/``) → where its numbers were taken.
    """

    step: int
    losses: Sequence[float] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)
    places: Mapping[str, Sequence[Place]] = field(default_factory=dict)

    def place(self, statistic: str, index: int) -> Place:
        """Where a number of a statistic was taken."""
        return self.places[statistic.split("/", 1)[0]][index]
