"""Per-head QK-eigenspectra as a metric."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.functional.propagation import signal_propagation_probability
from lightning_qk.functional.spectrum import (
    MOMENTS,
    Support,
    qk_eigenvalues,
    qk_moments,
    qk_singular_values,
)
from lightning_qk.heads.batch import stack_layers
from lightning_qk.heads.projections import HeadProjections

SPECTRUM_STATISTICS = (*MOMENTS, "propagation", "localization", "spectral_radius", "singular_max")

# Relative positions at which propagation is predicted: midpoints of ten equal parts of [0, 1].
_THETA = torch.linspace(0.05, 0.95, 10)


class QKSpectrum(Metric):
    """Moments and extreme eigenvalues of ``W_QK`` of every head of a model.

    Beside the entries of :func:`~lightning_qk.functional.qk_moments`:

    - ``propagation``: predicted signal propagation probability, averaged over relative positions, with the
      layer's softmax scale and tokens of identity covariance. ½ while no head saturates, to 0 as it does.
    - ``localization``: the same averaged over the later half of the positions minus over the earlier half: 1
      where only late tokens pass signal, −1 where only early ones do, 0 uniform or saturated.
    - ``spectral_radius``: largest modulus of an eigenvalue.
    - ``singular_max``: largest singular value, for cross-attention, whose eigenvalues mean nothing: there it
      is the only entry and the others are NaN; NaN for self-attention.

    Args:
        heads: layer name → number of query heads, in the model's order.
        support: what the spectrum is averaged over, see :func:`~lightning_qk.functional.qk_moments`.

    States:
        total: sum over updates, shape ``(len(SPECTRUM_STATISTICS), sum(heads))``.
        updates: how many updates; both are summed over ranks, so that the value is the mean over ranks.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    updates: Tensor

    def __init__(self, heads: Mapping[str, int], support: Support = "model") -> None:
        super().__init__()
        self.heads = dict(heads)
        self.support: Support = support
        size = (len(SPECTRUM_STATISTICS), sum(self.heads.values()))
        self.add_state("total", torch.zeros(size), dist_reduce_fx="sum")
        self.add_state("updates", torch.zeros(()), dist_reduce_fx="sum")
        self.eigenvalues: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, projections: Mapping[str, HeadProjections]) -> None:
        """Add the spectra of the weights as they are now.

        Args:
            projections: what :func:`~lightning_qk.head_projections` returned, with the layers that the
                metric was built for. Their newest eigenvalues are kept in :attr:`eigenvalues`: layer name →
                complex ``(heads, d_head)``.
        """
        rows = {name: torch.full((0,), torch.nan) for name in self.heads}
        bilinear = {name: head for name, head in projections.items() if head.self_attention}
        for batch in stack_layers(bilinear):
            moments = qk_moments(batch.query, batch.key, support=self.support)
            scale = batch.scaling[:, None]
            propagation = signal_propagation_probability(
                _THETA.to(scale)[:, None, None],
                scale * moments["trace"],
                scale.square() * moments["trace_sq"],
                scale.square() * moments["frobenius_sq"],
            )
            early, late = (part.mean(0) for part in propagation.chunk(2))
            eigenvalues = qk_eigenvalues(batch.query, batch.key)
            radius = eigenvalues.abs()[..., 0]
            nothing = torch.full_like(radius, torch.nan)
            predicted = ((early + late) / 2, late - early)
            values = torch.stack([*(moments[name] for name in MOMENTS), *predicted, radius, nothing])
            for index, name in enumerate(batch.names):
                rows[name] = values[:, index]
                self.eigenvalues[name] = eigenvalues[index]
        for batch in stack_layers({name: head for name, head in projections.items() if name not in bilinear}):
            largest = qk_singular_values(batch.query, batch.key)[..., 0]
            for index, name in enumerate(batch.names):
                rows[name] = torch.full((len(SPECTRUM_STATISTICS), self.heads[name]), torch.nan)
                rows[name][-1] = largest[index]
        self.total += torch.cat([rows[name].to(self.total) for name in self.heads], dim=-1)
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all heads, flat, shape ``(sum(heads),)``."""
        return dict(zip(SPECTRUM_STATISTICS, self.total / self.updates, strict=True))
