"""Signal propagation probability against Monte Carlo of the random walk that it models."""

import pytest
import torch
from torch import Tensor

from lightning_qk.functional import qk_moments, signal_propagation_probability


def monte_carlo(form: Tensor, thetas: list[float], length: int, walks: int = 4000) -> Tensor:
    """Share of walks whose token at θ lies in the linear window of the last query's row."""
    size = form.shape[0]
    generator = torch.Generator().manual_seed(1)
    hits = torch.zeros(len(thetas))
    for _ in range(walks // 500):
        tokens = torch.randn(500, length, size, generator=generator).cumsum(1)
        logits = torch.einsum("bd,de,bne->bn", tokens[:, -1], form, tokens)
        # The piecewise linear softmax of the last row.
        softmax = 1 / length + (logits - logits.mean(1, keepdim=True)) / length
        for index, theta in enumerate(thetas):
            value = softmax[:, int(theta * length) - 1]
            hits[index] += ((value > 0) & (value < 1)).sum()
    return hits / (walks // 500 * 500)


def moments_of(form: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = form.shape[0]
    moments = qk_moments(torch.eye(size)[None], form[None])
    return moments["trace"][0], moments["trace_sq"][0], moments["frobenius_sq"][0]


def random_symmetric(size: int, trace: float, trace_sq: float) -> Tensor:
    """A symmetric matrix with the asked first two moments and a random eigenbasis."""
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    values = torch.randn(size)
    values = values - values.mean()
    values = values * ((trace_sq - trace**2 / size) / values.square().sum()).clamp_min(0).sqrt()
    return basis @ (values + trace / size).diag() @ basis.T


@pytest.mark.parametrize(
    ("trace", "trace_sq", "theta", "table_monte_carlo", "table_formula"),
    [(0.0, 1.0, 0.95, 0.425, 0.424), (1.0, 0.106, 0.75, 0.965, 0.954)],
)
def test_symmetric_rows_of_the_table(trace, trace_sq, theta, table_monte_carlo, table_formula):
    form = random_symmetric(64, trace, trace_sq)
    formula = signal_propagation_probability(theta, *moments_of(form))
    assert formula.item() == pytest.approx(table_formula, abs=2e-3)
    simulated = monte_carlo(form, [theta], length=256)[0].item()
    assert simulated == pytest.approx(table_monte_carlo, abs=0.02)
    assert formula.item() == pytest.approx(simulated, abs=0.03)


def test_asymmetric_low_rank_row_of_the_table():
    # Rank 8, F = 1, θ = .1 as in the table; ξ and η, small there too, are those of the draw.
    left, right = torch.randn(8, 64), torch.randn(8, 64)
    form = left.T @ right
    form = form / form.norm()
    trace, trace_sq, frobenius_sq = moments_of(form)
    assert frobenius_sq.item() == pytest.approx(1, rel=1e-4)
    formula = signal_propagation_probability(0.10, trace, trace_sq, frobenius_sq)
    assert formula.item() == pytest.approx(monte_carlo(form, [0.10], length=256)[0].item(), abs=0.03)


def test_agrees_with_monte_carlo_over_positions():
    thetas = [0.1, 0.3, 0.6, 0.9]
    asymmetric = torch.randn(32, 32) / 32 + 0.03 * torch.eye(32)
    for form in (random_symmetric(32, 1.0, 0.5), asymmetric):
        formula = signal_propagation_probability(torch.tensor(thetas), *moments_of(form))
        assert (formula - monte_carlo(form, thetas, length=512)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("trace", "scale", "theta", "expected"),
    [
        (1.0, 0.0, 0.75, 1.0),  # localized on late tokens
        (1.0, 0.0, 0.25, 0.0),
        (-1.0, 0.0, 0.25, 1.0),  # mirrored
        (0.0, 1e-8, 0.75, 0.5),  # uniform
        (0.0, 0.0, 0.75, 0.5),
        (4.0, 0.0, 0.70, 1.0),  # window ½ < θ < ½ + 1/ξ
        (4.0, 0.0, 0.80, 0.0),
        (1.0, 1e8, 0.75, 0.0),  # saturated
    ],
)
def test_regimes(trace, scale, theta, expected):
    moments = torch.tensor([trace, scale, scale])
    assert signal_propagation_probability(theta, *moments).item() == pytest.approx(expected, abs=1e-3)


def test_broadcasts_and_is_differentiable():
    theta = torch.linspace(0, 1, 5)[:, None]
    moments = torch.rand(3, 4, requires_grad=True)
    out = signal_propagation_probability(theta, *moments)
    assert out.shape == (5, 4)
    assert ((out >= 0) & (out <= 1)).all()
    (gradient,) = torch.autograd.grad(out.sum(), moments)
    assert gradient.isfinite().all()
