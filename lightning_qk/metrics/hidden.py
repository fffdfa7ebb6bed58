"""Statistics of hidden states as a metric."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_qk.functional.hidden import HIDDEN_EXTREMES, HIDDEN_MEANS, HiddenSums, finish
from lightning_qk.metrics.means import HeadMeans


class HiddenStatistics(HeadMeans):
    """Pooled statistics of the hidden states of every layer of a model, as of one head each.

    Every sequence weighs the same wherever it was seen (every token for ``token_norm``, every number for
    ``massive_share``), over micro-batches, and over ranks when the metric is computed.

    Args:
        layers: their names, in the model's order.

    States:
        total, weight: shape ``(len(HIDDEN_MEANS), layers)``, summed over ranks.
        maximum: shape ``(len(HIDDEN_EXTREMES), layers)``, maximum over ranks.
    """

    maximum: Tensor

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__(dict.fromkeys(layers, 1), HIDDEN_MEANS)
        self.layers = tuple(layers)
        nothing = torch.full((len(HIDDEN_EXTREMES), len(self.layers)), -torch.inf)
        self.add_state("maximum", nothing, dist_reduce_fx="max")

    def update(self, sums: Mapping[str, HiddenSums]) -> None:  # type: ignore[override]
        """Add calls.

        Args:
            sums: layer name → what :func:`~lightning_qk.functional.hidden.hidden_sums` returned, or
                :func:`with_heads` of it.

        Raises:
            ValueError: a layer that the metric was not built for.
        """
        super().update({name: [with_heads(call)] for name, call in sums.items()})

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all layers, shape ``(layers,)``; NaN for a layer that nothing was seen of."""
        self.counted = self.weight
        return finish(HiddenSums(self.total, self.weight, self.maximum))


def with_heads(sums: HiddenSums) -> HiddenSums:
    """The same as sums of one head, parts ``(statistics, batch, 1)``."""
    return sums if sums.total.dim() == 3 else HiddenSums(*(part[..., None] for part in sums))
