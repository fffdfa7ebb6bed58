"""Statistics of hidden states as a metric."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.functional.hidden import HIDDEN_EXTREMES, HIDDEN_MEANS, HiddenSums, finish


class HiddenStatistics(Metric):
    """Pooled statistics of the hidden states of every layer of a model.

    Every sequence weighs the same wherever it was seen (every token for ``token_norm``, every number for
    ``massive_share``), over micro-batches, and over ranks when the metric is computed.

    Args:
        layers: their names, in the model's order.

    Attributes:
        counted: what the newest means were divided by, over ranks, ``(len(HIDDEN_MEANS), layers)``; None before
            :meth:`compute`.

    States:
        total, weight: shape ``(len(HIDDEN_MEANS), layers)``, summed over ranks.
        maximum: shape ``(len(HIDDEN_EXTREMES), layers)``, maximum over ranks.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    statistics = HIDDEN_MEANS

    total: Tensor
    weight: Tensor
    maximum: Tensor

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.counted: Tensor | None = None
        self._places = {name: place for place, name in enumerate(self.layers)}
        for state in ("total", "weight"):
            self.add_state(state, torch.zeros(len(HIDDEN_MEANS), len(self.layers)), dist_reduce_fx="sum")
        nothing = torch.full((len(HIDDEN_EXTREMES), len(self.layers)), -torch.inf)
        self.add_state("maximum", nothing, dist_reduce_fx="max")

    def update(self, sums: Mapping[str, HiddenSums]) -> None:
        """Add calls.

        Args:
            sums: layer name → what :func:`~lightning_qk.functional.hidden.hidden_sums` returned.

        Raises:
            ValueError: a layer that the metric was not built for.
        """
        for name, call in sums.items():
            place = self._places.get(name)
            if place is None:
                raise ValueError(
                    f"expected hidden states of one of {list(self.layers[:3])}..., got {name!r}: build the metric "
                    "from the layers that are captured"
                )
            self.total[:, place] += call.total.sum(1).to(self.total)
            self.weight[:, place] += call.weight.sum(1).to(self.weight)
            if call.maximum.shape[1]:
                largest = call.maximum.amax(1).to(self.maximum)
                self.maximum[:, place] = torch.maximum(self.maximum[:, place], largest)

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget what was seen of some layers."""
        places = [self._places[name] for name in names]
        self.total[:, places] = 0.0
        self.weight[:, places] = 0.0
        self.maximum[:, places] = -torch.inf

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all layers, shape ``(layers,)``; NaN for a layer that nothing was seen of."""
        self.counted = self.weight
        return finish(HiddenSums(self.total, self.weight, self.maximum))
