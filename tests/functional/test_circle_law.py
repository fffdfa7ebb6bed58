"""The disc of a random head's eigenvalues, against the eigenvalues of random heads."""

import math

import pytest
import torch

from lightning_qk.functional import circle_law_radius, circle_law_share, qk_eigenvalues, qk_moments


def random_heads(heads: int, d_head: int, d_model: int, kind: str = "normal") -> tuple[torch.Tensor, ...]:
    """Weights of different scales, whose product alone must matter."""
    generator = torch.Generator().manual_seed(d_head + d_model)
    shape = (2, heads, d_head, d_model)
    if kind == "normal":
        draws = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:
        draws = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return 0.02 * draws[0], 3.0 * draws[1]


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize(("d_head", "d_model"), [(64, 768), (128, 512), (96, 128), (128, 128)])
def test_random_heads_fill_the_disc(d_head: int, d_model: int, kind: str) -> None:
    query, key = random_heads(8, d_head, d_model, kind)
    radius = circle_law_radius(qk_moments(query, key)["frobenius_sq"], d_model)
    modulus = qk_eigenvalues(query, key).abs() / radius[:, None]
    assert float(modulus.amax(-1).mean()) == pytest.approx(1.0, abs=0.1)
    for distance in (0.2, 0.4, 0.6, 0.8, 0.95):
        share = float((modulus <= distance).double().mean())
        assert float(circle_law_share(torch.tensor(distance), d_head, d_model)) == pytest.approx(
            share, abs=0.04
        )


def test_a_learnt_head_does_not_follow_it() -> None:
    """A symmetric positive head has its eigenvalues far out: the law can be told from another."""
    query, _ = random_heads(8, 64, 768)
    radius = circle_law_radius(qk_moments(query, query)["frobenius_sq"], 768)
    modulus = qk_eigenvalues(query, query).abs() / radius[:, None]
    assert float(modulus.amax(-1).mean()) > 2


def test_the_share_solves_its_equation() -> None:
    modulus = torch.linspace(0, 1, 51, dtype=torch.float64)
    for d_head, d_model in ((1, 10**6), (64, 768), (64, 64)):
        share, c = circle_law_share(modulus, d_head, d_model), d_head / d_model
        torch.testing.assert_close(share * (1 - c + c * share), modulus.square())
        assert share[0] == 0
        assert share[-1] == pytest.approx(1)
        assert bool((share.diff() > 0).all())
    assert circle_law_share(torch.tensor([5.0]), 64, 64).item() == 1


def test_radius_of_the_stated_law() -> None:
    """R = √(a b d_head d_model) for entries of variances a and b."""
    query, key = random_heads(16, 64, 512)
    radius = circle_law_radius(qk_moments(query, key)["frobenius_sq"], 512).mean()
    assert float(radius) == pytest.approx(0.02 * 3.0 * math.sqrt(64 * 512), rel=0.01)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a head no wider than the model"):
        circle_law_share(torch.ones(1), 9, 8)
    with pytest.raises(ValueError, match="expected a d_model of at least 1"):
        circle_law_radius(torch.ones(1), 0)
