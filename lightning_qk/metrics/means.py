"""Means of every head of a model as a metric."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class HeadMeans(Metric):
    """Pooled means of some statistics, for every head.

    Accumulates totals and weights over calls, and over ranks when it is computed.

    Args:
        heads: layer name → number of query heads, in the model's order.
        statistics: names of what is averaged.

    Attributes:
        counted: what the newest values were divided by, over ranks, ``(len(statistics), sum(heads))``; 0 where
            nothing was counted. None before :meth:`compute`.

    States:
        total, weight: shape ``(len(statistics), sum(heads))``, summed over ranks.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    weight: Tensor

    def __init__(self, heads: Mapping[str, int], statistics: Sequence[str]) -> None:
        super().__init__()
        self.heads = dict(heads)
        self.statistics = tuple(statistics)
        self.counted: Tensor | None = None
        self._slices: dict[str, slice] = {}
        start = 0
        for name, count in self.heads.items():
            self._slices[name] = slice(start, start + count)
            start += count
        for state in ("total", "weight"):
            self.add_state(state, torch.zeros(len(self.statistics), start), dist_reduce_fx="sum")

    def update(self, sums: Mapping[str, Sequence[Any]]) -> None:
        """Add attention calls.

        Args:
            sums: layer name → the additive form of each call of the layer, of shape ``(..., batch, heads)``.

        Raises:
            ValueError: a layer that the metric was not built for, or with another number of heads.
        """
        for name, calls in sums.items():
            for call in calls:
                if name not in self._slices or call.total.shape[-1] != self.heads[name]:
                    raise ValueError(
                        f"expected sums of one of {list(self.heads.items())[:3]}..., got {name!r} with "
                        f"{call.total.shape[-1]} heads: build the metric from the layers that are captured"
                    )
        if sums and all(len(sums.get(name, ())) == 1 for name in self.heads):
            self._add_all([sums[name][0] for name in self.heads])
            return
        for name, calls in sums.items():
            for call in calls:
                self._add(self._slices[name], call)

    def _add_all(self, calls: Sequence[Any]) -> None:
        """Add one call of every layer, all heads at once."""
        for part in calls[0]._fields:
            state, columns = getattr(self, part), [getattr(call, part) for call in calls]
            reduce = _reduce_maximum if part == "maximum" else _reduce_sum
            new = torch.cat([reduce(column) for column in columns], -1)[:, 0].to(state)
            state.copy_(torch.maximum(state, new) if part == "maximum" else state + new)

    def _add(self, where: slice, call: Any) -> None:
        for part, value in call._asdict().items():
            state = getattr(self, part)
            if part != "maximum":
                state[:, where] += value.sum(1).to(state)
            elif value.shape[1]:
                state[:, where] = torch.maximum(state[:, where], value.amax(1).to(state))

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget what was seen of some layers; of those that it does not have there is nothing to forget."""
        for name in self.heads.keys() & set(names):
            for state in self._defaults:
                getattr(self, state)[:, self._slices[name]] = -torch.inf if state == "maximum" else 0.0

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of one statistic by layer, each of shape ``(heads,)``."""
        return dict(zip(self.heads, flat.split(list(self.heads.values())), strict=True))

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all heads, flat, shape ``(sum(heads),)``; NaN where nothing was counted."""
        self.counted = self.weight
        return dict(zip(self.statistics, self.total / self.weight, strict=True))


def _reduce_sum(part: Tensor) -> Tensor:
    """Over sequences, which stay as one."""
    return part if part.shape[1] == 1 else part.sum(1, keepdim=True)


def _reduce_maximum(part: Tensor) -> Tensor:
    if part.shape[1] == 0:
        return part.new_full((part.shape[0], 1, part.shape[2]), -torch.inf)
    return part if part.shape[1] == 1 else part.amax(1, keepdim=True)
