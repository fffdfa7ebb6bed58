"""Effective rank, energy, entropy floor and update ratio against dense float64 and brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense_forms
from torch import Tensor

from lightning_qk.functional import (
    effective_rank,
    energy_concentration,
    entropy_floor,
    qk_singular_values,
    update_ratio,
)


def weights(
    heads: int = 4, kv_heads: int = 2, d_head: int = 3, d_model: int = 11, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count, d_head, d_model, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads)
    ]


def entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.double().softmax(-1)).sum(-1)


def test_rank_and_energy_of_a_head():
    query, key = weights()
    singular = torch.linalg.svdvals(dense_forms(query, key))[:, :3]
    got = qk_singular_values(query.float(), key.float())
    share = singular / singular.sum(-1, keepdim=True)
    want = (-(share * share.log()).sum(-1)).exp().float()
    torch.testing.assert_close(effective_rank(got), want, rtol=1e-5, atol=0)
    for s in (1, 2, 3, 9):
        want = (singular[:, :s].square().sum(-1) / singular.square().sum(-1)).float()
        torch.testing.assert_close(energy_concentration(got, s), want, rtol=1e-5, atol=0)


def test_rank_and_energy_at_their_ends():
    equal, one = torch.full((6,), 1e-20), torch.tensor([2e20, 0.0, 0.0])
    assert effective_rank(equal).item() == pytest.approx(6)
    assert energy_concentration(equal, 2).item() == pytest.approx(1 / 3)
    assert effective_rank(one).item() == pytest.approx(1)
    assert energy_concentration(one, 1).item() == 1
    for nothing in (torch.zeros(3), torch.tensor([1.0, math.nan])):
        assert effective_rank(nothing).isnan()
        assert energy_concentration(nothing, 1).isnan()
    with pytest.raises(ValueError, match="s of at least 1"):
        energy_concentration(equal, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.floats(1e-3, 30), st.integers(0, 2**31))
def test_no_row_in_the_ball_has_less_entropy_than_the_floor(n, sigma, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(500, n, generator=generator, dtype=torch.float64)
    # Also rows that are near to a single large logit.
    rows[250:, 0] += 10 * torch.rand(250, generator=generator, dtype=torch.float64)
    rows[250:, 1:] *= torch.rand(250, 1, generator=generator, dtype=torch.float64)
    rows *= (
        sigma
        * torch.rand(500, 1, generator=generator, dtype=torch.float64).sqrt()
        / rows.norm(dim=1)[:, None]
    )
    floor = entropy_floor(torch.tensor(sigma, dtype=torch.float64), n)
    assert (entropy(rows) >= floor - 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.floats(1e-3, 30))
def test_the_floor_is_attained(n, sigma):
    row = torch.full((n,), -sigma / math.sqrt(n * (n - 1)) if n > 1 else 0.0, dtype=torch.float64)
    row[0] = sigma * math.sqrt((n - 1) / n)
    assert row.norm().item() <= sigma * (1 + 1e-9)
    floor = entropy_floor(torch.tensor(sigma, dtype=torch.float64), n)
    assert floor.item() == pytest.approx(entropy(row).item(), rel=1e-9, abs=1e-12)
    # The same number as Zhai et al. write it.
    if n > 1:
        beta = math.exp(-sigma * math.sqrt(n / (n - 1)))
        partition = 1 + (n - 1) * beta
        written = math.log(partition) + sigma * math.sqrt(n * (n - 1)) * beta / partition
        assert floor.item() == pytest.approx(written, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.floats(1e-4, 20), st.integers(0, 2**31))
def test_the_floor_of_bounded_logits_is_the_least_of_all_corners(n, bound, seed):
    corners = bound * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
    floor = entropy_floor(torch.tensor(bound, dtype=torch.float64), n, norm="max")
    assert floor.item() == pytest.approx(entropy(corners).min().item(), rel=1e-9, abs=1e-12)
    inside = bound * (
        2 * torch.rand(300, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    )
    assert (entropy(inside) >= floor - 1e-9).all()


def test_floors_of_many_bounds_at_once():
    sigma = torch.tensor([0.0, 1e-6, 0.3, 4.0, 200.0, math.inf])
    for norm in ("euclidean", "max"):
        floor = entropy_floor(sigma, 1000, norm=norm)
        assert floor.dtype == torch.float32
        assert floor[0].item() == pytest.approx(math.log(1000), rel=1e-6)
        assert (floor.diff() <= 1e-6).all()
        assert floor[-2:].tolist() == [0.0, 0.0]
        want = entropy_floor(sigma.double(), 1000, norm=norm)
        torch.testing.assert_close(floor.double(), want, rtol=1e-5, atol=1e-6)
    assert (entropy_floor(sigma, 50, norm="max") >= entropy_floor(sigma * math.sqrt(50), 50) - 1e-5).all()
    with pytest.raises(ValueError, match="at least one key"):
        entropy_floor(1.0, 0)
    with pytest.raises(ValueError, match="norm to be"):
        entropy_floor(1.0, 3, norm="l1")


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_update_ratio(size):
    query, key = weights()
    step = weights(seed=1)
    after = [weight + size * change for weight, change in zip((query, key), step, strict=True)]
    got = update_ratio(*after, query, key)
    before = dense_forms(query, key)
    change = dense_forms(*after) - before
    want = torch.linalg.svdvals(change)[:, 0] / torch.linalg.svdvals(before)[:, 0]
    torch.testing.assert_close(got["qk"], want, rtol=1e-6, atol=0)
    for name, new, old in (("query", after[0], query), ("key", after[1], key)):
        want = torch.linalg.matrix_norm(new - old, ord=2) / torch.linalg.matrix_norm(old, ord=2)
        torch.testing.assert_close(got[name], want, rtol=1e-6, atol=0)
    # In single precision a small update keeps its digits, as far as the weights have them.
    if size >= 1e-3:
        single = [weight.float() for weight in (*after, query, key)]
        torch.testing.assert_close(update_ratio(*single)["qk"].double(), got["qk"], rtol=2e-3, atol=0)


def test_small_update_of_single_precision_weights_keeps_its_digits():
    query, key = (weight.float() for weight in weights(d_model=64))
    after = query * (1 + 2**-16), key  # exactly that factor times the weights, but for rounding
    change = (after[0] - query).double()
    form = dense_forms(change, key)
    want = torch.linalg.svdvals(form)[:, 0] / torch.linalg.svdvals(dense_forms(query, key))[:, 0]
    torch.testing.assert_close(update_ratio(*after, query, key)["qk"].double(), want, rtol=1e-4, atol=0)


def test_update_ratio_of_half_precision_and_what_has_none():
    query, key = (weight.bfloat16() for weight in weights())
    after = (query + 0.125).bfloat16(), (key * 1.5).bfloat16()
    got = update_ratio(*after, query, key)["qk"]
    wide = update_ratio(*(weight.double() for weight in (*after, query, key)))["qk"]
    torch.testing.assert_close(got.double(), wide, rtol=1e-5, atol=0)
    assert got.dtype == torch.float32
    same = update_ratio(query, key, query, key)
    assert all((value == 0).all() for value in same.values())
    broken = query.clone()
    broken[2, 0, 0] = math.nan
    assert update_ratio(broken, key, query, key)["qk"].isnan().tolist() == [False, False, True, False]
    assert update_ratio(broken, key, query, key)["query"].isnan().tolist() == [False, False, True, False]
    assert update_ratio(query, key, torch.zeros_like(query), key)["query"].isinf().all()
    with pytest.raises(ValueError, match="one shape before and after"):
        update_ratio(query, key, query[:2], key)


def test_wide_heads():
    """Twice d_head may be more than d_model."""
    query, key = weights(d_head=8)
    after = weights(d_head=8, seed=2)
    before = dense_forms(query, key)
    want = torch.linalg.svdvals(dense_forms(*after) - before)[:, 0] / torch.linalg.svdvals(before)[:, 0]
    torch.testing.assert_close(update_ratio(*after, query, key)["qk"], want, rtol=1e-8, atol=0)
