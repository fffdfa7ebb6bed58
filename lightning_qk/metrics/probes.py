"""Values of probes as a metric."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class ProbeMeans(Metric):
    """Mean of each probe's values per head over batches, and over ranks when it is computed.

    Args:
        heads: layer name → number of heads, in the model's order.
        statistics: names of the values.

    States:
        total, count: shape ``(len(statistics), sum(heads))``, summed over ranks.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, heads: Mapping[str, int], statistics: Sequence[str]) -> None:
        super().__init__()
        self.heads = dict(heads)
        self.statistics = tuple(statistics)
        self._slices: dict[str, slice] = {}
        start = 0
        for name, count in self.heads.items():
            self._slices[name] = slice(start, start + count)
            start += count
        for state in ("total", "count"):
            self.add_state(state, torch.zeros(len(self.statistics), start), dist_reduce_fx="sum")

    def update(self, statistic: str, values: Mapping[str, Tensor]) -> None:
        """Add the values of one batch.

        Args:
            statistic: one of the metric's.
            values: layer → ``(heads,)``; NaN is left out of the mean.

        Raises:
            ValueError: another statistic or layer, or another number of heads.
        """
        for name, value in values.items():
            where = self._slices.get(name)
            if statistic not in self.statistics or where is None or value.numel() != self.heads[name]:
                raise ValueError(
                    f"expected one of {self.statistics} for layers {list(self.heads.items())[:3]}..., got "
                    f"{statistic!r} for {name!r} with {value.numel()} heads: build the metric from what is probed"
                )
            row = self.statistics.index(statistic)
            value = value.reshape(-1).to(self.total)
            known = ~value.isnan()
            self.total[row, where] += torch.where(known, value, 0.0)
            self.count[row, where] += known.to(self.count)

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all heads, flat, shape ``(sum(heads),)``; NaN where no batch had one."""
        return dict(zip(self.statistics, self.total / self.count, strict=True))
