"""Per-head QK-eigenspectra as a metric."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.functional.propagation import signal_propagation_probability
from lightning_qk.functional.spectrum import MOMENTS, Support, qk_moments_and_core, qk_singular_core
from lightning_qk.heads.batch import layer_batches
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.metrics.eigenvalues import Cores, solve

MOMENT_STATISTICS = (*MOMENTS, "propagation", "localization")
"""Statistics that follow from traces and norms."""

EXTREME_STATISTICS = ("spectral_radius", "singular_max")
"""Statistics that need an eigenproblem a head."""

SPECTRUM_STATISTICS = (*MOMENT_STATISTICS, *EXTREME_STATISTICS)

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
        eigenvalues: solve the eigenproblems in :meth:`update`. False leaves ``spectral_radius`` and
            ``singular_max`` out, and :attr:`cores` to solve elsewhere
            (:class:`~lightning_qk.metrics.eigenvalues.EigenvalueWorker`).

    Attributes:
        cores: the newest matrices that the spectra depend on.
        spectra: layer name → newest eigenvalues, complex ``(heads, d_head)``, or, of cross-attention,
            singular values. Empty with ``eigenvalues=False``.

    States:
        total: sum over updates, shape ``(len(statistics), sum(heads))``.
        updates: how many updates; both are summed over ranks, so that the value is the mean over ranks.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    updates: Tensor

    def __init__(
        self, heads: Mapping[str, int], support: Support = "model", *, eigenvalues: bool = True
    ) -> None:
        super().__init__()
        self.heads = dict(heads)
        self.support: Support = support
        self.eigenvalues = eigenvalues
        self.statistics = SPECTRUM_STATISTICS if eigenvalues else MOMENT_STATISTICS
        size = (len(self.statistics), sum(self.heads.values()))
        self.add_state("total", torch.zeros(size), dist_reduce_fx="sum")
        self.add_state("updates", torch.zeros(()), dist_reduce_fx="sum")
        self.cores: list[Cores] = []
        self.spectra: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, projections: Mapping[str, HeadProjections]) -> None:
        """Add the spectra of the weights as they are now.

        Args:
            projections: what :func:`~lightning_qk.head_projections` returned, or a
                :class:`~lightning_qk.heads.reader.ProjectionReader`, with the layers that the metric was
                built for.
        """
        rows = {
            name: torch.full((len(MOMENT_STATISTICS), count), torch.nan) for name, count in self.heads.items()
        }
        self.cores = []
        layers = projections.layers if isinstance(projections, ProjectionReader) else projections
        bilinear = [name for name, layer in layers.items() if layer.self_attention]
        for batch in layer_batches(projections, bilinear):
            moments, core = qk_moments_and_core(batch.query, batch.key, support=self.support)
            scale = batch.scaling[:, None]
            propagation = signal_propagation_probability(
                _THETA.to(scale)[:, None, None],
                scale * moments["trace"],
                scale.square() * moments["trace_sq"],
                scale.square() * moments["frobenius_sq"],
            )
            early, late = (part.mean(0) for part in propagation.chunk(2))
            predicted = ((early + late) / 2, late - early)
            values = torch.stack([*(moments[name] for name in MOMENTS), *predicted])
            rows.update(zip(batch.names, values.unbind(1), strict=True))
            self.cores.append(Cores(batch.names, core, bilinear=True))
            del batch  # before the next one is gathered, where weights are sharded
        for batch in layer_batches(projections, [name for name in layers if name not in bilinear]):
            self.cores.append(Cores(batch.names, qk_singular_core(batch.query, batch.key), bilinear=False))
            del batch
        values = torch.cat([rows[name].to(self.total) for name in self.heads], dim=-1)
        if self.eigenvalues:
            self.spectra = solve(self.cores)
            extremes = extreme_values(self.spectra, self.heads)
            values = torch.cat([values, *(extremes[name].to(values)[None] for name in EXTREME_STATISTICS)])
        self.total += values
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all heads, flat, shape ``(sum(heads),)``."""
        return dict(zip(self.statistics, self.total / self.updates, strict=True))


def extreme_values(spectra: Mapping[str, Tensor], heads: Mapping[str, int]) -> dict[str, Tensor]:
    """Largest eigenvalues by modulus, and largest singular values, of all heads.

    Args:
        spectra: what :func:`~lightning_qk.metrics.eigenvalues.solve` returned.
        heads: layer name → number of query heads, in the model's order.

    Returns:
        Name in :data:`EXTREME_STATISTICS` → flat values, shape ``(sum(heads),)``; NaN where a layer has the
        other kind of spectrum or none.
    """
    out = {
        name: {layer: torch.full((n,), torch.nan) for layer, n in heads.items()}
        for name in EXTREME_STATISTICS
    }
    for layer, values in spectra.items():
        kind = "spectral_radius" if values.is_complex() else "singular_max"
        out[kind][layer] = values[..., 0].abs().to("cpu", torch.float32)
    return {name: torch.cat([layers[layer] for layer in heads]) for name, layers in out.items()}
