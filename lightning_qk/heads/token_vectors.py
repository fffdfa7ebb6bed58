"""Queries and keys of given tokens, as a layer makes them before positions turn them.

With all that is left out of a bilinear form: biases, norms with what they divide by and add, bounds.
"""

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import shadow
from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.norms import NormPlan
from lightning_qk.heads.projection import Composition, Part, Projection, Side
from lightning_qk.heads.projections import Affine, HeadProjections
from lightning_qk.heads.sharding import whole


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


def token_vectors(layer: LayerReader | HeadProjections, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``(heads, d_head, tokens)`` and keys ``(kv_heads, d_head, tokens)``, at least float32.

    Differentiable.

    Weights are gathered in the order in which :meth:`LayerReader.read` gathers them, for processes that do so.

    Args:
        layer: one of which :func:`has_vectors` says so.
        tokens: what enters it, ``(tokens, d_model)``.
    """
    columns = at_least_float32(tokens).mT
    with full_precision(tokens.device):
        if isinstance(layer, HeadProjections):
            maps = Affine(layer.query, layer.query_bias), Affine(layer.key, layer.key_bias)
            query, key = (_bounded(_mapped(own, columns), layer.clip) for own in maps)
            return query, key
        from_query = _rows(layer.query.projection, columns)
        is_one = layer.key.projection is layer.query.projection
        from_key = from_query if is_one else _rows(layer.key.projection, columns)
        made = [
            _split(layer, side, _bounded(rows, layer.clip))
            for side, rows in zip(_sides(layer), (from_query, from_key), strict=True)
        ]
        query, key = (
            vectors if side.qk_norm is None else _normalized(side.qk_norm, vectors)
            for side, vectors in zip(_sides(layer), made, strict=True)
        )
        return query, key


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


def _rows(projection: Projection, columns: Tensor) -> Tensor:
    """What a projection makes, ``(rows, tokens)``."""
    if projection.composition is None:
        return _mapped(projection.read(), columns)
    return _composed(projection.composition, columns, {})


def _composed(composition: Composition, columns: Tensor, known: dict[Projection, Affine]) -> Tensor:
    return composition.ordered([_part(part, columns, known) for part in composition.parts])


def _part(part: Part, columns: Tensor, known: dict[Projection, Affine]) -> Tensor:
    if part.projection not in known:
        known[part.projection] = part.projection.read()
    weight, bias = known[part.projection]
    rows = part.rows if isinstance(part.rows, slice) else part.rows.to(weight.device)
    own = Affine(weight[rows], None if bias is None else bias[rows])
    if part.source is None:
        made = _mapped(own, columns)
        return made if part.norm is None else _run(part.norm, made.mT).mT
    below = _composed(part.source, columns, known)
    if part.norm is not None:
        below = _run(part.norm, below.mT).mT
    return _mapped(own, below if part.factor is None else part.factor() * below)


def _split(layer: LayerReader, side: Side, rows: Tensor) -> Tensor:
    """Rows as heads, ``(heads, d_head, tokens)``, with a layer's own factors and terms."""
    vectors = side.pick(rows, layer.sizes)
    if _is_cosine(layer):
        vectors = nn.functional.normalize(vectors, dim=1) * layer.sizes.d_head**0.5
    if side.factor is not None:
        vectors = vectors * whole(side.factor.values(layer.module))[..., None].to(vectors)
    for name in side.added:
        vectors = vectors + whole(getattr(layer.module, name)).reshape(*vectors.shape[:2], 1).to(vectors)
    return vectors


def _normalized(plan: NormPlan, vectors: Tensor) -> Tensor:
    """Vectors ``(heads, d_head, tokens)`` behind a norm of each head, of all at once, or of one gain a head."""
    by_token = vectors.movedim(-1, 0)
    heads, d_head = vectors.shape[:2]
    if plan.shape == (d_head,):
        made = _run(plan, by_token)
    elif plan.shape == (heads * d_head,):
        made = _run(plan, by_token.flatten(1)).unflatten(1, (heads, d_head))
    elif plan.shape == (1, heads, 1, d_head):
        made = _run(plan, by_token.transpose(0, 1)[None])[0].transpose(0, 1)
    else:
        made = _run(plan, by_token[None])[0]
    return made.movedim(0, -1)


def _run(plan: NormPlan, vectors: Tensor) -> Tensor:
    """What a norm itself makes of vectors, its epsilon included."""

    def convert(tensor: Tensor) -> Tensor:
        return whole(tensor).to(vectors.dtype) if tensor.is_floating_point() else tensor

    made: Tensor = shadow(plan.module, convert=convert)(vectors)
    return made.to(vectors.dtype)
