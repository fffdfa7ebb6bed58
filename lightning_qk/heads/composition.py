"""Projections that are put together of others: rows of several, one behind another, a latent between two."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.norms import NormPlan
from lightning_qk.heads.projection import Projection
from lightning_qk.heads.projections import Affine, UnreadLayer


class Part(NamedTuple):
    """Some rows of a composition.

    Attributes:
        places: which of the composition's rows they are.
        projection: makes them.
        rows: which of its rows they are.
        source: what the projection maps; None for the layer's input.
        norm: between the two, or, without a source, behind the projection.
        factor: on the source, behind the norm; None for 1.
    """

    places: Tensor
    projection: Projection
    rows: Tensor | slice
    source: "Composition | None" = None
    norm: NormPlan | None = None
    factor: Callable[[], float] | None = None


class Composition:
    """Rows of several projections, some of which map what others give.

    As in a latent that is expanded behind a norm: the norm's gain is folded in (and the removal of the mean),
    the normalization itself stays out, and so does what is added behind it.

    Args:
        parts: all rows, each once.

    Raises:
        UnreadLayer: they map inputs of several widths.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        widths = {part.projection.columns if part.source is None else part.source.columns for part in parts}
        if len(widths) != 1:
            raise UnreadLayer("its q or k is computed from inputs of several widths")
        self.columns: int = widths.pop()
        places = torch.cat([part.places for part in parts])
        self._order = None if bool((places.diff() == 1).all()) else places.argsort()
        self.rows = len(places)

    def projections(self) -> Iterator[Projection]:
        """All projections of which it consists."""
        for part in self.parts:
            yield part.projection
            if part.source is not None:
                yield from part.source.projections()

    def norms(self) -> Iterator[NormPlan]:
        """The norms within."""
        for part in self.parts:
            if part.source is not None:
                yield from part.source.norms()
            if part.norm is not None:
                yield part.norm

    def read(self, known: dict[Projection, Affine] | None = None) -> Affine:
        """The composition as it is now; each projection is read once, those in ``known`` not at all."""
        known = {} if known is None else known
        made = [_read_part(part, known) for part in self.parts]
        dtype = functools.reduce(torch.promote_types, (own.weight.dtype for own in made))
        weight = self._ordered([own.weight.to(dtype) for own in made])
        if all(own.bias is None for own in made):
            return Affine(weight, None)
        biases = [own.weight.new_zeros(len(own.weight)) if own.bias is None else own.bias for own in made]
        return Affine(weight, self._ordered([own.to(dtype) for own in biases]))

    def _ordered(self, parts: list[Tensor]) -> Tensor:
        values = torch.cat(parts) if len(parts) > 1 else parts[0]
        return values if self._order is None else values[self._order.to(values.device)]


def composed(
    parts: Sequence[Part], name: str = "", *, expansion: Projection | None = None, shared: int = 0
) -> Projection:
    """A composition as a projection.

    Raises:
        UnreadLayer: its parts map inputs of several widths.
    """
    whole_map = Composition(parts)
    inner, norms = list(dict.fromkeys(whole_map.projections())), list(whole_map.norms())

    def weights() -> list[nn.Parameter]:
        own = [parameter for part in inner for parameter in part.weight_parameters()]
        return own + [parameter for norm in norms for parameter in norm.module.parameters()]

    return Projection(
        name or " + ".join(part.projection.name for part in parts),
        parts[0].projection.module,
        whole_map.rows,
        whole_map.columns,
        whole_map.read,
        weights,
        tensors=lambda: [
            *(tensor for part in inner for tensor in part.tensors()),
            *(tensor for norm in norms for tensor in norm.module.parameters()),
        ],
        as_matrix=any(part.as_matrix for part in inner),
        normed=bool(norms),
        expansion=expansion,
        shared=shared,
    )


def _read_part(part: Part, known: dict[Projection, Affine]) -> Affine:
    if part.projection not in known:
        known[part.projection] = part.projection.read()
    weight, bias = known[part.projection]
    rows = part.rows if isinstance(part.rows, slice) else part.rows.to(weight.device)
    weight, bias = weight[rows], None if bias is None else bias[rows]
    if part.source is None:
        own = Affine(weight, bias)
        return own if part.norm is None else _gained(own, part.norm)
    below = part.source.read(known)
    if part.norm is not None:
        below, bias = _gained(below, part.norm), None
    dtype = torch.promote_types(weight.dtype, below.weight.dtype)
    weight = weight.to(dtype)
    if part.factor is not None:
        weight = part.factor() * weight
    if below.bias is not None:
        shift = weight @ below.bias.to(dtype)
        bias = shift if bias is None else bias + shift
    return Affine(weight @ below.weight.to(dtype), bias)


def _gained(affine: Affine, plan: NormPlan) -> Affine:
    """An affine map with a norm's gain, and its removal of the mean, behind it."""
    norm = plan.read()
    weight, bias = (None if values is None else values.to(norm.gain.dtype) for values in affine)
    assert weight is not None
    if norm.centered:
        weight = weight - weight.mean(0, keepdim=True)
        bias = None if bias is None else bias - bias.mean()
    return Affine(weight * norm.gain[:, None], None if bias is None else bias * norm.gain)


def latent(
    down: Projection,
    up: Projection,
    norm: NormPlan | None = None,
    shared_norm: NormPlan | None = None,
    factor: Callable[[], float] | None = None,
) -> Projection:
    """``up(factor * norm(down x))``, then those rows of ``down`` that are no part of the latent."""
    rank = up.columns
    below = Composition([Part(torch.arange(rank), down, slice(rank))])
    parts = [Part(torch.arange(up.rows), up, slice(None), below, norm, factor)]
    shared = down.rows - rank
    if shared:
        parts.append(Part(torch.arange(up.rows, up.rows + shared), down, slice(rank, None), norm=shared_norm))
    return composed(parts, up.name, expansion=up, shared=shared)
