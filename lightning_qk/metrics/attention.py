"""Per-head attention statistics as a metric."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.functional.localization import EXTREMES, MEAN_STATISTICS, AttentionSums, finish


class AttentionStatistics(Metric):
    """Pooled attention statistics of every head of a model.

    Accumulates the additive form of the statistics over micro-batches, and over ranks when it is computed:
    means weigh every query row (every sequence, for ``sink_rate``) the same wherever it was seen, and maxima
    are maxima over all.

    Args:
        heads: layer name → number of query heads, in the model's order.

    States:
        total, weight, variance: shape ``(len(MEAN_STATISTICS), sum(heads))``, summed over ranks.
        maximum: shape ``(len(EXTREMES), sum(heads))``, maximum over ranks.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    weight: Tensor
    variance: Tensor
    maximum: Tensor

    def __init__(self, heads: Mapping[str, int]) -> None:
        super().__init__()
        self.heads = dict(heads)
        self._slices: dict[str, slice] = {}
        start = 0
        for name, count in self.heads.items():
            self._slices[name] = slice(start, start + count)
            start += count
        for state in ("total", "weight", "variance"):
            self.add_state(state, torch.zeros(len(MEAN_STATISTICS), start), dist_reduce_fx="sum")
        self.add_state("maximum", torch.full((len(EXTREMES), start), -torch.inf), dist_reduce_fx="max")

    def update(self, sums: Mapping[str, Sequence[AttentionSums]]) -> None:
        """Add attention calls.

        Args:
            sums: layer name → what :func:`~lightning_qk.functional.localization.attention_sums` returned for
                each call of the layer.

        Raises:
            ValueError: a layer that the metric was not built for, or with another number of heads.
        """
        for name, calls in sums.items():
            where = self._slices.get(name)
            for call in calls:
                if where is None or call.total.shape[-1] != self.heads[name]:
                    raise ValueError(
                        f"expected sums of one of {list(self.heads.items())[:3]}..., got {name!r} with "
                        f"{call.total.shape[-1]} heads: build the metric from the layers that are captured"
                    )
                self.total[:, where] += call.total.sum(1).to(self.total)
                self.weight[:, where] += call.weight.sum(1).to(self.weight)
                self.variance[:, where] += call.variance.sum(1).to(self.variance)
                self.maximum[:, where] = torch.maximum(
                    self.maximum[:, where], call.maximum.amax(1).to(self.maximum)
                )

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of one statistic by layer, each of shape ``(heads,)``."""
        return {name: flat[where] for name, where in self._slices.items()}

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all heads, flat, shape ``(sum(heads),)``, and ``<name>_se``.

        NaN for a head that no row was seen of.
        """
        return finish(
            AttentionSums(self.total, self.weight, self.variance, self.maximum), standard_errors=True
        )
