"""The solvable model of attention at infinite width: its minima as fixed points of a few scalar equations.

Cui, Behrens, Krzakala and Zdeborová 2024 (arXiv 2402.03902) characterize the minima of the training loss for d → ∞
at n = α d samples by state evolution. The equations are read from the authors' released code and derived again for
two tokens with covariance σ² I; nothing is simulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STARTS = {"positional": (0.02, 0.2, 15.0, 0.0), "semantic": (0.5, 0.0, 15.0, 0.2)}


@dataclass(frozen=True)
class Task:
    """Parameters of the model, as in :class:`positional.Model`."""

    omega: float
    sigma: float
    decay: float
    mixing: tuple[tuple[float, float], tuple[float, float]]


def normal_points(power: int, seed: int = 0) -> Tensor:
    """``2^power`` evenly spread points (Sobol) of a standard normal law in four dimensions, ``(points, 4)``.

    With each point are those with the signs of its first two, its last two and all its coordinates turned, so that
    what vanishes by symmetry is exactly 0.
    """
    uniform = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed).draw(
        2 ** (power - 2), dtype=torch.float64
    )
    points = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64).repeat_interleave(2, 1)
    return (points * signs[:, None]).flatten(0, 1)


def attention(h: Tensor) -> Tensor:
    """What each of two tokens gives to itself under ``softmax(h hᵀ)``; shape of h, ``(2, points)``."""
    return torch.sigmoid(h * (h - h.flip(0)))


def energy(h: Tensor, centre: Tensor, stiffness: float, wish: Tensor, sigma: float) -> Tensor:
    """``Σ (h − centre)² / V + σ² ‖S(h) − Y‖²`` of each point.

    Args:
        h: fields of the two tokens, ``(2, points)``.
        centre: where they would be without this sample.
        stiffness: V.
        wish: what the target Y gives each token to itself.
        sigma: of the tokens.
    """
    # Rows of both matrices sum to 1: each row's squared distance is twice that of its own entry.
    return ((h - centre).square() / stiffness + 2 * sigma**2 * (attention(h) - wish).square()).sum(0)


def proximal(centre: Tensor, stiffness: float, wish: Tensor, sigma: float, starts: list[Tensor]) -> Tensor:
    """The minimum of :func:`energy` over h for each point, by Newton's method from several starts."""
    best, lowest = starts[0], torch.full_like(centre[0], torch.inf)
    for h in starts:
        value = energy(h, centre, stiffness, wish, sigma)
        for _ in range(12):
            h, value = _newton_step(h, value, centre, stiffness, wish, sigma)
        better = value < lowest
        best, lowest = torch.where(better, h, best), torch.where(better, value, lowest)
    return best


def _newton_step(
    h: Tensor, value: Tensor, centre: Tensor, stiffness: float, wish: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    share = attention(h)
    spread = share * (1 - share)
    first = 4 * sigma**2 * (share - wish)
    slope = first * spread  # by u = h² − h h'
    bend = 4 * sigma**2 * spread.square() + first * spread * (1 - 2 * share)
    own, cross = 2 * h - h.flip(0), -h  # of u by the token's own field and by the other's
    gradient = 2 * (h - centre) / stiffness + slope * own + (slope * cross).flip(0)
    diagonal = 2 / stiffness + bend * own.square() + 2 * slope + (bend * cross.square()).flip(0)
    mixed = (bend * own * cross - slope).sum(0)
    # Shifted to be positive where it is not.
    middle = diagonal.mean(0)
    lowest = middle - ((diagonal[0] - diagonal[1]).square() / 4 + mixed.square()).sqrt()
    diagonal = diagonal + (0.1 / stiffness - lowest).clamp_min(0)
    determinant = diagonal[0] * diagonal[1] - mixed.square()
    step = (diagonal.flip(0) * gradient - mixed * gradient.flip(0)) / determinant
    size = torch.ones_like(value)
    for _ in range(6):
        trial = energy(h - size * step, centre, stiffness, wish, sigma)
        size = torch.where(trial <= value, size, size / 2)
    h_new = h - size * step
    trial = energy(h_new, centre, stiffness, wish, sigma)
    better = trial <= value
    return torch.where(better, h_new, h), torch.where(better, trial, value)


def solve(
    task: Task,
    alpha: float,
    start: Sequence[float],
    points: Tensor,
    *,
    damping: float = 0.8,
    iterations: int = 400,
    tolerance: float = 1e-6,
) -> dict[str, float]:
    """One fixed point at one sample complexity.

    Args:
        task: the model.
        alpha: samples over d.
        start: q, m, V and the overlap of the fields, σ² θ, to begin from.
        points: from :func:`normal_points`.
        damping: share of the old values in the next ones.
        iterations: at most so many.
        tolerance: the largest change at which it ends.

    Returns:
        ``loss``, the training loss over d, ``theta`` = Q⋆ᵀQ / d, ``m`` = 1ᵀQ / d, ``q`` = σ² ‖Q‖² / d, and
        ``change``, that of the last iteration.
    """
    variance = task.sigma**2
    mixing = torch.tensor(task.mixing, dtype=torch.float64)
    noise, other = points[:, :2].T, points[:, 2:].T
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    q, m, v, overlap = start
    h = torch.zeros_like(noise)
    change = torch.inf
    for _ in range(iterations):
        rest = max(variance - overlap**2 / q, 1e-12) ** 0.5
        wish = (1 - task.omega) * attention(rest * other + overlap / q**0.5 * noise)
        wish = wish + task.omega * mixing.diagonal()[:, None]
        centre = q**0.5 * noise + m * sign
        h = proximal(centre, v, wish, task.sigma, [h, centre])
        force = (h - centre) / v
        q_hat = alpha * float(force.square().sum(0).mean())
        m_hat = alpha * float((force * sign).sum(0).mean())
        overlap_hat = alpha * float((force * other).sum(0).mean()) / rest
        v_hat = -alpha * float((force * noise).sum(0).mean()) / q**0.5 + overlap * overlap_hat / q
        scale = task.decay + v_hat * variance
        new = (
            variance * (q_hat * variance + m_hat**2 + overlap_hat**2 * variance**2) / scale**2,
            m_hat / scale,
            variance / scale,
            variance**2 * overlap_hat / scale,
        )
        change = max(abs(new[0] - q), abs(new[1] - m), abs(new[3] - overlap))
        q, m, v, overlap = (
            (1 - damping) * one + damping * old for one, old in zip(new, (q, m, v, overlap), strict=True)
        )
        if change < tolerance:
            break
    error = variance * (attention(h) - wish).square().sum(0).mean()
    return {
        "loss": alpha * float(error) + task.decay / 2 * q / variance,
        "theta": abs(overlap) / variance,
        "m": abs(m),
        "q": q,
        "change": change,
    }
