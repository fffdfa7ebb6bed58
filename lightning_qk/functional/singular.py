r"""What singular values say: effective and stable rank, concentration of energy, entropy floor, size of an update.

Those of a head's bilinear form come from :func:`~lightning_qk.functional.qk_singular_values`; nothing here forms a
``d_model × d_model`` matrix.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_qk.functional.checks import floating, integer, number, one_device
from lightning_qk.functional.precision import at_least_float32, full_precision, scaled
from lightning_qk.functional.spectrum import core_singular_values, qk_singular_core

FloorNorm = Literal["euclidean", "max"]


def effective_rank(singular_values: Tensor) -> Tensor:
    r"""Effective rank: exp of the entropy of singular values that are normalized to sum 1.

    After Roy & Vetterli, EUSIPCO 2007: ``p_i = σ_i / Σ σ``, not the squares. 1 for one direction, ``r`` for ``r``
    equal ones, whatever the scale.

    Args:
        singular_values: shape ``(..., r)``, not negative, in any order; zeros change nothing.

    Returns:
        Shape ``(...)``. NaN where all are zero, or one is negative or not finite.

    Example:
        >>> round(effective_rank(torch.tensor([3.0, 3.0, 0.0])).item(), 4)
        2.0
    """
    values = at_least_float32(_values(singular_values))
    if values.shape[-1] == 0:
        return values.new_full(values.shape[:-1], torch.nan)
    # Relative to the largest, so that the sum of huge values stays in range.
    values = values / values.amax(-1, keepdim=True)
    rank = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()
    return torch.where((values < 0).any(-1), torch.nan, rank)


def stable_rank(singular_values: Tensor) -> Tensor:
    r"""Stable rank: ``Σ σ_i² / σ₁²``, the squared Frobenius norm over the squared spectral norm.

    As MSign has it (arXiv 2602.01734 [S]). 1 for one direction, ``r`` for ``r`` equal ones, whatever the scale.

    Args:
        singular_values: shape ``(..., r)``, not negative, in any order; zeros change nothing.

    Returns:
        Shape ``(...)``. NaN where all are zero, or one is negative or not finite.

    Example:
        >>> stable_rank(torch.tensor([2.0, 2.0, 1.0, 0.0]))
        tensor(2.2500)
    """
    values = at_least_float32(_values(singular_values))
    if values.shape[-1] == 0:
        return values.new_full(values.shape[:-1], torch.nan)
    # Relative to the largest, so that squares stay in range.
    rank = (values / values.amax(-1, keepdim=True)).square().sum(-1)
    return torch.where((values < 0).any(-1), torch.nan, rank)


def _values(singular_values: Tensor) -> Tensor:
    if not floating(singular_values, "singular values").dim():
        raise ValueError(
            "expected singular values of shape (..., r), got shape (): give them an axis of their own"
        )
    return singular_values


def energy_concentration(singular_values: Tensor, s: int) -> Tensor:
    r"""Spectral energy concentration ``sec(s) = Σ_{i≤s} σ_i² / Σ σ_i²``: the share of the first ``s`` directions.

    After Qi et al. 2025 (arXiv 2505.21910; formula from a summary [S]): towards 1 at small ``s`` the form has few
    directions left, which they link to the malignant kind of entropy collapse. A collapse with many directions
    left is benign.

    Args:
        singular_values: shape ``(..., r)``, in descending order.
        s: how many directions, at least 1; 1 is returned from ``r`` on.

    Returns:
        Shape ``(...)``, in [0, 1]. NaN where all are zero or one is not finite.

    Raises:
        ValueError: ``s`` is below 1.
    """
    s = integer(s, "s")
    if s < 1:
        raise ValueError(f"expected s of at least 1, got {s}: pass how many leading directions to count")
    values = at_least_float32(_values(singular_values))
    # Relative to the largest, so that squares of tiny or huge values stay in range.
    energy = (values / values[..., :1]).square()
    return energy[..., :s].sum(-1) / energy.sum(-1)


def entropy_floor(sigma: Tensor | float, n: int, *, norm: FloorNorm = "euclidean") -> Tensor:
    r"""The least entropy that attention over ``n`` keys can have when the row of logits is bounded.

    ``norm="euclidean"``: ``‖u‖₂ ≤ σ`` for the row ``u`` of ``n`` logits, after Zhai et al., ICML 2023 (arXiv
    2303.06296; re-derived [V in numbers]). With ``β = exp(−σ √(n / (n − 1)))``

        ``H ≥ log(1 + (n − 1) β) + σ √(n (n − 1)) β / (1 + (n − 1) β)``

    attained by one logit at ``σ √((n − 1) / n)`` and all others at ``−σ / √(n (n − 1))``.

    ``norm="max"``: ``|u_j| ≤ σ`` for every logit; derived. The entropy is concave in the probability of one key
    with the ratios of the others fixed, so that the least is attained with each logit at ``σ`` or ``−σ``; ``k`` at
    ``σ`` give ``log Z + 2σ (n − k) β / Z`` with ``β = exp(−2σ)`` and ``Z = k + (n − k) β``, which is lowest near
    ``Z = 2σ β n / (1 − β)``. For the same bound on single logits it is far higher than the first.

    What bounds the logits of a head, positions and biases left out: with softmax scale ``s``, largest singular
    value ``σ₁`` of ``W_QK`` and tokens ``x`` of norm ``R`` at most, ``|u_j| ≤ s σ₁ R²``, and
    ``‖u‖₂ ≤ s σ₁ R ‖X‖₂ ≤ s σ₁ R² √n`` with ``X`` the ``n`` keys' tokens.

    Args:
        sigma: the bound, not negative, any shape.
        n: number of keys that a query sees.
        norm: which norm of the row is bounded.

    Returns:
        Nats, of sigma's shape, in float32 at least; NaN where a tensor is negative.

    Raises:
        ValueError: ``n`` is below 1, or an unknown norm.

    Example:
        >>> round(entropy_floor(0.0, 8).exp().item(), 4)
        8.0
    """
    n = integer(n, "n")
    if n < 1:
        raise ValueError(f"expected at least one key, got n={n}: pass how many keys a query sees")
    if not isinstance(norm, str) or norm not in get_args(FloorNorm):
        raise ValueError(f"expected norm to be 'euclidean' or 'max', got {norm!r}: pass one of the two")
    bound = at_least_float32(
        floating(sigma if isinstance(sigma, Tensor) else torch.tensor(_bound(sigma)), "sigma")
    )
    # No row is bounded by less than nothing.
    bound = torch.where(bound < 0, torch.nan, bound)
    if n == 1:
        return torch.where(bound.isnan(), bound, 0.0)
    if norm == "euclidean":
        return _two_level_entropy(bound * math.sqrt(n / (n - 1)), torch.ones_like(bound), n)
    gap = 2 * bound
    # Where the derivative by a continuous k vanishes; expm1, since both tend to 0 with the gap.
    lost = -torch.expm1(-gap)
    lower = torch.exp(-gap)
    best = n * torch.where(lower > 0, lower * (gap - lost) / lost.square(), torch.zeros_like(gap))
    # Half of the logits on either side, to which it tends, where the gap is so small that the digits are lost.
    best = torch.where(gap < 1e-2, torch.full_like(best, n / 2), best)
    below, above = (k.clamp(1, n - 1) for k in (best.floor(), best.floor() + 1))
    return torch.minimum(_two_level_entropy(gap, below, n), _two_level_entropy(gap, above, n))


def _bound(sigma: object) -> float:
    # Without a bound (infinity) the floor is 0.
    found = math.inf if sigma == math.inf else number(sigma, "sigma")
    if found < 0:
        raise ValueError(
            f"expected sigma to be at least 0, got {found}: pass a bound on the norm of the logits"
        )
    return found


def _two_level_entropy(gap: Tensor, k: Tensor, n: int) -> Tensor:
    """Entropy of the softmax of ``k`` equal logits and ``n − k`` that are lower by ``gap``."""
    lower = torch.exp(-gap)
    partition = k + (n - k) * lower
    # gap · exp(−gap) is 0 · ∞ where the gap is infinite.
    weighed = torch.where(lower > 0, gap * lower, torch.zeros_like(gap))
    return partition.log() + (n - k) * weighed / partition


def update_ratio(query: Tensor, key: Tensor, query_before: Tensor, key_before: Tensor) -> dict[str, Tensor]:
    r"""Size of an update against the weights: ``σ₁(ΔW) / σ₁(W)``, per head.

    After Qi et al. 2025 (arXiv 2505.21910, [S]), who let the learning rate keep it small. ``W`` are the weights
    before the update and ``ΔW`` the difference. For ``W_QK = W_q^T W_k`` the difference is
    ``[ΔW_q; W_q]^T [W_k + ΔW_k; ΔW_k]``, a product of rank ``2 d_head``: no difference of two large products
    loses the digits of a small update.

    Args:
        query: query weights after the update, shape ``(..., heads, d_head, d_query)``.
        key: key weights after the update, shape ``(..., kv_heads, d_head, d_key)``.
        query_before: query weights before it.
        key_before: key weights before it.

    Returns:
        ``qk`` (W_QK) and ``query``, shape ``(..., heads)``, and ``key``, shape ``(..., kv_heads)``. NaN where the
        weights before are zero or some are not finite.

    Raises:
        ValueError: shapes that do not fit.
    """
    for name, weight in (
        ("query", query),
        ("key", key),
        ("query_before", query_before),
        ("key_before", key_before),
    ):
        floating(weight, f"{name} weights")
    one_device(query=query, key=key, query_before=query_before, key_before=key_before)
    with full_precision(query.device):
        query, query_before = _together(query, query_before)
        key, key_before = _together(key, key_before)
        difference = core_singular_values(update_core(query, key, query_before, key_before))[..., 0]
        whole = core_singular_values(qk_singular_core(query_before, key_before))[..., 0]
        out = {"qk": difference / whole}
        for name, after, before in (("query", query, query_before), ("key", key, key_before)):
            old = at_least_float32(before)
            out[name] = _largest_singular(at_least_float32(after) - old) / _largest_singular(old)
        return out


def _together(after: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Both weights over one number a head, so that no product leaves the range of the type; ratios stay."""
    if after.shape != before.shape or after.numel() == 0:
        return after, before
    after, before = at_least_float32(after), at_least_float32(before)
    _, size = scaled(torch.cat([after, before], -1), (-2, -1))
    return after / size, before / size


def update_core(query: Tensor, key: Tensor, query_before: Tensor, key_before: Tensor) -> Tensor:
    """The small matrix with the singular values of ``ΔW_QK``, up to ``2 d_head`` wide; see :func:`update_ratio`.

    To be given to :func:`~lightning_qk.functional.spectrum.core_singular_values`.
    """
    check_same_layer(query, key, query_before, key_before)
    with full_precision(query.device):
        # Raised before subtracting: the difference of two half-precision weights is no half-precision number.
        query, key, query_before, key_before = (
            at_least_float32(weight) for weight in (query, key, query_before, key_before)
        )
        left = torch.cat([query - query_before, query_before], dim=-2)
        right = torch.cat([key, key - key_before], dim=-2)
        return qk_singular_core(left, right)


def check_same_layer(query: Tensor, key: Tensor, query_before: Tensor, key_before: Tensor) -> None:
    """Raise ValueError where weights have other shapes after than before."""
    if query.shape != query_before.shape or key.shape != key_before.shape:
        raise ValueError(
            f"expected weights of one shape before and after, got query {tuple(query_before.shape)} then "
            f"{tuple(query.shape)} and key {tuple(key_before.shape)} then {tuple(key.shape)}: pass the same "
            "layer twice"
        )


def _largest_singular(weight: Tensor) -> Tensor:
    """σ₁ of ``(..., heads, d_head, width)``, by the Gram matrix of the rows: the largest loses no digits there."""
    scale = weight.abs().amax((-2, -1), keepdim=True)
    scaled = torch.where(scale > 0, weight / scale, weight)
    finite = scaled.isfinite().all(-1).all(-1)
    scaled = torch.where(finite[..., None, None], scaled, torch.zeros_like(scaled))
    largest = torch.linalg.eigvalsh(scaled @ scaled.mT)[..., -1].clamp_min(0).sqrt() * scale[..., 0, 0]
    return torch.where(finite, largest, torch.full_like(largest, torch.nan))


def leading_singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular value of a matrix and its vectors, from the smaller of its Gram matrices in float64.

    Args:
        matrix: shape ``(rows, columns)``.

    Returns:
        ``sigma ()``, ``u (rows,)``, ``v (columns,)`` with ``sigma = u @ matrix @ v``, float32 at least.
    """
    with torch.no_grad(), full_precision(matrix.device):
        # Apple's devices have no float64.
        device = "cpu" if matrix.device.type == "mps" else matrix.device
        wide = matrix.detach().to(device, torch.float64)
        is_tall = wide.shape[0] > wide.shape[1]
        gram = wide.mT @ wide if is_tall else wide @ wide.mT
        first = torch.linalg.eigh(gram).eigenvectors[:, -1]
        second = wide @ first if is_tall else wide.mT @ first
        sigma = second.norm()
        second = second / sigma.clamp_min(torch.finfo(torch.float64).tiny)
        left, right = (second, first) if is_tall else (first, second)
        dtype = at_least_float32(matrix).dtype
        found = (part.to(matrix.device, dtype) for part in (sigma, left, right))
        return next(found), next(found), next(found)


def starting_subspace(columns: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Orthonormal vectors to start :func:`subspace_iteration` from, the same on every process.

    Returns:
        Shape ``(columns, min(size, columns))``.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, min(size, columns), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(start).Q.to(device, dtype)


def subspace_iteration(matrix: Tensor, subspace: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Estimate the largest singular value by power iterations of several vectors at once.

    The estimate is never above the true value, but for rounding, and its relative error falls as
    ``(sigma_k+1 / sigma_1) ** (4 iterations)`` with the number k of vectors. Started from the vectors of a
    similar matrix, few iterations do.

    Args:
        matrix: shape ``(rows, columns)``, float32 at least.
        subspace: orthonormal columns, ``(columns, k)``.
        iterations: how often the matrix and its transpose are applied, at least 1.

    Returns:
        The estimate, ``()``, and the new subspace. A matrix of zeros has the value 0, one that is not finite NaN;
        both leave the subspace.
    """
    with torch.no_grad(), full_precision(matrix.device):
        is_finite = matrix.isfinite().all()
        matrix = torch.where(is_finite, matrix, 0.0)  # decompositions raise for others
        for _ in range(iterations):
            applied = matrix.mT @ (matrix @ subspace)
            # Far from 1, products of the vectors would leave the range of the type.
            scale = applied.abs().amax()
            applied = torch.where(scale > 0, applied / scale, subspace)
            subspace = torch.linalg.qr(applied).Q
        image = matrix @ subspace
        # Far from 1, squares would leave the range of the type.
        size = image.abs().amax().clamp_min(torch.finfo(image.dtype).tiny)
        largest = torch.linalg.svdvals(image / size)[0] * size
        return torch.where(is_finite, largest, torch.nan), subspace
