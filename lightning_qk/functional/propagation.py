"""Signal propagation probability of a head: from three moments of its spectrum, or exactly from its weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qk.functional._rows import Selection
from lightning_qk.functional.arguments import as_logits
from lightning_qk.functional.attention import MeanSums
from lightning_qk.functional.checks import floating, integer, number, one_device
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions
from lightning_qk.functional.precision import at_least_float32, full_precision

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Standard deviations beyond which a quadratic form of normal variables has no mass to speak of.
_FAR = 40.0
# How far the characteristic function is followed, by rank, in units of 1 / standard deviation: the fewer
# coordinates add up, the slower it decays.
_REACH = ((4, 200.0), (8, 40.0), (math.inf, 16.0))


def signal_propagation_probability(
    theta: float | Tensor, trace: Tensor, trace_sq: Tensor, frobenius_sq: Tensor, *, length: int | None = None
) -> Tensor:
    r"""How likely a token at relative position θ is inside the linear window of the last query's softmax.

    The softmax is approximated by a piecewise linear function; a token passes signal where it is neither at
    0 nor at 1. For tokens that are a Gaussian random walk ``x_t = x_{t−1} + z_t`` the logit at relative
    position θ = i/T is taken for a Gaussian of mean ``μ = (θ − ½) ξ`` and variance
    ``v = (θ − ½)² η + (θ² − θ + ⅓) F``, and the probability is ``Φ((1 − μ)/√v) − Φ(−μ/√v)``.

    The notion is that of Bao et al., ICML 2024 (arXiv 2402.02098); this form, which holds for non-symmetric
    ``W_QK`` as well, is derived. That the logit is Gaussian takes many coordinates: for T ≥ 512 it agrees with
    Monte Carlo to 0.03 where the effective rank ``F² / tr (W Wᵀ)²`` of ``W_QK`` is 48 or more, and to 0.06 where
    it is 16 or more (``examples/paper/theory.py``); :func:`exact_signal_propagation_probability` needs no such
    thing. Both are diagnostics of the weights under a model of the tokens, not measurements: ``linear_share`` of
    :func:`~lightning_qk.functional.attention_statistics` is their measured counterpart.

    Args:
        theta: relative position in [0, 1], a number or a tensor that broadcasts with the moments.
        trace: ξ = tr W_QK, of the matrix with the softmax scale s in it: s times the ``trace`` of
            :func:`~lightning_qk.functional.qk_moments`.
        trace_sq: η = tr W_QK², that is s² times ``trace_sq``.
        frobenius_sq: F = ‖W_QK‖²_F, that is s² times ``frobenius_sq``.
        length: T, for the walk's moments and the window of so many tokens; None is the limit of many.

    Returns:
        Probabilities in [0, 1], of the shape that the arguments broadcast to. Their gradient is not
        finite where F is 0.

    Raises:
        ValueError: ``length`` is not positive.

    Example:
        >>> one = torch.tensor(1.0)
        >>> round(signal_propagation_probability(0.95, 0 * one, one, one).item(), 3)
        0.424
    """
    moments = {"trace": trace, "trace_sq": trace_sq, "frobenius_sq": frobenius_sq}
    for name, moment in moments.items():
        floating(moment, name)
    one_device(**moments)
    result = at_least_float32(trace).dtype
    _check_shapes(theta, *moments.values())
    # In float64, where it exists: the variance is a square of what may be tiny.
    wide = result if trace.device.type == "mps" else torch.float64
    trace, trace_sq, frobenius_sq = (moment.to(wide) for moment in moments.values())
    position = _positions(theta, trace)
    low, high = _window(length)
    covariance, spread = _walk_moments(position, length)
    mean = covariance * trace
    variance = covariance.square() * trace_sq + spread * frobenius_sq
    # |η| ≤ F keeps the variance at F/12 or more; the floor is for F = 0, where it makes the limit exact: 1
    # inside the window, 0 outside, ½ on its edge.
    deviation = variance.clamp_min(torch.finfo(trace.dtype).tiny).sqrt()
    return (_normal_cdf((high - mean) / deviation) - _normal_cdf((low - mean) / deviation)).to(result)


def _positions(theta: object, like: Tensor) -> Tensor:
    """Relative positions as a tensor like another; a single one is looked at.

    Raises:
        ValueError: one that is no real number, or not in [0, 1].
    """
    if isinstance(theta, Tensor):
        return floating(theta, "theta").to(like)
    place = number(theta, "theta")
    if not 0 <= place <= 1:
        raise ValueError(f"expected theta to be between 0 and 1, got {place}: it is a relative position")
    return torch.as_tensor(place, dtype=like.dtype, device=like.device)


def _check_shapes(theta: object, *moments: Tensor) -> None:
    shapes = [tuple(part.shape) for part in (theta, *moments) if isinstance(part, Tensor)]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"expected theta and moments that broadcast, got shapes {shapes}: give theta an axis of its own, "
            "as in theta[:, None]"
        ) from None


def exact_signal_propagation_probability(
    theta: float | Tensor, query: Tensor, key: Tensor, *, length: int | None = None
) -> Tensor:
    r"""The same probability without taking the logit for Gaussian: the law of the walk itself.

    Derived. With b the token at θ relative to the mean of all tokens, ``b = c x_T + √(B − c²) e`` with e
    independent of x_T, the logit relative to its row's mean is a quadratic form of the standard normal
    ``(x_T, e)``. It is distributed as ``Σ λ χ²₁`` over the form's eigenvalues, whose characteristic function is
    ``Π (1 − 2iuλ)^(−½)``, and the probability of the window follows by the inversion of Gil-Pelaez (Biometrika
    1951) on equidistant points after Davies (Biometrika 1973).

    Within 0.011 of Monte Carlo, which is the latter's noise, at every length from 16 tokens and every rank from 1
    (``examples/paper/theory.py``). Costs an eigenproblem of twice the width for each θ and head.

    Args:
        theta: relative positions in [0, 1], a number or shape ``(positions,)``.
        query: ``W_q``, shape ``(heads, d_head, d_model)``; the softmax scale belongs to one of the two. For steps
            of covariance ``Σ = L Lᵀ`` give ``W_q L`` and ``W_k L``.
        key: ``W_k``, the same shape.
        length: T; None is the limit of many tokens.

    Returns:
        Shape ``(positions, heads)``, or ``(heads,)`` for a number; float64, not differentiable.

    Raises:
        ValueError: ``length`` is not positive, or the two weights do not have one shape of three dimensions.

    Example:
        >>> one_coordinate = torch.ones(1, 1, 1)
        >>> round(exact_signal_propagation_probability(0.95, one_coordinate, one_coordinate).item(), 3)
        0.672
    """
    floating(query, "query weights")
    floating(key, "key weights")
    one_device(query=query, key=key)
    if query.shape != key.shape or query.dim() != 3:
        raise ValueError(
            f"expected query and key weights of one shape (heads, d_head, d_model), got {tuple(query.shape)} "
            f"and {tuple(key.shape)}: repeat the keys that heads share"
        )
    if 0 in query.shape:
        raise ValueError(
            f"expected at least one head, a d_head and a d_model of at least 1, got {tuple(query.shape)}: "
            "pass the weights of a layer"
        )
    window = _window(length)
    positions = _positions(theta, query.new_empty((), dtype=torch.float64))
    if positions.dim() > 1:
        raise ValueError(f"expected theta of shape (positions,), got {tuple(positions.shape)}: flatten it")
    with torch.no_grad():
        probabilities = [
            _exact(positions.reshape(-1), own.double(), other.double(), length, window)
            for own, other in zip(query, key, strict=True)
        ]
    return torch.stack(probabilities, -1).reshape(*positions.shape, len(query))


def _exact(
    theta: Tensor, query: Tensor, key: Tensor, length: int | None, ends: tuple[float, float]
) -> Tensor:
    """The law of one head, ``(positions,)``."""
    if not bool(query.isfinite().all() & key.isfinite().all()):
        return torch.full_like(theta, torch.nan)
    # Coordinates outside the span of both projections have no part in it.
    _, values, basis = torch.linalg.svd(torch.cat([query, key]), full_matrices=False)
    basis = basis[values > 1e-10 * values[0]]
    form = (query @ basis.T).T @ (key @ basis.T)
    covariance, spread = _walk_moments(theta, length)
    rest = (spread - covariance.square()).clamp_min(0).sqrt()
    own = covariance[:, None, None] * (form + form.T) / 2
    cross = rest[:, None, None] * form / 2
    matrix = torch.cat([torch.cat([own, cross], 2), torch.cat([cross.mT, torch.zeros_like(own)], 2)], 1)
    weights = torch.linalg.eigvalsh(matrix)
    deviation = weights.square().sum(-1, keepdim=True).mul(2).sqrt()
    window = torch.tensor(ends, dtype=weights.dtype, device=weights.device)
    # No head: the logits are those of their mean, on which the window's edges decide.
    deviation = deviation.clamp_min(torch.finfo(weights.dtype).tiny)
    weights = weights / deviation
    places = (window / deviation - weights.sum(-1, keepdim=True)).clamp(-_FAR, _FAR)
    step = 2 * math.pi / (2.5 * _FAR)
    reach = next(far for rank, far in _REACH if len(form) <= rank)
    u = (torch.arange(round(reach / step), dtype=weights.dtype, device=weights.device) + 0.5) * step
    argument = 2 * u[:, None] * weights[:, None]
    phase = 0.5 * argument.atan().sum(-1) - u * weights.sum(-1, keepdim=True)
    size = (-0.25 * argument.square().log1p().sum(-1)).exp() / u
    turned = phase[:, None] - places[..., None] * u
    below = -(size[:, None] * turned.sin()).sum(-1) * step / math.pi
    return below.diff(dim=-1).squeeze(-1).clamp(0.0, 1.0)


def _walk_moments(theta: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    """``Cov(x_T, b) / T`` and ``Var(b) / T`` per coordinate, b the token at θ relative to the mean of all T."""
    if length is None:
        return theta - 0.5, theta.square() - theta + 1 / 3
    covariance = theta - (length + 1) / (2 * length)
    of_mean = (length + 1) * (2 * length + 1) / (6 * length**2)
    return covariance, theta + of_mean - theta * (2 - theta + 1 / length)


def _window(length: int | None) -> tuple[float, float]:
    """Between which logits, relative to their row's mean and in units of T, the softmax is taken to be linear."""
    if length is None:
        return 0.0, 1.0
    length = integer(length, "length")
    if length < 1:
        raise ValueError(
            f"expected a length of at least 1 token, got {length}: give None for the limit of many"
        )
    return -1 / length, 1 - 1 / length


def _normal_cdf(x: Tensor) -> Tensor:
    # erfc keeps precision in the lower tail, where 1 + erf cancels.
    return 0.5 * torch.erfc(-x / math.sqrt(2))


PROFILE_BINS = 10
"""Default number of equal bins for relative positions in [0, 1]."""

# In a row with few keys the window is wide and a part holds hardly one: such rows say nothing about position.
MIN_KEYS = 16


def linear_share_profile(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    bins: int = PROFILE_BINS,
    rows: int | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Share of (query, key) pairs in the window of the piecewise linear softmax, by relative position of the key.

    The measured counterpart of :func:`~lightning_qk.functional.signal_propagation_probability` as a curve: of the
    ``n_i`` keys that row i sees, the j-th is at ``θ = (j − ½) / n_i``, and the pair counts where
    ``0 < 1/n_i + (ω_ij − mean_j ω_ij)/n_i < 1``. Its mean over θ is ``linear_share`` of
    :func:`~lightning_qk.functional.attention_statistics` over the rows that see 16 keys or more; rows that see
    fewer are left out. After Bao et al. 2024; this form is derived.

    Args:
        query: ``(batch, heads, n, d_head)`` as the attention function gets it, or an :class:`AttentionLogits`.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        bins: into how many equal parts θ falls.
        rows: how many query rows to sample in each sequence; None for all.
        generator: where sampled rows are drawn from; None is torch's global generator.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`. Learnt sinks are no
            keys and have no part in this.

    Returns:
        Shares in [0, 1], shape ``(heads, bins)``, the earliest keys first; NaN where no row counts.

    Raises:
        ValueError: shapes that do not fit, a mask of another form, or ``rows`` or ``bins`` below 1.

    Example:
        >>> query, key = 1e-3 * torch.randn(2, 1, 4, 32, 8)  # tiny logits: every pair is inside
        >>> linear_share_profile(query, key, bins=2)[0]
        tensor([1., 1.])
    """
    sums = profile_sums(query, key, bins=bins, rows=rows, generator=generator, **options)
    return sums.means(per_sequence=False).mT


@torch.no_grad()
def profile_sums(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    bins: int = PROFILE_BINS,
    rows: int | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> MeanSums:
    """The additive form of :func:`linear_share_profile`, ``(bins, batch, heads)``; same arguments."""
    logits = as_logits(query, key, options)
    bins = integer(bins, "bins")
    if bins < 1:
        raise ValueError(f"expected bins of at least 1, got {bins}: pass how many parts positions fall into")
    batch, heads = logits.shape[:2]
    with full_precision(logits.device):
        selection = Selection(logits, rows=rows, generator=generator)
        source = selection.logits.in_range()
        total = torch.zeros(batch, heads, bins, dtype=source.dtype, device=source.device)
        weight = torch.zeros_like(total)
        for part in source.chunks(selection.count):
            chunk = source.chunk(selection.part(part), source.buffer(part.stop - part.start))
            x, count = chunk.logits, part.stop - part.start
            visible = torch.ones(1, 1, count, chunk.edge if chunk.shown is not None else x.shape[-1]).to(x)
            if chunk.shown is not None:
                visible = torch.cat([visible.expand(*chunk.shown.shape[:3], -1), chunk.shown], -1)
            number = visible.sum(-1, keepdim=True)
            keep = selection.used[:, None, part, None] & (number >= MIN_KEYS)
            visible = visible * keep
            number = number.clamp_min(1)
            window = x - (x * visible).sum(-1, keepdim=True) / number
            inside = ((window > -1) & (window < number - 1)) * visible
            # The place of a key among those that its row sees.
            place = ((visible.cumsum(-1) - 0.5) / number * bins).long().clamp(0, bins - 1)
            shape = (batch, heads, *x.shape[2:])
            place, visible = place.expand(shape), visible.expand(shape)
            empty = torch.zeros(*shape[:3], bins, dtype=x.dtype, device=x.device)
            total += empty.scatter_add(-1, place, inside.expand(shape)).sum(2)
            weight += empty.scatter_add(-1, place, visible).sum(2)
        scale = selection.weights().to(source.dtype)[..., None]
        return MeanSums(*((part * scale).movedim(-1, 0).to(logits.result_dtype) for part in (total, weight)))
