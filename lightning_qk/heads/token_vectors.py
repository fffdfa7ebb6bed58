"""Queries and keys of given tokens, as layers make them before positions turn them.

With all that is left out of a bilinear form: biases, norms with what they divide by and add, bounds.
"""

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.live_weights import whole
from lightning_qk.heads.norms import NormPlan
from lightning_qk.heads.projection import Composition, Projection, Side
from lightning_qk.heads.projections import Affine, HeadProjections

_KINDS: "weakref.WeakKeyDictionary[LayerReader, Hashable]" = weakref.WeakKeyDictionary()
_Known = dict[Projection, Affine]


def has_vectors(layer: LayerReader | HeadProjections) -> bool:
    """Whether all that makes queries and keys of tokens is known.

    Of what was read alone, norms are not; of a few layers it is known only that they divide by lengths.
    """
    if isinstance(layer, HeadProjections):
        return not layer.qk_norm
    if layer.feeding is not None:
        return False
    return (
        not layer.normalizes or _is_cosine(layer) or any(side.qk_norm is not None for side in _sides(layer))
    )


def vectors_of_heads(head: HeadProjections, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``(heads, d_head, tokens)`` and keys ``(kv_heads, …)`` of tokens ``(tokens, d_model)``."""
    maps = Affine(head.query, head.query_bias), Affine(head.key, head.key_bias)
    with full_precision(tokens.device):
        query, key = (_bounded(_mapped(own, at_least_float32(tokens).mT), head.clip) for own in maps)
    return query, key


def kind_of(layer: LayerReader) -> Hashable:
    """What is equal in layers that :func:`token_vectors` takes together."""
    tensors = [tensor for side in _sides(layer) for tensor in side.projection.tensors()]
    kind = _KINDS.get(layer)
    if kind is None:
        kind = _KINDS[layer] = _structure(layer)
    return kind, tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)


def token_vectors(layers: Sequence[LayerReader], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``(layers, heads, d_head, tokens)`` and keys ``(layers, kv_heads, …)``, differentiable.

    In float32 at least. Weights are gathered in the order in which :meth:`LayerReader.read` gathers them, for
    processes that do so.

    Args:
        layers: of one kind, each one of which :func:`has_vectors` says so.
        tokens: what enters each, ``(layers, tokens, d_model)``.
    """
    first, columns = layers[0], at_least_float32(tokens).mT
    query, key = ([getattr(layer, name) for layer in layers] for name in ("query", "key"))
    with full_precision(tokens.device):
        rows = _rows([side.projection for side in query], columns)
        is_one = first.key.projection is first.query.projection
        of_key = rows if is_one else _rows([side.projection for side in key], columns)
        made = [_split(layers, query, rows), _split(layers, key, of_key)]
        for place, sides in enumerate((query, key)):
            plans = [side.qk_norm for side in sides if side.qk_norm is not None]
            if plans:
                is_whole = plans[0].shape == (made[place].shape[1] * made[place].shape[2],)
                made[place] = _normalized(plans, made[place], (-3, -2) if is_whole else (-2,))
    return made[0], made[1]


def _sides(layer: LayerReader) -> tuple[Side, Side]:
    return layer.query, layer.key


def _is_cosine(layer: LayerReader) -> bool:
    return any(side.factor is not None and side.factor.normalizes for side in _sides(layer))


def _bounded(values: Tensor, bound: float | None) -> Tensor:
    return values if bound is None else values.clamp(-bound, bound)


def _mapped(affine: Affine, columns: Tensor) -> Tensor:
    """``W x + b`` of columns."""
    weight = at_least_float32(affine.weight)
    dtype = torch.promote_types(weight.dtype, columns.dtype)
    made = weight.to(dtype) @ columns.to(dtype)
    return made if affine.bias is None else made + affine.bias[..., None].to(dtype)


def _read(projections: Sequence[Projection]) -> Affine:
    """Weights ``(layers, rows, columns)`` and biases of as many projections."""
    maps = [projection.read() for projection in projections]
    biases = [own.bias for own in maps if own.bias is not None]
    return Affine(torch.stack([own.weight for own in maps]), torch.stack(biases) if biases else None)


def _rows(projections: Sequence[Projection], columns: Tensor) -> Tensor:
    """What projections make of columns, ``(layers, rows, tokens)``."""
    inner = [own.composition for own in projections if own.composition is not None]
    return _composed(inner, columns, {}) if inner else _mapped(_read(projections), columns)


def _composed(compositions: Sequence[Composition], columns: Tensor, known: _Known) -> Tensor:
    made = []
    for parts in zip(*(own.parts for own in compositions), strict=True):
        first, below = parts[0], columns
        if first.projection not in known:
            known[first.projection] = _read([part.projection for part in parts])
        weight, bias = known[first.projection]
        rows = first.rows if isinstance(first.rows, slice) else first.rows.to(weight.device)
        own = Affine(weight[:, rows], None if bias is None else bias[:, rows])
        plans = [part.norm for part in parts if part.norm is not None]
        sources = [part.source for part in parts if part.source is not None]
        if sources:
            below = _composed(sources, columns, known)
            below = _normalized(plans, below, (-2,)) if plans else below
            below = below if first.factor is None else first.factor() * below
        rows_made = _mapped(own, below)
        made.append(_normalized(plans, rows_made, (-2,)) if plans and not sources else rows_made)
    return compositions[0].ordered(made, -2)


def _split(layers: Sequence[LayerReader], sides: Sequence[Side], rows: Tensor) -> Tensor:
    """Rows as heads, ``(layers, heads, d_head, tokens)``, with a layer's own bound, factors and terms."""
    first, side = layers[0], sides[0]
    vectors = side.pick(_bounded(rows, first.clip).transpose(0, 1), first.sizes).movedim(2, 0)
    if _is_cosine(first):
        vectors = nn.functional.normalize(vectors, dim=-2) * first.sizes.d_head**0.5
    if side.factor is not None:
        factors = torch.stack([whole(side.factor.values(layer.module)) for layer in layers])
        vectors = vectors * factors[..., None].to(vectors)
    for name in side.added:
        numbers = torch.stack([whole(getattr(layer.module, name)) for layer in layers])
        vectors = vectors + numbers.reshape(*vectors.shape[:3], 1).to(vectors)
    return vectors


def _normalized(plans: Sequence[NormPlan], vectors: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Vectors ``(layers, …, d, tokens)`` behind norms over some axes."""
    first, norms = plans[0], [plan.read() for plan in plans]
    shape = (len(plans), *((-1,) if vectors.dim() == 4 else ()), vectors.shape[-2], 1)
    if first.centered:
        vectors = vectors - vectors.mean(dims, keepdim=True)
    square = vectors.square().mean(dims, keepdim=True) + _epsilon(first.module)
    vectors = vectors * square.rsqrt() * torch.stack([norm.gain for norm in norms]).reshape(shape).to(vectors)
    offsets = [norm.offset for norm in norms if norm.offset is not None]
    return vectors + torch.stack(offsets).reshape(shape).to(vectors) if offsets else vectors


def _epsilon(norm: nn.Module) -> float:
    """What a norm adds to the mean of squares; a usual number where it does not say."""
    names = ("eps", "variance_epsilon", "epsilon", "norm_eps")
    found = next((value for name in names if isinstance(value := getattr(norm, name, None), float)), None)
    return 1e-6 if found is None else found


def _structure(layer: LayerReader) -> Hashable:
    key_is_query = layer.key.projection is layer.query.projection
    sides = tuple(
        (
            _of_rows(side.pick(torch.arange(side.projection.rows), layer.sizes)),
            _of_projection(side.projection),
            _of_norm(side.qk_norm),
            None if side.factor is None else side.factor.parameter,
            side.added,
        )
        for side in _sides(layer)
    )
    return layer.sizes, layer.width, layer.clip, key_is_query, sides


def _of_rows(rows: Tensor | slice) -> Hashable:
    return (rows.start, rows.stop, rows.step) if isinstance(rows, slice) else tuple(rows.flatten().tolist())


def _of_norm(plan: NormPlan | None) -> Hashable:
    return None if plan is None else (plan.shape, plan.centered, plan.shifted, _epsilon(plan.module))


def _of_projection(projection: Projection) -> Hashable:
    if projection.composition is None:
        # Biases may come and go without the weights.
        return projection.rows, projection.columns, projection.read().bias is None
    return _of_composition(projection.composition)


def _of_composition(composition: Composition) -> Hashable:
    parts: list[Any] = []
    for part in composition.parts:
        # A factor that is computed is of this layer alone.
        factor = None if part.factor is None else id(part)
        source = None if part.source is None else _of_composition(part.source)
        own = _of_projection(part.projection)
        parts.append((_of_rows(part.places), _of_rows(part.rows), own, source, _of_norm(part.norm), factor))
    return tuple(parts)
