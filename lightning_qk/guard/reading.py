"""The numbers of one step that detectors read, and running statistics of the newest."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
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
        places: statistic's group (the part before the ``/``) → where its numbers were taken.
    """

    step: int
    losses: Sequence[float] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)
    places: Mapping[str, Sequence[Place]] = field(default_factory=dict)

    def place(self, statistic: str, index: int) -> Place:
        """Where a number of a statistic was taken."""
        return self.places[statistic.split("/", 1)[0]][index]


_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class Window:
    """The newest rows of numbers, one column a place.

    Args:
        size: how many rows to keep, at least 2.
    """

    def __init__(self, size: int) -> None:
        if size < 2:
            raise ValueError(f"expected a window of at least 2 rows, got {size}: raise it")
        self.size = size
        self._rows: deque[Tensor] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, row: Tensor) -> None:
        """Add the newest row; rows of another width belong to another model and are forgotten."""
        row = row.detach().double().reshape(-1)
        if self._rows and self._rows[-1].shape != row.shape:
            self._rows.clear()
        self._rows.append(row)

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()

    def rows(self) -> Tensor:
        """Shape ``(rows, places)``, oldest first."""
        return torch.stack(list(self._rows))

    def median(self) -> Tensor:
        """Median of each column, NaN left out, shape ``(places,)``."""
        return self.rows().nanmedian(0).values

    def trend(self) -> tuple[Tensor, Tensor]:
        """Slope of each column per row, and its standard error, shape ``(places,)``.

        The slope is Theil's and Sen's: the median over all pairs of rows, so that one number that is far out
        changes little. Its error follows from the median absolute deviation of what the line leaves, as least
        squares would have it. Both are 0 with fewer than three rows.
        """
        rows = self.rows()
        count, places = rows.shape
        if count < 3:
            return torch.zeros(places).double(), torch.zeros(places).double()
        first, second = torch.triu_indices(count, count, 1)
        slope = ((rows[second] - rows[first]) / (second - first)[:, None]).nanmedian(0).values
        at = torch.arange(count).double()[:, None] - (count - 1) / 2
        left = rows - slope * at
        deviation = (left - left.nanmedian(0).values).abs().nanmedian(0).values
        error = _TO_SIGMA * deviation / at.square().sum().sqrt()
        return slope, error

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": list(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rows of a checkpoint."""
        self._rows = deque(state["rows"], maxlen=self.size)


def sure(slope: Tensor, error: Tensor) -> Tensor:
    """A slope of any shape, shrunk by two of its standard errors; 0 where they are larger."""
    return slope.sign() * (slope.abs() - 2 * error).clamp_min(0)


def median_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Median of some numbers, and its standard error from their median absolute deviation."""
    found = torch.tensor(list(values), dtype=torch.float64)
    centre = found.quantile(0.5)
    deviation = _TO_SIGMA * (found - centre).abs().quantile(0.5)
    # The median of a normal sample spreads by a factor of sqrt(pi / 2) more than its mean.
    return float(centre), float(1.2533 * deviation / len(found) ** 0.5)
