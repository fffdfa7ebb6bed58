"""Random heads, and the Gaussian random walk over tokens that the signal propagation probability models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qk.functional import qk_moments

D_MODEL = 64
# Sixteenths are whole positions in every length.
THETAS = [n / 16 for n in (1, 2, 4, 6, 7, 8, 9, 10, 12, 14, 15, 16)]
KINDS = ("symmetric", "mixed", "rotation", "independent")


@dataclass(frozen=True)
class Head:
    """Weights of one head: what they were drawn as, and the two matrices.

    Attributes:
        group: which experiment it is part of.
        kind: see :func:`draw_head`.
        d_head: rank of W_QK.
        trace: ξ that was asked for.
        spread: squared Frobenius norm of what is added to ``ξ / d_head`` times a projection.
        query, key: shape ``(d_head, d_model)``.
        sigma: covariance of the walk's steps; None is the identity.
    """

    group: str
    kind: str
    d_head: int
    trace: float
    spread: float
    query: Tensor
    key: Tensor
    sigma: Tensor | None = None

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """ξ, η and F of Σ^½ W_QK Σ^½."""
        found = qk_moments(self.query[None], self.key[None], self.sigma)
        return found["trace"][0], found["trace_sq"][0], found["frobenius_sq"][0]

    def form(self) -> Tensor:
        """The matrix between standard normal walks: ``Lᵀ W_QK L`` with ``Σ = L Lᵀ``."""
        form = self.query.T @ self.key
        if self.sigma is None:
            return form
        root = torch.linalg.cholesky(self.sigma)
        return root.T @ form @ root


def draw_head(
    group: str, kind: str, d_head: int, trace: float, spread: float, seed: int, sigma: Tensor | None = None
) -> Head:
    """A random head with a given trace whose W_QK has rank ``d_head``.

    ``W_QK = Uᵀ (ξ/r · U + √spread · E)`` with U of r orthonormal rows and ``‖E‖_F = 1``, where E is

    - symmetric: traceless symmetric on U's rows (real eigenvalues, variance spread / r),
    - rotation: antisymmetric on U's rows (eigenvalues in complex pairs),
    - mixed: half of each in squared norm,
    - independent: Gaussian and unrelated to U, as keys are at initialization. The trace is only close to ξ.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rows = torch.linalg.qr(normal(D_MODEL, d_head)).Q.T
    if kind == "independent":
        extra = normal(d_head, D_MODEL)
    else:
        square = normal(d_head, d_head)
        symmetric, rotation = (square + square.T) / 2, (square - square.T) / 2
        symmetric = symmetric - symmetric.trace() / d_head * torch.eye(d_head, dtype=torch.float64)
        weights = {"symmetric": (1.0, 0.0), "rotation": (0.0, 1.0), "mixed": (0.5**0.5, 0.5**0.5)}[kind]
        extra = sum(
            w * part / part.norm() for w, part in zip(weights, (symmetric, rotation), strict=True) if w
        )
        extra = extra @ rows
    key = trace / d_head * rows + spread**0.5 * extra / extra.norm()
    return Head(group, kind, d_head, trace, spread, rows.float(), key.float(), sigma)


def count_hits(seed: int, draws: int, forms: Tensor, lengths: list[int]) -> Tensor:
    """How many of some walks have their token at θ inside the window, ``(lengths, thetas, forms)``.

    The logits' deviation from their row's mean, over all T tokens, is ``x_Tᵀ W (x_t − x̄)``: of a walk only x_T
    and the tokens at the θs relative to the mean have to be kept, and one set of walks serves all forms and,
    by its beginnings, all lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    size = forms.shape[-1]
    wide = forms.permute(1, 0, 2).reshape(size, -1)  # (d, forms · d)
    counts = torch.zeros(len(lengths), len(THETAS), len(forms), dtype=torch.long)
    for start in range(0, draws, 100):
        steps = torch.randn(min(100, draws - start), max(lengths), size, generator=generator)
        walk = steps.cumsum(1)
        for row, length in enumerate(lengths):
            places = torch.tensor([round(theta * length) - 1 for theta in THETAS])
            tokens = walk[:, places] - walk[:, :length].mean(1, keepdim=True)
            seen = (walk[:, length - 1] @ wide).view(len(tokens), -1, size)
            share = (1 + torch.bmm(tokens, seen.mT)) / length
            counts[row] += ((share > 0) & (share < 1)).sum(0)
    return counts


def covariances() -> dict[str, Tensor]:
    """Steps that are not white, mean variance 1: a power law on the axes, and correlated by a random mix."""
    power = torch.arange(1, D_MODEL + 1).float().pow(-0.5)
    mix = torch.randn(D_MODEL, 2 * D_MODEL, generator=torch.Generator().manual_seed(7))
    wishart = mix @ mix.T
    found = {"power law": power.diag(), "correlated": wishart}
    return {name: sigma / sigma.diagonal().mean() for name, sigma in found.items()}


def effective_rank(head: Head) -> float:
    """``(Σ σ²)² / Σ σ⁴`` of the singular values of the form: how many coordinates add up to the logit."""
    squares = torch.linalg.svdvals(head.form().double()).square()
    return float(squares.sum().square() / squares.square().sum())
