"""Values of the penalty on QK-eigenspectra and their gradients, from d_head × d_head products."""

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


class _Products(NamedTuple):
    """``W_k W_qᵀ``, ``W_q W_qᵀ`` (heads) and ``W_k W_kᵀ`` (kv_heads), each ``(..., d_head, d_head)``."""

    small: Tensor
    gram_query: Tensor
    gram_key: Tensor


def head_penalties(query: Tensor, key: Tensor, form: Form) -> Tensor:
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
    return _HeadPenalties.apply(query, key, form)


def penalties_and_gradients(
    query: Tensor, key: Tensor, form: Form, weight: float | Tensor, sides: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The penalty of every head, and the gradients of ``weight`` times their sum for the sides that need one."""
    with torch.no_grad(), full_precision(query.device):
        products = _multiply(query, key)
        values, mean = _values(products, form)
        return values, *_gradients(query, key, products, mean, form, torch.ones_like(values) * weight, sides)


class _HeadPenalties(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, form: Form) -> Tensor:
        with full_precision(query.device):
            products = _multiply(query, key)
            values, _ = _values(products, form)
        ctx.save_for_backward(query, key, *products)
        ctx.form = form
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        query, key, *saved = ctx.saved_tensors
        with full_precision(query.device):
            # For a second derivative what was saved is no function of the weights any more.
            products = _multiply(query, key) if torch.is_grad_enabled() else _Products(*saved)
            mean = _trace(products.small) / ctx.form.n
            sides = ctx.needs_input_grad[:2]
            return *_gradients(query, key, products, mean, ctx.form, grad_outputs[0], sides), None


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _by_group(query: Tensor, kv_heads: int) -> Tensor:
    """Queries that share a key, one below the other: ``(..., kv_heads, groups · d_head, d_model)``."""
    return query.unflatten(-3, (kv_heads, -1)).flatten(-3, -2)


def _multiply(query: Tensor, key: Tensor) -> _Products:
    kv_heads, d_head = key.shape[-3:-1]
    # (kv_heads, d_head, groups · d_head), then one matrix a head.
    small = (key @ _by_group(query, kv_heads).mT).unflatten(-1, (-1, d_head)).movedim(-2, -3).flatten(-4, -3)
    return _Products(small, query @ query.mT, key @ key.mT)


def _values(products: _Products, form: Form) -> tuple[Tensor, Tensor]:
    small, gram_query, gram_key = products
    kv_heads = gram_key.shape[-3]
    frobenius_sq = (gram_query.unflatten(-3, (kv_heads, -1)) * gram_key.unsqueeze(-3)).sum((-2, -1))
    square = ((small * small.mT).sum((-2, -1)) + frobenius_sq.flatten(-2)) / 2
    mean = _trace(small) / form.n
    return square / form.n + form.nu * (mean - form.aim).square(), mean


def _gradients(
    query: Tensor,
    key: Tensor,
    products: _Products,
    mean: Tensor,
    form: Form,
    factor: Tensor,
    sides: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    small, gram_query, gram_key = products
    kv_heads, d_head = key.shape[-3:-1]
    factor = (factor / form.n)[..., None, None]
    eye = torch.eye(d_head, dtype=small.dtype, device=small.device)
    mixed = factor * (small + (2 * form.nu * (mean - form.aim))[..., None, None] * eye)
    mixed = mixed.unflatten(-3, (kv_heads, -1))
    for_query = for_key = None
    if sides[0]:
        # Its own Gram matrix for every head of a group: d_head × d_head, so that repeating it costs nothing.
        grams = (factor.unflatten(-3, (kv_heads, -1)) * gram_key.unsqueeze(-3)).flatten(-4, -3)
        crossed = _product(mixed.flatten(-3, -2), key).unflatten(-2, (-1, d_head)).flatten(-4, -3)
        for_query = _product(grams, query, add_to=crossed)
    if sides[1]:
        summed = (factor * gram_query).unflatten(-3, (kv_heads, -1)).sum(-3)
        crossed = _product(mixed.mT.movedim(-3, -2).flatten(-2), _by_group(query, kv_heads))
        for_key = _product(summed, key, add_to=crossed)
    return for_query, for_key


def _product(small: Tensor, weights: Tensor, add_to: Tensor | None = None) -> Tensor:
    """``small @ weights``, in the order of memory that the weights have; into ``add_to`` where it is given."""
    by_column = weights.stride(-2) == 1 and weights.stride(-1) != 1
    left, right = (weights.mT, small.mT) if by_column else (small, weights)
    if add_to is None:
        out = left @ right
    else:
        into = add_to.mT if by_column else add_to
        shape = into.shape
        out = torch.baddbmm(into.reshape(-1, *shape[-2:]), left.flatten(0, -3), right.flatten(0, -3))
        out = out.view(shape)
    return out.mT if by_column else out
