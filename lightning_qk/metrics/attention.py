"""Per-head attention statistics as a metric."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_qk.functional.attention import EXTREMES, MEAN_STATISTICS, AttentionSums, finish
from lightning_qk.metrics.means import HeadMeans


class AttentionStatistics(HeadMeans):
    """Pooled attention statistics of every head of a model.

    Accumulates the additive form of the statistics (what
    :func:`~lightning_qk.functional.attention.attention_sums` returns) over micro-batches, and over ranks when
    it is computed: means weigh every query row (every sequence, for ``sink_rate``; every key, for ``key_norm``)
    the same wherever it was seen, and maxima are maxima over all.

    Args:
        heads: layer name → number of query heads, in the model's order.

    States:
        total, weight, variance: shape ``(len(MEAN_STATISTICS), sum(heads))``, summed over ranks.
        maximum: shape ``(len(EXTREMES), sum(heads))``, maximum over ranks.
    """

    variance: Tensor
    maximum: Tensor

    def __init__(self, heads: Mapping[str, int]) -> None:
        super().__init__(heads, MEAN_STATISTICS)
        self.add_state("variance", torch.zeros_like(self.total), dist_reduce_fx="sum")
        empty = torch.full((len(EXTREMES), self.total.shape[1]), -torch.inf)
        self.add_state("maximum", empty, dist_reduce_fx="max")

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all heads, flat, shape ``(sum(heads),)``, and ``<name>_se``.

        NaN for a head that no row was seen of.
        """
        self.counted = self.weight
        return finish(
            AttentionSums(self.total, self.weight, self.variance, self.maximum), standard_errors=True
        )
