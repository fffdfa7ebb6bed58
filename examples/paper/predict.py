"""What a head's weights and its tokens' moments say about its share of pairs in the linear window.

Two pictures of the tokens: the random walk of the theory, and tokens that are drawn independently.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_qk.functional import qk_moments, signal_propagation_probability
from lightning_qk.functional.rotary import rotate
from lightning_qk.heads.projections import HeadProjections

_DRAWS = 512  # of queries a head


def normal_cdf(x: Tensor) -> Tensor:
    """Φ."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def scaled_moments(layer: HeadProjections, sigma: Tensor | None = None, **where: Any) -> dict[str, Tensor]:
    """Moments of ``s Σ^½ W_QK Σ^½``, the softmax scale s in them, in float64; each ``(heads,)``."""
    moments = qk_moments(layer.query.detach().double(), layer.key.detach().double(), sigma, **where)
    power = {"trace": 1, "eig_mean": 1, "trace_sq": 2, "frobenius_sq": 2, "eig_var": 2, "sym_var": 2}
    return {name: value * layer.scaling ** power.get(name, 0) for name, value in moments.items()}


def walk_probability(
    theta: Tensor,
    trace: Tensor,
    trace_sq: Tensor,
    frobenius_sq: Tensor,
    *,
    place: float | Tensor = 1.0,
    keys: float | Tensor = math.inf,
    symmetric: bool = False,
) -> Tensor:
    r"""Probability of the linear window for tokens that are a random walk, the query anywhere in it.

    With the query at relative position τ the logit over T is close to a Gaussian with mean ``c ξ`` and variance
    ``c² η + τ (θ² − θ + ⅓) F``, ``c = min(τ, θ) − τ + τ²/2``; at τ = 1 that is
    :func:`lightning_qk.functional.signal_propagation_probability`. Over T = ``keys`` tokens the window is
    ``−1/T < … < 1 − 1/T``: the formula's limit drops 1/T. Derived [D].

    Args:
        theta: relative position of the key.
        trace: ξ of ``s Σ^½ W_QK Σ^½``, Σ the covariance of the walk's steps.
        trace_sq: η of the same.
        frobenius_sq: F of the same.
        place: τ.
        keys: T.
        symmetric: the form for a symmetric ``W_QK``, with η where F stands; NaN where the variance is negative.
    """
    place = torch.as_tensor(place, dtype=trace.dtype)
    small = 1 / torch.as_tensor(keys, dtype=trace.dtype)
    centre = torch.minimum(place, theta) - place + place.square() / 2
    other = trace_sq if symmetric else frobenius_sq
    variance = centre.square() * trace_sq + place * (theta.square() - theta + 1 / 3) * other
    deviation = torch.where(variance > 0, variance, torch.nan).sqrt()
    mean = centre * trace
    return normal_cdf((1 - small - mean) / deviation) - normal_cdf((-small - mean) / deviation)


def walk(
    moments: dict[str, Tensor],
    bins: int,
    *,
    is_causal: bool,
    keys: float = math.inf,
    matched: bool = False,
    symmetric: bool = False,
) -> Tensor:
    """Prediction by relative position of the key, ``(bins, heads)``.

    Args:
        moments: of :func:`scaled_moments`.
        bins: how many parts of [0, 1].
        is_causal: every query is the last of the tokens that it sees; else it may be anywhere among them.
        keys: how many tokens; infinite for the formula's limit.
        matched: Σ is that of the tokens, and the walk is one whose tokens have this variance on average: its
            steps have 2 Σ / T.
        symmetric: see :func:`walk_probability`.
    """
    theta = midpoints(bins)[:, None]
    factor = 2 / keys if matched else 1.0
    xi, eta, norm = (
        moments["trace"] * factor,
        moments["trace_sq"] * factor**2,
        moments["frobenius_sq"] * factor**2,
    )
    if is_causal and math.isinf(keys) and not symmetric:
        return signal_propagation_probability(theta, xi, eta, norm)
    places = [torch.tensor(1.0)] if is_causal else list(midpoints(bins))
    rows = [
        walk_probability(theta, xi, eta, norm, place=place, keys=keys, symmetric=symmetric)
        for place in places
    ]
    return torch.stack(rows).mean(0)


def midpoints(bins: int) -> Tensor:
    """Midpoints of equal parts of [0, 1]."""
    return (torch.arange(bins, dtype=torch.float64) + 0.5) / bins


def independent(
    layer: HeadProjections,
    mean: Tensor,
    covariance: Tensor,
    *,
    keys: int,
    is_causal: bool,
    rotate_keys: bool = True,
) -> Tensor:
    r"""The share of the linear window for tokens drawn independently from a Gaussian, ``(heads,)``.

    Given the query q, logits minus their mean over the row are then close to a Gaussian of variance
    ``s² qᵀ C q`` with C the covariance of the keys: within ``−1 < ω − ω̄ < n − 1`` with probability
    ``Φ((n − 1)/σ) − Φ(−1/σ)``, which is averaged over Gaussian queries. Under rotary encoding C is averaged over
    relative positions, and has the spread of the rotated mean key in it. Derived [D].

    Args:
        layer: of :func:`lightning_qk.head_projections`, biases included.
        mean: of the tokens, ``(d,)``.
        covariance: of the tokens, ``(d, d)``.
        keys: n.
        is_causal: keys come before their query.
        rotate_keys: False leaves the rotation out.
    """
    query, key = layer.query.detach().double(), layer.key.detach().double()
    groups = query.shape[0] // key.shape[0]
    query_mean, key_mean = query @ mean, key @ mean
    if layer.query_bias is not None:
        query_mean = query_mean + layer.query_bias.detach().double()
    if layer.key_bias is not None:
        key_mean = key_mean + layer.key_bias.detach().double()
    spread = key @ covariance @ key.mT
    if rotate_keys and layer.rotary is not None:
        spread = _rotated(layer.rotary, spread, key_mean, keys, is_causal)
    spread = spread.repeat_interleave(groups, 0)
    factor = torch.linalg.cholesky(_lifted(query @ covariance @ query.mT))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(query.shape[0], _DRAWS, query.shape[1], dtype=torch.float64, generator=generator)
    queries = query_mean[:, None] + noise @ factor.mT
    deviation = layer.scaling * ((queries @ spread) * queries).sum(-1).clamp_min(1e-30).sqrt()
    return (normal_cdf((keys - 1) / deviation) - normal_cdf(-1 / deviation)).mean(-1)


def _rotated(rotary: Any, spread: Tensor, key_mean: Tensor, keys: int, is_causal: bool) -> Tensor:
    """Covariance of keys over tokens and over relative positions from 0 to −(n − 1), or both ways."""
    rotary = rotary._replace(scale=rotary.scale**2)  # that of the query too
    offsets = torch.arange(1 - keys, 1 if is_causal else keys)
    half = rotate(spread, rotary, offsets).mT
    whole = torch.stack([rotate(part, rotary, step) for part, step in zip(half, offsets, strict=True)])
    turned = rotate(key_mean[..., None], rotary, offsets)[..., 0]
    apart = turned - turned.mean(0)
    return whole.mean(0) + torch.einsum("ohi,ohj->hij", apart, apart) / len(offsets)


def _lifted(matrix: Tensor) -> Tensor:
    """A covariance with what rounding may have taken from its smallest eigenvalues."""
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return matrix + 1e-9 * size * torch.eye(matrix.shape[-1], dtype=matrix.dtype)
