"""Values of probes as a metric."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_qk.metrics.means import HeadMeans


class ProbeMeans(HeadMeans):
    """Mean of each probe's values per head over batches, and over ranks when it is computed.

    Args:
        heads: layer name → number of heads, in the model's order.
        statistics: names of the values.
    """

    def update(self, statistic: str, values: Mapping[str, Tensor]) -> None:  # type: ignore[override]
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
            self.weight[row, where] += known.to(self.weight)
