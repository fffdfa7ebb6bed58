"""Values of the penalty on QK-eigenspectra and their gradients, from d_head × d_head products."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.precision import full_precision


class Form(NamedTuple):
    """``tr S²/n + ν (tr S/n − c)²`` of every head; the variance of the spectrum is ν = −1 with c = 0.

    Attributes:
        n: size of the support.
        nu: ν.
        aim: c, a number or one for each head, ``(..., heads)``.
    """

    n: int
    nu: float
    aim: float | Tensor


class Limit(NamedTuple):
    """``max(0, ln(σ/τ))²`` of every head, with ``σ² = F = ‖W_QK‖_F²``: nothing at all where σ stays below τ.

    Attributes:
        tau: τ; over tokens, σ and τ are standard deviations of logits.
    """

    tau: float


class _Products(NamedTuple):
    """``Bᵀ = W_q W_kᵀ``, ``W_q W_qᵀ`` (heads) and ``W_k W_kᵀ`` (kv_heads), each ``(..., d_head, d_head)``;
    and the queries of a key one below the other."""

    small: Tensor
    gram_query: Tensor
    gram_key: Tensor
    below: Tensor


def head_penalties(query: Tensor, key: Tensor, form: Form | Limit) -> Tensor:
    r"""The penalty of every head, differentiable.

    With ``B = W_k W_qᵀ``, ``μ = tr B / n`` and the Gram matrices G, the gradients are

    ``n ∂/∂W_q = (B + 2ν(μ − c)) W_k + G_k W_q`` and ``n ∂/∂W_k = (Bᵀ + 2ν(μ − c)) W_q + G_q W_k``

    (derived): four products of d_head × d_head with d_head × d_model matrices, two thirds of what
    differentiating the three products of the value one by one takes, and nothing large is kept for them.

    Args:
        query: shape ``(..., heads, d_head, d_model)``, float32 or float64.
        key: shape ``(..., kv_heads, d_head, d_model)``.
        form: which penalty.

    Returns:
        Shape ``(..., heads)``.
    """
    if isinstance(form, Limit):
        with full_precision(query.device):
            square, _, _ = _frobenius(query.flatten(0, -3), key.flatten(0, -3))
            return _excess(square, form.tau).square().view(query.shape[:-2])
    flat = _HeadPenalties.apply(query.flatten(0, -3), key.flatten(0, -3), _flat(form))
    return flat.view(query.shape[:-2])


def _frobenius(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``F`` of every head, ``(heads,)``; and the Gram matrices of queries (heads) and keys (kv_heads)."""
    gram_query, gram_key = query @ query.mT, key @ key.mT
    by_key = _by_key(gram_query, len(key)) * gram_key.unsqueeze(1)
    return by_key.sum((-2, -1)).flatten(), gram_query, gram_key


def _excess(square: Tensor, tau: float) -> Tensor:
    """``max(0, ln(σ/τ))``; bounded before the logarithm, so that σ = 0 has a gradient of zero."""
    return 0.5 * (square / tau**2).clamp_min(1.0).log()


def _limited(
    query: Tensor, key: Tensor, tau: float, weight: float | Tensor, sides: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The penalty of :class:`Limit` over all heads, and gradients: with ``c = 2 ln(σ/τ) / F`` above τ, else 0,
    they are ``c G_k W_q`` and ``c G_q W_k`` (derived): half the products of the other forms."""
    square, gram_query, gram_key = _frobenius(query, key)
    excess = _excess(square, tau)
    # Where F is below τ² the excess is zero, and whatever bounds the quotient will do.
    factor = (weight * 2 * excess / square.clamp_min(tau**2)).view(-1, 1, 1)
    groups = len(query) // len(key)
    for_query = (factor * gram_key.repeat_interleave(groups, 0)) @ query if sides[0] else None
    for_key = _over_groups(factor * gram_query, len(key)) @ key if sides[1] else None
    return excess.square().sum(), for_query, for_key


def penalty_and_gradients(
    query: Tensor, key: Tensor, form: Form | Limit, weight: float | Tensor, sides: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The penalty of all heads together, and the gradients of ``weight`` times it for the sides that need one."""
    flat = query.flatten(0, -3), key.flatten(0, -3)
    if isinstance(form, Limit):
        with torch.no_grad(), full_precision(query.device):
            total, *limited = _limited(*flat, form.tau, weight, sides)
        return total, *_like(limited, query, key)
    form = _flat(form)
    with torch.no_grad(), full_precision(query.device):
        products = _multiply(*flat)
        centred = _centred(products.small, form)
        gram = _over_groups(products.gram_query, len(flat[1]))
        squares = (products.small * products.small.mT).sum() + (gram * products.gram_key).sum()
        total = torch.add(squares / (2 * form.n), centred.dot(centred), alpha=form.nu)
        found = _gradients(*flat, products, centred, form, weight, sides, gram)
    return total, *_like(found, query, key)


def _like(found: Sequence[Tensor | None], query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in the shapes of query and key."""
    for_query, for_key = (
        None if gradient is None else gradient.unflatten(0, side.shape[:-2])
        for gradient, side in zip(found, (query, key), strict=True)
    )
    return for_query, for_key


def _flat(form: Form) -> Form:
    """The form of all heads of all layers in one row, as all below sees them: batched products have one axis."""
    aim = form.aim
    return form._replace(aim=aim.flatten()) if isinstance(aim, Tensor) and aim.dim() > 1 else form


class _HeadPenalties(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, form: Form) -> Tensor:
        with full_precision(query.device):
            products = _multiply(query, key)
            square = (products.small * products.small.mT).sum((-2, -1))
            by_key = _by_key(products.gram_query, len(key)) * products.gram_key.unsqueeze(1)
            square = square + by_key.sum((-2, -1)).flatten()
            centred = _centred(products.small, form)
        ctx.save_for_backward(query, key, *products[:-1])
        ctx.form = form
        return torch.add(square / (2 * form.n), centred.square(), alpha=form.nu)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        query, key, small, gram_query, gram_key = ctx.saved_tensors
        with full_precision(query.device):
            # For a second derivative what was saved is no function of the weights any more.
            products = (
                _multiply(query, key)
                if torch.is_grad_enabled()
                else _Products(small, gram_query, gram_key, _below(query, len(key)))
            )
            centred = _centred(products.small, ctx.form)
            weight = grad_outputs[0][:, None, None]
            return *_gradients(
                query, key, products, centred, ctx.form, weight, ctx.needs_input_grad[:2]
            ), None


def _by_key(queries: Tensor, kv_heads: int) -> Tensor:
    """What belongs to queries that share a key together: ``(kv_heads, groups, rows, columns)``."""
    return queries.unflatten(0, (kv_heads, -1))


def _below(queries: Tensor, kv_heads: int) -> Tensor:
    """The same, one below the other: ``(kv_heads, groups · rows, columns)``."""
    if len(queries) == kv_heads:
        return queries
    return queries.reshape(kv_heads, -1, queries.shape[-1])


def _over_groups(queries: Tensor, kv_heads: int) -> Tensor:
    """The same, added up: ``(kv_heads, rows, columns)``."""
    return queries if len(queries) == kv_heads else _by_key(queries, kv_heads).sum(1)


def _multiply(query: Tensor, key: Tensor) -> _Products:
    key_t = key.mT
    below = _below(query, len(key))
    small = torch.bmm(below, key_t)
    if len(query) != len(key):
        small = small.view(len(query), -1, key.shape[1])
    return _Products(small, torch.bmm(query, query.mT), torch.bmm(key, key_t), below)


def _centred(small: Tensor, form: Form) -> Tensor:
    """``μ − c`` of every head."""
    mean = small.diagonal(dim1=-2, dim2=-1).sum(-1) / form.n
    return mean if isinstance(form.aim, float) and form.aim == 0.0 else mean - form.aim


def _gradients(
    query: Tensor,
    key: Tensor,
    products: _Products,
    centred: Tensor,
    form: Form,
    factor: float | Tensor,
    sides: tuple[bool, bool],
    gram: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the heads' penalties, each times its factor: a number, a scalar, or ``(heads, 1, 1)``.

    ``gram`` are the queries' Gram matrices over groups, where they are known and there is one factor.
    """
    small, gram_query, gram_key, below = products
    kv_heads, d_head = key.shape[:2]
    eye = torch.eye(d_head, dtype=small.dtype, device=small.device)
    mixed = torch.addcmul(small, (2 * form.nu * centred).view(-1, 1, 1), eye)
    scale = 1.0 / form.n
    if isinstance(factor, Tensor):
        mixed = factor * mixed
    else:
        scale *= factor
    for_query = for_key = None
    if sides[0]:
        grams = gram_key
        if len(query) != kv_heads:
            # Its own Gram matrix for every head of a group: d_head × d_head, so that repeating it costs nothing.
            grams = grams.repeat(1, len(query) // kv_heads, 1).view(-1, d_head, d_head)
        if isinstance(factor, Tensor):
            grams = factor * grams
        for_query = _add(_below(mixed.mT, kv_heads), key, grams, query, scale)
    if sides[1]:
        if isinstance(factor, Tensor):
            gram = _over_groups(factor * gram_query, kv_heads)
        elif gram is None:
            gram = _over_groups(gram_query, kv_heads)
        if len(query) != kv_heads:
            mixed = _by_key(mixed, kv_heads).transpose(1, 2).reshape(kv_heads, d_head, -1)
        for_key = _add(mixed, below, gram, key, scale)
    return for_query, for_key


def _add(left: Tensor, weights: Tensor, gram: Tensor, own: Tensor, scale: float) -> Tensor:
    """``scale · (left @ weights + gram @ own)`` in the order of memory that ``own`` has; ``gram`` is symmetric."""
    if own.stride(-2) == 1 and own.stride(-1) != 1 and len(weights) == len(own):
        out = torch.bmm(weights.mT, left.mT)
        return torch.baddbmm(out, own.mT, gram, beta=scale, alpha=scale).mT
    out = torch.bmm(left, weights)
    out = out if out.shape == own.shape else out.view(own.shape)
    return torch.baddbmm(out, gram, own, beta=scale, alpha=scale)
