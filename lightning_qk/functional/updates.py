r"""Spectra of an update of ``W_QK``: how large it is, and how many directions it has.

Between two readings of the weights ``W_QK = W_q^T W_k`` changes by exactly ``Δ₂ + Δ₃``, with

    ``Δ₂ = ΔW_q^T W_k + W_q^T ΔW_k``, the change of first order, and ``Δ₃ = ΔW_q^T ΔW_k``, that of second order,

where ``W`` are the weights before. Both come from factors of ``2 d_head`` and ``d_head`` rows; no
``d_model × d_model`` matrix is formed, and no difference of two products loses the digits of a small update.
"""

import torch
from torch import Tensor

from lightning_qk.functional.checks import floating, one_device
from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.functional.singular import check_same_layer, effective_rank, stable_rank
from lightning_qk.functional.spectrum import core_singular_values, qk_singular_core

UPDATE_FORMS = ("delta2", "delta3")
"""Changes of first and of second order."""


def update_spectra(query: Tensor, key: Tensor, query_before: Tensor, key_before: Tensor) -> dict[str, Tensor]:
    r"""Size and rank of the change of ``W_QK``, in first and second order, per head.

    After arXiv 2606.28116 [S], in this package's orientation: ``Δ₂ = ΔW_q^T W_k + W_q^T ΔW_k`` and
    ``Δ₃ = ΔW_q^T ΔW_k`` with ``W`` before the update. Of each, with singular values ``σ`` in descending order:
    the norm ``‖Δ‖_F``, ``σ₁``, the stable rank ``‖Δ‖²_F / σ₁²``, and the effective rank ``exp(−Σ p log p)`` with
    ``p = σ² / Σ σ²``.

    Args:
        query: query weights after the update, shape ``(..., heads, d_head, d_query)``.
        key: key weights after the update, shape ``(..., kv_heads, d_head, d_key)``; ``kv_heads`` divides
            ``heads``.
        query_before: query weights before it.
        key_before: key weights before it.

    Returns:
        ``delta2_norm``, ``delta2_sigma_1``, ``delta2_stable_rank``, ``delta2_effective_rank`` and the same of
        ``delta3``, each of shape ``(..., heads)``. Ranks are NaN where nothing changed, everything is where some
        weights are not finite.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> query, key = torch.eye(2, 3)[None], torch.eye(2, 3)[None]
        >>> found = update_spectra(query, 1.5 * key, query, key)
        >>> found["delta2_stable_rank"], found["delta3_norm"]
        (tensor([2.]), tensor([0.]))
    """
    cores = update_cores(query, key, query_before, key_before)
    out: dict[str, Tensor] = {}
    for form, core in zip(UPDATE_FORMS, cores, strict=True):
        found = rank_statistics(core_singular_values(core))
        out |= {f"{form}_{name}": value for name, value in found.items()}
    return out


def update_cores(
    query: Tensor, key: Tensor, query_before: Tensor, key_before: Tensor
) -> tuple[Tensor, Tensor]:
    """The small matrices with the singular values of ``Δ₂`` and of ``Δ₃``; see :func:`update_spectra`.

    Up to ``2 d_head`` and ``d_head`` wide, to be given to
    :func:`~lightning_qk.functional.spectrum.core_singular_values`.
    """
    weights = {"query": query, "key": key, "query_before": query_before, "key_before": key_before}
    for name, weight in weights.items():
        floating(weight, f"{name} weights")
    one_device(**weights)
    check_same_layer(query, key, query_before, key_before)
    with full_precision(query.device):
        # Raised before subtracting: the difference of two half-precision weights is no half-precision number.
        query, key, query_before, key_before = (at_least_float32(weight) for weight in weights.values())
        query_change, key_change = query - query_before, key - key_before
        # Each row has a size of its own in the triangular factors, so that a small change keeps its digits
        # beside the weights.
        first = qk_singular_core(
            torch.cat([query_change, query_before], dim=-2), torch.cat([key_before, key_change], dim=-2)
        )
        return first, qk_singular_core(query_change, key_change)


def rank_statistics(singular_values: Tensor) -> dict[str, Tensor]:
    """What :func:`update_spectra` returns of one form, of singular values ``(..., r)`` in descending order."""
    values = at_least_float32(singular_values)
    largest = values[..., :1]
    # Relative to the largest, so that squares of tiny or huge values stay in range.
    energy = torch.where(largest > 0, values / largest, values).square()
    return {
        "norm": largest[..., 0] * energy.sum(-1).sqrt(),
        "sigma_1": largest[..., 0],
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(energy),
    }
