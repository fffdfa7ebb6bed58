"""Singular values of ``W_QK`` and of its updates, of every head of a model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_qk.functional.singular import effective_rank, energy_concentration, update_core
from lightning_qk.functional.spectrum import qk_singular_core
from lightning_qk.functional.updates import UPDATE_FORMS, rank_statistics, update_cores
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import ProjectionReader, layer_batches
from lightning_qk.metrics.eigenvalues import Cores

ENERGY_OF = (1, 4)
"""Number of leading directions in the concentration of energy."""

SINGULAR_STATISTICS = (
    "sigma_1",
    *(f"energy_top_{s}" for s in ENERGY_OF),
    "effective_rank",
    "logit_bound",
    "update_ratio",
)

UPDATE_STATISTICS = tuple(
    f"update_{form}_{name}"
    for form in UPDATE_FORMS
    for name in ("norm", "sigma_1", "stable_rank", "effective_rank")
)

_WHOLE, _CHANGE = "singular/", "change/"


class SingularValues:
    """Makes the small matrices of every layer, and statistics of what a worker solves of them.

    - ``sigma_1``: spectral norm of ``W_QK``.
    - ``energy_top_1``, ``energy_top_4``: see :func:`~lightning_qk.functional.energy_concentration`.
    - ``effective_rank``: see :func:`~lightning_qk.functional.effective_rank`.
    - ``logit_bound``: ``s σ₁ √(d_query d_key)`` with the softmax scale ``s``: the largest modulus that the content
      part of a logit can have for tokens of norm ``√d`` (what a norm without gain gives out), positions and biases
      left out.
    - ``update_ratio``: ``σ₁(ΔW_QK) / σ₁(W_QK)``, of the change since the weights that were remembered before, see
      :func:`~lightning_qk.functional.update_ratio`. The first ones have none.

    - with ``updates``, :data:`UPDATE_STATISTICS`: norm, spectral norm, stable and effective rank of that change's
      parts of first and of second order, ``Δ₂`` and ``Δ₃``, see
      :func:`~lightning_qk.functional.update_spectra`.

    Of weights that were read with the norm's gain folded in, all of this is that of the folded ones. A copy of all
    query and key weights is kept in the host's memory for the next change.

    Args:
        heads: layer name → number of query heads, in the model's order.
        values: compute :data:`SINGULAR_STATISTICS`.
        updates: compute :data:`UPDATE_STATISTICS`.
    """

    def __init__(self, heads: Mapping[str, int], *, values: bool = True, updates: bool = False) -> None:
        self.heads = dict(heads)
        self._has_values, self._has_updates = values, updates
        self.statistics = (*SINGULAR_STATISTICS * values, *UPDATE_STATISTICS * updates)
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._scales: dict[str, float] = {}
        # Step → spectral norms, of the two newest steps: changes are against the older one.
        self._norms: dict[int, dict[str, Tensor]] = {}

    def state_dict(self, *, weights: bool) -> dict[str, Any]:
        """What the next change is against.

        Args:
            weights: the copies of the weights too; without, :meth:`cores` has to be called with the same weights.
        """
        return {
            "before": {name: list(pair) for name, pair in self._before.items()} if weights else {},
            "norms": {step: dict(norms) for step, norms in self._norms.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was."""
        self._before = {name: (pair[0], pair[1]) for name, pair in state["before"].items()}
        self._norms = {int(step): dict(norms) for step, norms in state["norms"].items()}

    def forget(self) -> None:
        """The next call of :meth:`cores` has no change."""
        # Of no weights' shape; the state still tells that it is not to be read from what is loaded.
        nothing = torch.empty(0)
        self._before = dict.fromkeys(self._before, (nothing, nothing))

    def reading_order(self, layers: Iterable[str]) -> list[str]:
        """The layers among the given ones that :meth:`cores` reads, in its order."""
        return [name for name in layers if name in self.heads]

    @torch.no_grad()
    def cores(self, projections: Mapping[str, HeadProjections]) -> list[Cores]:
        """Matrices of the weights and of their change since the last call, to be solved.

        Args:
            projections: a :class:`~lightning_qk.heads.reader.ProjectionReader`, or what
                :func:`~lightning_qk.head_projections` returned. Sharded weights are gathered, a collective call.
        """
        found: list[Cores] = []
        layers: Mapping[str, LayerReader] | Mapping[str, HeadProjections] = projections
        if isinstance(projections, ProjectionReader):
            layers = projections.layers
        for batch in layer_batches(projections, self.reading_order(layers)):
            if self._has_values:
                widths = batch.query.shape[-1] * batch.key.shape[-1]
                self._scales |= {name: float(layers[name].scaling) * widths**0.5 for name in batch.names}
                names = tuple(_WHOLE + name for name in batch.names)
                found.append(Cores(names, qk_singular_core(batch.query, batch.key), bilinear=False))
            old = [self._before.get(name) for name in batch.names]
            # Copies on the host: what was remembered is not changed by an optimizer that writes in place.
            query, key = (weight.to("cpu", copy=True) for weight in (batch.query, batch.key))
            for place, name in enumerate(batch.names):
                self._before[name] = query[place], key[place]
            same = [
                place
                for place, pair in enumerate(old)
                if pair is not None
                and pair[0].shape == query[place].shape
                and pair[1].shape == key[place].shape
            ]
            if same:
                before = [pair for pair in (old[place] for place in same) if pair is not None]
                weights = (
                    batch.query[same],
                    batch.key[same],
                    torch.stack([pair[0] for pair in before]).to(batch.query.device),
                    torch.stack([pair[1] for pair in before]).to(batch.key.device),
                )
                changed = [batch.names[place] for place in same]
                changes = {_CHANGE: update_core(*weights)} if self._has_values else {}
                if self._has_updates:
                    changes |= zip(UPDATE_FORMS, update_cores(*weights), strict=True)
                found += [
                    Cores(tuple(prefix + name for name in changed), matrices, bilinear=False)
                    for prefix, matrices in changes.items()
                ]
            del batch  # before the next one is gathered, where weights are sharded
        return found

    def values(self, step: int, spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of one step.

        Args:
            step: the step of the weights. Steps come in order; one may come twice.
            spectra: what :func:`~lightning_qk.metrics.eigenvalues.solve` returned, with those of :meth:`cores`.

        Returns:
            Name in ``statistics`` → values of all heads, flat; NaN where there is none.
        """
        out = self._values(step, spectra) if self._has_values else {}
        if self._has_updates:
            out |= self._updates(spectra)
        return {name: torch.cat([part.float().cpu() for part in column]) for name, column in out.items()}

    def _updates(self, spectra: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        out: dict[str, list[Tensor]] = {name: [] for name in UPDATE_STATISTICS}
        for form in UPDATE_FORMS:
            for layer, count in self.heads.items():
                solved = spectra.get(form + layer)
                found = rank_statistics(torch.full((count, 1), torch.nan) if solved is None else solved)
                for name, value in found.items():
                    out[f"update_{form}_{name}"].append(value)
        return out

    def _values(self, step: int, spectra: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        solved = {name: spectra[_WHOLE + name] for name in self.heads if _WHOLE + name in spectra}
        earlier = [other for other in self._norms if other < step]
        before = self._norms[max(earlier)] if earlier else {}
        kept = {max(earlier): before} if earlier else {}
        self._norms = {**kept, step: {name: values[..., 0] for name, values in solved.items()}}
        out: dict[str, list[Tensor]] = {name: [] for name in SINGULAR_STATISTICS}
        for layer, count in self.heads.items():
            nothing = torch.full((count,), torch.nan)
            values, change = solved.get(layer), spectra.get(_CHANGE + layer)
            if values is None:
                for column in out.values():
                    column.append(nothing)
                continue
            out["sigma_1"].append(values[..., 0])
            for s in ENERGY_OF:
                out[f"energy_top_{s}"].append(energy_concentration(values, s))
            out["effective_rank"].append(effective_rank(values))
            out["logit_bound"].append(self._scales[layer] * values[..., 0])
            known = before.get(layer)
            ratio = nothing if change is None or known is None else change[..., 0] / known
            out["update_ratio"].append(ratio)
        return out
