"""Gradients of what is differentiable are finite on input that is valid and degenerate."""

import pytest
import torch

from lightning_qk.functional import (
    attention_entropy,
    hard_attention,
    prior_divergence,
    qk_moments,
    signal_propagation_probability,
    uniform_prior,
)

B, H, N, D = 2, 2, 5, 4


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


CASES = {
    "plain": {},
    "identical tokens": {"query": torch.ones(B, H, N, D).double(), "key": torch.ones(B, 1, N, D).double()},
    "zeros": {"query": torch.zeros(B, H, N, D).double(), "key": torch.zeros(B, 1, N, D).double()},
    "one token": {"query": draw(B, H, 1, D), "key": draw(B, 1, 1, D)},
    "huge": {"query": 1e15 * draw(B, H, N, D), "key": 1e15 * draw(B, 1, N, D)},
    "tiny": {"query": 1e-30 * draw(B, H, N, D), "key": 1e-30 * draw(B, 1, N, D)},
    "saturated cap": {"query": 1e9 * draw(B, H, N, D), "softcap": 5.0},
    "all hidden": {"mask": torch.zeros(N, N, dtype=torch.bool)},
    "some rows hidden": {"mask": torch.arange(N)[:, None].expand(N, N) > 2},
    "all padding": {"query_mask": torch.zeros(B, N, dtype=torch.bool)},
    "low bias": {"bias": torch.full((1, 1, N, N), -1e35).double()},
}
FUNCTIONS = {
    "entropy": lambda q, k, **call: attention_entropy(q, k, reduction="none", **call),
    "normalized entropy": lambda q, k, **call: attention_entropy(
        q, k, normalized=True, reduction="none", **call
    ),
    "divergence": lambda q, k, **call: prior_divergence(q, k, uniform_prior, reduction="none", **call),
    "hard": lambda q, k, query_mask=None, **call: hard_attention(q, k, draw(B, 1, k.shape[2], D), **call),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention(function, case, dtype):
    call = {"query": draw(B, H, N, D), "key": draw(B, 1, N, D), **CASES[case]}
    call = {name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in call.items()}  # fmt: skip
    query, key = (call.pop(name).clone().requires_grad_() for name in ("query", "key"))
    values = FUNCTIONS[function](query, key, **call)
    total = torch.where(values.isfinite(), values, 0.0).sum()
    for gradient in torch.autograd.grad(total, (query, key)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["sequence", "batch"])
def test_a_sequence_without_a_row_leaves_the_others_gradients_finite(reduction):
    """Its own mean is NaN, as documented; a loss that leaves it out gets no NaN by the way back."""
    query, key = draw(B, H, N, D).requires_grad_(), draw(B, 1, N, D).requires_grad_()
    keep = torch.ones(B, N, dtype=torch.bool)
    keep[0] = False
    found = attention_entropy(query, key, query_mask=keep, reduction=reduction)
    for gradient in torch.autograd.grad(found.nansum(), (query, key)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e15])
def test_moments(size):
    query = (size * torch.ones(2, 3, 4)).requires_grad_()
    found = qk_moments(query, torch.ones(2, 3, 4))
    for name in ("trace", "trace_sq", "frobenius_sq", "eig_mean", "eig_var", "sym_var"):
        (gradient,) = torch.autograd.grad(found[name].sum(), query, retain_graph=True)
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15, 1e30])
def test_propagation(size):
    moments = [torch.full((1,), size).requires_grad_() for _ in range(3)]
    found = signal_propagation_probability(torch.tensor([0.1, 0.5, 0.9])[:, None], *moments)
    assert found.isfinite().all()
    for gradient in torch.autograd.grad(found.sum(), moments):
        assert gradient.isfinite().all()
