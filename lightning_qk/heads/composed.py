"""Rows that several projections give together, or one behind another."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.affine import Affine, AffineMap
from lightning_qk.heads.errors import UnreadLayer
from lightning_qk.heads.norms import Norm, NormPlan


class Part(NamedTuple):
    """Some rows of a composition.

    Attributes:
        places: which of the composition's rows they are.
        affine: the projection that makes them.
        rows: which of its rows they are.
        source: what it maps; None for the layer's input.
        norm: what stands between the two.
        factor: on the source, behind the norm.
    """

    places: Tensor
    affine: AffineMap
    rows: Tensor
    source: "Composed | None" = None
    norm: NormPlan | None = None
    factor: float = 1.0


class Composed:
    """Rows of several projections, some of which map what others give: see :class:`AffineMap`.

    As in a latent that is expanded behind a norm: the norm's gain is folded in (and the removal of the mean),
    the normalization itself stays out, and so does what is added behind it.
    """

    def __init__(self, parts: list[Part]) -> None:
        """Put parts together.

        Raises:
            UnreadLayer: they map inputs of several widths.
        """
        self.parts = parts
        widths = {part.affine.columns if part.source is None else part.source.columns for part in self.parts}
        if len(widths) != 1:
            raise UnreadLayer("its q or k is made of inputs of several widths")
        self.name = " + ".join(part.affine.name for part in self.parts)
        self.rows: int = sum(len(part.rows) for part in parts)
        self.columns: int = widths.pop()
        self.normed: bool = any(
            part.norm is not None or (part.source is not None and part.source.normed) for part in self.parts
        )

    @property
    def module(self) -> nn.Module:
        """The projection of the first rows."""
        return self.parts[0].affine.module

    @property
    def as_matrix(self) -> bool:
        """Whether reading runs a module."""
        inner = [part.source for part in self.parts if part.source is not None]
        return any(affine.as_matrix for affine in (*inner, *(part.affine for part in self.parts)))

    def read(self) -> Affine:
        """The composition as it is now."""
        made = [_read_part(part) for part in self.parts]
        dtype = functools.reduce(torch.promote_types, (own.weight.dtype for own in made))
        places = torch.cat([part.places for part in self.parts]).argsort()
        weight = torch.cat([own.weight.to(dtype) for own in made])[places.to(made[0].weight.device)]
        if all(own.bias is None for own in made):
            return Affine(weight, None)
        biases = [own.weight.new_zeros(len(own.weight)) if own.bias is None else own.bias for own in made]
        bias = torch.cat([own.to(dtype) for own in biases])[places.to(biases[0].device)]
        return Affine(weight, bias)

    def plain_weight(self) -> nn.Parameter | None:
        """None: the weight is put together."""
        return None

    def weight_parameters(self) -> list[nn.Parameter]:
        """Those of all projections and of the norms between them."""
        found: list[nn.Parameter] = []
        for part in self.parts:
            found += part.affine.weight_parameters()
            if part.source is not None:
                found += part.source.weight_parameters()
            if part.norm is not None:
                found += part.norm.module.parameters()
        return found

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return any(
            part.affine.is_sharded()
            or (part.source is not None and part.source.is_sharded())
            or (part.norm is not None and part.norm.is_sharded())
            for part in self.parts
        )

    def is_view(self) -> bool:
        """False: what is put together takes memory."""
        return False

    def as_rows(self, weight: Tensor) -> Tensor:
        """Nothing is stored as it is read."""
        return weight


def _read_part(part: Part) -> Affine:
    weight, bias = part.affine.read()
    rows = part.rows.to(weight.device)
    weight, bias = weight[rows], None if bias is None else bias[rows]
    if part.source is None:
        return Affine(weight, bias)
    below = part.source.read()
    if part.norm is not None:
        below, bias = _gained(below, part.norm.read()), None
    dtype = torch.promote_types(weight.dtype, below.weight.dtype)
    weight = part.factor * weight.to(dtype)
    if below.bias is not None:
        shift = weight @ below.bias.to(dtype)
        bias = shift if bias is None else bias + shift
    return Affine(weight @ below.weight.to(dtype), bias)


def _gained(affine: Affine, norm: Norm) -> Affine:
    """An affine map with a norm's gain, and its removal of the mean, behind it."""
    weight, bias = (None if values is None else values.to(norm.gain.dtype) for values in affine)
    assert weight is not None
    if norm.centered:
        weight = weight - weight.mean(0, keepdim=True)
        bias = None if bias is None else bias - bias.mean()
    return Affine(weight * norm.gain[:, None], None if bias is None else bias * norm.gain)
