"""Per-head QK-eigenspectra as a metric."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.functional.precision import full_precision
from lightning_qk.functional.propagation import signal_propagation_probability
from lightning_qk.functional.rotary import Rotary
from lightning_qk.functional.spectrum import (
    MOMENTS,
    Products,
    Support,
    qk_products,
    qk_singular_core,
    support_size,
)
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import ProjectionReader, layer_batches
from lightning_qk.metrics.eigenvalues import Cores, solve

MOMENT_STATISTICS = (*MOMENTS, "propagation", "localization")
"""Statistics that follow from traces and norms."""

EXTREME_STATISTICS = ("spectral_radius", "singular_max")
"""Statistics that need an eigenproblem a head."""

SPECTRUM_STATISTICS = (*MOMENT_STATISTICS, *EXTREME_STATISTICS)


def at_offset(name: str, offset: int) -> str:
    """Name of a statistic, or of a layer in what was solved, for keys some positions before their query."""
    return f"offset_{offset}/{name}"


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

    With ``offsets``, the moments and the spectral radius also of the form between a query and the key that many
    positions before it, ``W_q^T R_Δ W_k`` with Δ = −offset, as ``offset_16/eig_mean`` and so on: of layers with
    rotary position encoding, NaN for others.

    Args:
        heads: layer name → number of query heads, in the model's order.
        support: what the spectrum is averaged over, see :func:`~lightning_qk.functional.qk_moments`.
        offsets: how many positions keys are before their query; negative: after it.
        eigenvalues: solve the eigenproblems in :meth:`update`. False leaves ``spectral_radius`` and
            ``singular_max`` out, and :attr:`cores` to solve elsewhere
            (:class:`~lightning_qk.metrics.eigenvalues.EigenvalueWorker`).

    Attributes:
        cores: the newest matrices that the spectra depend on.
        spectra: layer name → newest eigenvalues, complex ``(heads, d_head)``, or, of cross-attention,
            singular values. Those at an offset under the name that :func:`at_offset` gives. Empty with
            ``eigenvalues=False``.

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
        self,
        heads: Mapping[str, int],
        support: Support = "model",
        *,
        offsets: Sequence[int] = (),
        eigenvalues: bool = True,
    ) -> None:
        super().__init__()
        self.heads = dict(heads)
        self.support: Support = support
        self.eigenvalues = eigenvalues
        self.offsets = tuple(offsets)
        moments = (*MOMENT_STATISTICS, *(at_offset(name, offset) for offset in offsets for name in MOMENTS))
        radii = (*EXTREME_STATISTICS, *(at_offset("spectral_radius", offset) for offset in offsets))
        self.statistics = (*moments, *radii) if eigenvalues else moments
        self._moments = len(moments)
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
        rows: dict[str, Tensor] = {}
        self.cores = []
        layers = projections.layers if isinstance(projections, ProjectionReader) else projections
        order = reading_order(layers)
        bilinear = [name for name in order if layers[name].self_attention]
        for batch in layer_batches(projections, bilinear):
            n = support_size(batch.query, self.support)
            products = qk_products(batch.query, batch.key)
            with full_precision(products.core.device):
                moments = products.moments(n)
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
                if missing := self._moments - len(values):
                    values = torch.cat([values, values.new_full((missing, *values.shape[1:]), torch.nan)])
                rows.update(zip(batch.names, values.unbind(1), strict=True))
                self.cores.append(Cores(batch.names, products.core, bilinear=True))
                self._add_offsets(batch.names, products, n, layers, rows)
            del batch, products  # before the next one is gathered, where weights are sharded
        for batch in layer_batches(projections, order[len(bilinear) :]):
            self.cores.append(Cores(batch.names, qk_singular_core(batch.query, batch.key), bilinear=False))
            del batch
        empty = self.total.new_full((self._moments, max(self.heads.values(), default=0)), torch.nan)
        columns = [rows.get(name, empty[:, :count]) for name, count in self.heads.items()]
        values = torch.cat(columns, dim=-1).to(self.total)
        if self.eigenvalues:
            self.spectra = solve(self.cores)
            extremes = extreme_values(self.spectra, self.heads, self.offsets)
            values = torch.cat([values, *(value.to(values)[None] for value in extremes.values())])
        self.total += values
        self.updates += 1

    def _add_offsets(
        self,
        names: tuple[str, ...],
        products: Products,
        n: int,
        layers: Mapping[str, LayerReader] | Mapping[str, HeadProjections],
        rows: dict[str, Tensor],
    ) -> None:
        """Moments and cores at each offset, of the layers of a batch that rotate."""
        if not self.offsets:
            return
        for rotary, places in _by_rotation(names, layers):
            own = Products(*(part[places] for part in products))
            for number, offset in enumerate(self.offsets):
                rotated = own.at(rotary, torch.full((), -offset, device=own.core.device))
                moments = rotated.moments(n)
                values = torch.stack([moments[name] for name in MOMENTS])
                start = len(MOMENT_STATISTICS) + number * len(MOMENTS)
                for place, row in zip(places, values.unbind(1), strict=True):
                    rows[names[place]][start : start + len(MOMENTS)] = row
                keys = tuple(at_offset(names[place], offset) for place in places)
                self.cores.append(Cores(keys, rotated.core, bilinear=True))

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all heads, flat, shape ``(sum(heads),)``."""
        return dict(zip(self.statistics, self.total / self.updates, strict=True))


def reading_order(layers: Mapping[str, LayerReader] | Mapping[str, HeadProjections]) -> list[str]:
    """Names in the order in which :meth:`QKSpectrum.update` reads them: self-attention first."""
    return sorted(layers, key=lambda name: not layers[name].self_attention)


def _by_rotation(
    names: Sequence[str], layers: Mapping[str, LayerReader] | Mapping[str, HeadProjections]
) -> Iterator[tuple[Rotary, list[int]]]:
    """Each rotation of some layers, and which of them it is that of; layers without one are left out."""
    found: dict[tuple[object, ...], tuple[Rotary, list[int]]] = {}
    for index, name in enumerate(names):
        rotary = layers[name].rotary
        if rotary is not None:
            # Layers share the buffer of their rotary module.
            key = (rotary.inv_freq.data_ptr(), rotary.inv_freq.shape, *rotary[1:])
            found.setdefault(key, (rotary, []))[1].append(index)
    yield from found.values()


def extreme_values(
    spectra: Mapping[str, Tensor], heads: Mapping[str, int], offsets: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Largest eigenvalues by modulus, and largest singular values, of all heads.

    Args:
        spectra: what :func:`~lightning_qk.metrics.eigenvalues.solve` returned.
        heads: layer name → number of query heads, in the model's order.
        offsets: those whose spectra were solved too.

    Returns:
        Name in :data:`EXTREME_STATISTICS` → flat values, shape ``(sum(heads),)``; NaN where a layer has the
        other kind of spectrum or none. Then the spectral radius at each offset.
    """
    nothing = torch.full((sum(heads.values()),), torch.nan).split(list(heads.values()))

    def of(kind: Callable[[str], Tensor | None]) -> Tensor:
        found = map(kind, heads)
        return torch.cat(
            [none if one is None else _largest(one) for none, one in zip(nothing, found, strict=True)]
        )

    def own(layer: str, is_bilinear: bool) -> Tensor | None:
        values = spectra.get(layer)
        return values if values is not None and values.is_complex() == is_bilinear else None

    out = {
        "spectral_radius": of(lambda layer: own(layer, True)),
        "singular_max": of(lambda layer: own(layer, False)),
    }
    for offset in offsets:
        out[at_offset("spectral_radius", offset)] = of(
            lambda layer, offset=offset: spectra.get(at_offset(layer, offset))  # type: ignore[misc]
        )
    return out


def _largest(values: Tensor) -> Tensor:
    """By modulus, which is the first."""
    return values[..., 0].abs().to("cpu", torch.float32)
