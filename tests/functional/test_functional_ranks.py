"""Kendall's τ_b against scipy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from lightning_qk.functional import kendall_tau

PAIRS = st.lists(st.tuples(st.integers(-4, 4), st.floats(-1, 1)), min_size=2, max_size=30)


@given(PAIRS)
@settings(max_examples=150, deadline=None)
def test_scipy_agrees_ties_included(pairs):
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    want = kendalltau(x.numpy(), y.numpy()).statistic
    assert kendall_tau(x, y).item() == pytest.approx(want, abs=1e-12, nan_ok=True)


@given(PAIRS)
@settings(max_examples=50, deadline=None)
def test_only_the_order_counts(pairs):
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    tau = kendall_tau(x, y)
    torch.testing.assert_close(kendall_tau(x**3, y), tau, equal_nan=True)
    torch.testing.assert_close(kendall_tau(-x, y), -tau, equal_nan=True)
    torch.testing.assert_close(kendall_tau(y, x), tau, equal_nan=True)


def test_leading_axes_broadcast():
    x, y = torch.randn(3, 2, 9).round(), torch.randn(3, 1, 9).round()
    tau = kendall_tau(x, y)
    assert tau.shape == (3, 2)
    for b in range(3):
        for h in range(2):
            want = kendalltau(x[b, h].numpy(), y[b, 0].numpy()).statistic
            assert tau[b, h].item() == pytest.approx(want, abs=1e-12)


def test_nothing_to_rank():
    values = torch.tensor([1.0, 2.0, 3.0])
    assert math.isnan(kendall_tau(values, torch.ones(3)))
    assert math.isnan(kendall_tau(values[:1], values[:1]))
    assert math.isnan(kendall_tau(values, torch.tensor([1.0, math.nan, 2.0])))
    assert kendall_tau(values, torch.tensor([-math.inf, 0.0, math.inf])) == 1.0
    with pytest.raises(ValueError, match="last axes of one length"):
        kendall_tau(values, torch.ones(4))
