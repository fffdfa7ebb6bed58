"""Largest singular values against decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qk.functional.singular import leading_singular, starting_subspace, subspace_iteration


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_the_leading_triple_is_exact(rows, columns, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(rows, columns, generator=generator)
    sigma, u, v = leading_singular(matrix)
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma, torch.linalg.svdvals(matrix)[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(u @ matrix @ v, sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(matrix @ v, sigma * u, rtol=1e-4, atol=1e-5 * sigma.item())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
)
def test_estimates_come_from_below_and_become_exact(rows, columns, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(rows, columns, generator=generator)
    exact = torch.linalg.svdvals(matrix.double())[0].item()
    start = starting_subspace(columns, 8, device=matrix.device, dtype=matrix.dtype)
    rough, subspace = subspace_iteration(matrix, start, 1)
    assert rough.item() <= exact * (1 + 1e-5)
    fine, subspace = subspace_iteration(matrix, subspace, 60)
    assert fine.item() == pytest.approx(exact, rel=1e-4)
    assert rough <= fine * (1 + 1e-5)
    torch.testing.assert_close(subspace.mT @ subspace, torch.eye(subspace.shape[1]), rtol=0, atol=1e-4)


def test_nothing_has_the_value_zero():
    start = starting_subspace(5, 8, device=torch.device("cpu"), dtype=torch.float32)
    value, subspace = subspace_iteration(torch.zeros(7, 5), start, 2)
    assert value == 0
    assert subspace.isfinite().all()
    assert leading_singular(torch.zeros(3, 4))[0] == 0
