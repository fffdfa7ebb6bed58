"""Signal propagation probability against Monte Carlo of the random walk that it models."""

import math

import pytest
import torch
from torch import Tensor

from lightning_qk.functional import (
    exact_signal_propagation_probability,
    qk_moments,
    signal_propagation_probability,
)
from lightning_qk.functional.propagation import _walk_moments


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


def test_walk_moments_are_those_of_the_walk():
    length = 12
    step = torch.ones(length, length, dtype=torch.float64).tril()  # position × step
    centred = step - step.mean(0)
    theta = torch.arange(1, length + 1, dtype=torch.float64) / length
    covariance, variance = _walk_moments(theta, length)
    torch.testing.assert_close(covariance, centred @ step[-1] / length)
    torch.testing.assert_close(variance, centred.square().sum(1) / length)
    limit = _walk_moments(theta, None)
    torch.testing.assert_close(_walk_moments(theta, 10**9), limit, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("degrees", [2, 5, 16])
def test_exact_law_at_the_last_token_of_the_identity_is_a_mixture_over_chi_square(degrees):
    # For θ = 1 and many tokens, b = ½ x_T + e / √12: with W = c I the logit is c x (x / 2 + e / √12), which given
    # |x|² is normal. Chi-square's density by quadrature.
    weights = 0.7 * torch.eye(degrees, dtype=torch.float64)
    got = exact_signal_propagation_probability(1.0, torch.eye(degrees)[None], weights[None]).item()
    square = torch.linspace(0, 120, 400_001, dtype=torch.float64)[1:]
    half = degrees / 2
    density = ((half - 1) * square.log() - square / 2 - half * math.log(2) - math.lgamma(half)).exp()
    deviation = 0.7 * (square / 12).sqrt()
    ends = [torch.special.ndtr((end - 0.35 * square) / deviation) for end in (1.0, 0.0)]
    want = torch.trapezoid((ends[0] - ends[1]) * density, square)
    assert got == pytest.approx(want.item(), abs=2e-4)


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_exact_law_agrees_with_monte_carlo_for_few_tokens_and_coordinates(length, rank):
    query, key = torch.randn(2, rank, 24) * 0.4
    thetas = [0.125, 0.5, 0.875, 1.0]
    simulated = monte_carlo(query.T @ key, thetas, length, walks=20_000)
    exact = exact_signal_propagation_probability(torch.tensor(thetas), query[None], key[None], length=length)
    assert exact.shape == (4, 1)
    assert (exact[:, 0] - simulated).abs().max() < 0.016  # 4.5 standard errors


def test_all_laws_agree_in_their_common_limit():
    query, key = torch.randn(400, 400) / 400, torch.randn(400, 400)
    theta = torch.tensor([0.1, 0.4, 0.8])
    found = qk_moments(query[None], key[None])
    moments = [found[name][0].double() for name in ("trace", "trace_sq", "frobenius_sq")]
    limit = signal_propagation_probability(theta, *moments)
    exact = exact_signal_propagation_probability(theta, query[None], key[None])[:, 0]
    torch.testing.assert_close(exact, limit, atol=0.006, rtol=0)
    finite = signal_propagation_probability(theta, *moments, length=10**7)
    torch.testing.assert_close(finite, limit, atol=1e-5, rtol=0)


def test_exact_law_of_a_head_without_weights_and_bad_input():
    nothing = torch.zeros(2, 4, 8)
    assert exact_signal_propagation_probability(0.75, nothing, nothing).tolist() == pytest.approx(
        [0.5, 0.5], abs=1e-4
    )
    assert exact_signal_propagation_probability(0.75, nothing, nothing, length=16).tolist() == pytest.approx(
        [1.0, 1.0], abs=1e-4
    )
    with pytest.raises(ValueError, match="repeat the keys"):
        exact_signal_propagation_probability(0.5, nothing, nothing[:1])
    for law in (
        lambda: signal_propagation_probability(0.5, *torch.ones(3), length=0),
        lambda: exact_signal_propagation_probability(0.5, nothing, nothing, length=0),
    ):
        with pytest.raises(ValueError, match="at least 1 token"):
            law()
