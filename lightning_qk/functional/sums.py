"""Additive form of means of every head."""

from typing import NamedTuple

from torch import Tensor


class MeanSums(NamedTuple):
    """Totals and what they are divided by: added over sequences, calls and ranks, they give pooled means.

    Attributes:
        total: shape ``(statistics, batch, heads)``.
        weight: same shape; 0 where nothing was counted.
    """

    total: Tensor
    weight: Tensor

    def means(self, *, per_sequence: bool) -> Tensor:
        """Shape ``(statistics, batch, heads)``, or ``(statistics, heads)`` over the sequences; NaN of nothing."""
        if per_sequence:
            return self.total / self.weight
        return self.total.sum(1) / self.weight.sum(1)
