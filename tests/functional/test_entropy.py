"""Entropy and divergence from a prior, and their gradients, against the whole map in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qk.functional import (
    attention_entropy,
    diagonal_prior,
    prior_divergence,
    uniform_prior,
    window_prior,
)
from lightning_qk.functional import (
    logits as module,
)

B, H, KV, N, D = 2, 4, 2, 9, 6


def dense_softmax(query, key, visible, *, scaling=None, bias=None, sinks=None, softcap=None, mask=None):
    """Logarithms of the probabilities over keys (and a sink's, last), all rows, float64."""
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for extra in (bias, mask):
        if extra is not None:
            logits = logits + extra
    logits = logits.masked_fill(~visible, -math.inf)
    if sinks is not None:
        sinks = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    return logits.log_softmax(-1)


def dense_entropy(log_p: Tensor, normalized: bool, visible: Tensor, sinks: bool) -> Tensor:
    entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)
    if not normalized:
        return entropy
    count = (visible.sum(-1) + sinks).double()
    return torch.where(count > 1, entropy / count.clamp_min(2).log(), math.nan)


def dense_divergence(log_p: Tensor, prior: Tensor, visible: Tensor) -> Tensor:
    masked = torch.where(visible, prior.double(), 0.0)
    total = masked.sum(-1, keepdim=True)
    own = masked / torch.where(total > 0, total, 1.0)
    log_own = torch.where(own > 0, own, 1.0).log()
    value = (own * (log_own - log_p[..., : own.shape[-1]].masked_fill(~visible, 0.0))).sum(-1)
    return torch.where(total[..., 0] > 0, value, math.nan)


def inputs(n=N, m=N, dtype=torch.float64, scale=1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + m)
    query = torch.randn(B, H, n, D, generator=generator, dtype=torch.float64) * scale
    key = torch.randn(B, KV, m, D, generator=generator, dtype=torch.float64) * scale
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def gradients(value: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every row or head has another weight, rows without a value left out."""
    weight = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).view(value.shape)
    return list(torch.autograd.grad((value.double().nan_to_num() * weight).sum(), tensors))


def causal(n=N, m=N, offset=0) -> Tensor:
    return (torch.arange(m) <= torch.arange(n)[:, None] + offset)[None, None]


PADDED = torch.ones(B, 1, 1, N, dtype=torch.bool)
PADDED[0, ..., :3] = False
PADDED[1, ..., 7:] = False
ROWS = PADDED[:, 0, 0, :, None].mT  # tokens that are none are left out as rows too
GENERATOR = torch.Generator().manual_seed(7)
BIAS = torch.randn(1, H, N, N, generator=GENERATOR, dtype=torch.float64)
SINKS = torch.randn(H, generator=GENERATOR, dtype=torch.float64)
ALL = torch.ones(1, 1, N, N, dtype=torch.bool)
ADDED = torch.randn(B, 1, N, N, generator=GENERATOR, dtype=torch.float64).masked_fill(
    ~(causal() & PADDED), torch.finfo(torch.float32).min
)
CASES = {
    "all": ({}, ALL, {}),
    "causal": ({"is_causal": True}, causal(), {}),
    "scaled": ({"is_causal": True, "scaling": 0.9}, causal(), {"scaling": 0.9}),
    "padded": ({"mask": PADDED}, ALL & PADDED, {}),
    "padded and causal": ({"mask": PADDED, "is_causal": True}, causal() & PADDED, {}),
    "window": (
        {"is_causal": True, "sliding_window": 3},
        causal() & (torch.arange(N) > torch.arange(N)[:, None] - 3),
        {},
    ),
    "function": (
        {"mask": lambda b, h, q, k: (q - k).abs() <= h},
        (torch.arange(N)[:, None] - torch.arange(N)).abs() <= torch.arange(H)[:, None, None],
        {},
    ),
    "added": ({"mask": ADDED}, causal() & PADDED, {"mask": ADDED}),
    "bias": ({"bias": BIAS, "is_causal": True}, causal(), {"bias": BIAS}),
    "sinks": ({"sinks": SINKS, "is_causal": True}, causal(), {"sinks": SINKS}),
    "soft cap": (
        {"softcap": 2.0, "bias": BIAS, "is_causal": True},
        causal(),
        {"softcap": 2.0, "bias": BIAS},
    ),
}
PRIORS = {
    "diagonal": diagonal_prior,
    "window": window_prior(3),
    "uniform": uniform_prior,
    "own": lambda b, h, position, key: torch.exp(-(position - key).abs().float()) * (h + 1) * (b + 1),
}


def as_matrix(prior, n=N, m=N, offset=0) -> Tensor:
    return prior(
        torch.arange(B)[:, None, None, None],
        torch.arange(H)[:, None, None],
        torch.arange(n)[:, None] + offset,
        torch.arange(m),
    ).expand(B, H, n, m)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks even in tests, the last shorter than the others."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", B * H * N * 2)


def valid_rows(name: str) -> Tensor:
    """A padded token's row counts nowhere."""
    padded = name in ("padded", "padded and causal", "added")
    return PADDED[:, :, 0, :] if padded else torch.ones(1, 1, N, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_entropy_and_its_gradient(name, normalized, dtype):
    given_arguments, visible, dense = CASES[name]
    visible = visible.expand(B, H, N, N)
    query, key = inputs(dtype=dtype)
    value = attention_entropy(query, key, normalized=normalized, reduction="none", **given_arguments)
    wanted_query, wanted_key = (x.detach().double().requires_grad_() for x in (query, key))
    log_p = dense_softmax(wanted_query, wanted_key, visible, **dense)
    wanted = dense_entropy(log_p, normalized, visible, "sinks" in dense)
    wanted = torch.where(valid_rows(name), wanted, math.nan)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    got = gradients(value, [query, key])
    want = gradients(wanted, [wanted_query, wanted_key])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=tolerance)
        assert other.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", CASES)
def test_divergence_and_its_gradient(name, prior, dtype):
    given_arguments, visible, dense = CASES[name]
    visible = visible.expand(B, H, N, N)
    query, key = inputs(dtype=dtype)
    value = prior_divergence(query, key, PRIORS[prior], reduction="none", **given_arguments)
    matrix = as_matrix(PRIORS[prior])
    as_tensor = prior_divergence(query, key, matrix, reduction="none", **given_arguments)
    torch.testing.assert_close(as_tensor, value, equal_nan=True, rtol=1e-6, atol=1e-6)
    wanted_query, wanted_key = (x.detach().double().requires_grad_() for x in (query, key))
    log_p = dense_softmax(wanted_query, wanted_key, visible, **dense)
    wanted = torch.where(valid_rows(name), dense_divergence(log_p, matrix, visible), math.nan)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    got = gradients(value, [query, key])
    want = gradients(wanted, [wanted_query, wanted_key])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=tolerance)
        assert other.abs().max() > 0.01


def test_gradients_of_bias_mask_sinks_and_prior():
    query, key = inputs()
    # A row of the window's prior over softly weighted keys; one of its rows has no mass at all.
    prior = (torch.rand(B, 1, N, N, dtype=torch.float64) + 0.1).requires_grad_()
    bias, sinks, mask = (x.clone().requires_grad_() for x in (BIAS, SINKS, ADDED))
    tensors = [query, key, bias, sinks, mask]
    arguments = {"bias": bias, "sinks": sinks, "mask": mask, "softcap": 3.0}
    visible = (causal() & PADDED).expand(B, H, N, N)

    for got, want, leaves in (
        (
            attention_entropy(query, key, normalized=True, reduction="none", **arguments),
            lambda log_p: dense_entropy(log_p, True, visible, True),
            tensors,
        ),
        (
            prior_divergence(query, key, prior, reduction="none", **arguments),
            lambda log_p: dense_divergence(log_p, prior, visible),
            [*tensors, prior],
        ),
    ):
        wanted = torch.where(
            valid_rows("added"), want(dense_softmax(query, key, visible, **arguments)), math.nan
        )
        torch.testing.assert_close(got, wanted, equal_nan=True)
        for one, other in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
            other = other.nan_to_num()
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
            assert other.abs().max() > 1e-3


@pytest.mark.parametrize("reduction", ["sequence", "batch"])
def test_means(reduction):
    query, key = inputs()
    rows = attention_entropy(query, key, mask=PADDED, reduction="none")
    axes = (2,) if reduction == "sequence" else (0, 2)
    for function, more in ((attention_entropy, ()), (prior_divergence, (diagonal_prior,))):
        rows = function(query, key, *more, mask=PADDED, reduction="none")
        mean = function(query, key, *more, mask=PADDED, reduction=reduction)
        torch.testing.assert_close(mean, rows.nanmean(axes))
        got, want = gradients(mean, [query, key]), gradients(rows.nanmean(axes), [query, key])
        torch.testing.assert_close(got, want)


def test_rows_of_a_cache():
    query, key = inputs(3, N)
    got = prior_divergence(
        query, key, diagonal_prior, is_causal=True, query_offset=N - 3, reduction="none", self_attention=True
    )
    visible = causal(3, N, N - 3).expand(B, H, 3, N)
    log_p = dense_softmax(query, key, visible)
    torch.testing.assert_close(got, -log_p[..., N - 3 :].diagonal(dim1=-2, dim2=-1))


def test_padding_may_hold_anything():
    query, key = inputs(dtype=torch.float32)
    want = attention_entropy(query, key, mask=PADDED)
    want_gradient = gradients(want, [query, key])
    spoilt = []
    for tensor in (query, key):
        other = tensor.detach().clone()
        other[0, :, :3] = math.nan
        other[1, :, 7:] = math.inf
        spoilt.append(other.requires_grad_())
    got = attention_entropy(*spoilt, mask=PADDED)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, spoilt), want_gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_its_own_rounding(dtype):
    query, key = inputs(dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (query, key)]
    for function, more in ((attention_entropy, ()), (prior_divergence, (uniform_prior,))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = function(query, key, *more, is_causal=True)
        want = function(*exact, *more, is_causal=True)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        for one, other in zip(gradients(got, [query, key]), gradients(want, exact), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other.to(dtype).double(), rtol=2e-2, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.0, 30.0), seed=st.integers(0, 1000), normalized=st.booleans())
def test_bounds(scale, seed, normalized):
    """Entropy lies between 0 and that of the uniform row; a divergence is never negative."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 2, 5, 4, generator=generator) * scale for _ in range(2))
    entropy = attention_entropy(query, key, normalized=normalized, reduction="none")
    assert (entropy >= -1e-5).all()
    assert (entropy <= (1 if normalized else math.log(5)) + 1e-5).all()
    prior = torch.rand(1, 2, 5, 5, generator=generator)
    assert (prior_divergence(query, key, prior) >= -1e-5).all()
    # Attention's own map is at no distance of itself.
    own = (query @ key.mT * 0.5).softmax(-1)
    assert prior_divergence(query, key, own).abs().max() < 1e-4
    # Over all keys, entropy and divergence from the uniform prior pull the other way round.
    if scale == 0:
        assert prior_divergence(query, key, uniform_prior).abs().max() < 1e-6


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize(
    "function",
    [
        lambda query, key: attention_entropy(query, key, is_causal=True, normalized=True),
        lambda query, key: prior_divergence(query, key, window_prior(8), is_causal=True),
        lambda query, key: prior_divergence(query, key, diagonal_prior, mask=lambda b, h, q, k: q >= k),
    ],
)
def test_memory_is_linear_in_length(function, monkeypatch):
    heads, d_head = 2, 8
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1 << 13)
    largest = {}
    for n in (128, 256, 512):
        query, key = (torch.randn(1, heads, n, d_head).requires_grad_() for _ in range(2))
        with LargestTensor() as counted:
            function(query, key).sum().backward()
        largest[n] = counted.largest
        # The inputs' own size, or one row of every head: never a map.
        assert counted.largest <= max(1 << 13, n * heads * d_head)
    assert largest[512] <= 4 * largest[128]


def test_no_map_is_kept_for_the_backward_pass():
    kept = []
    query, key = inputs(200, 200)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        prior_divergence(query, key, uniform_prior).sum()
    assert max(kept) <= query.numel()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: attention_entropy(q, k, reduction="mean"), "reduction"),
        (lambda q, k: prior_divergence(q, k, torch.ones(B, N, N + 1)), "prior\\[:, None\\]"),
        (lambda q, k: prior_divergence(q, k, "diagonal"), "tensor or a function"),
        (lambda q, k: prior_divergence(q, k, lambda b, h, i, j: torch.ones(3, 1, 1, 1)), "broadcasts"),
        (lambda q, k: prior_divergence(q, k, lambda b, h, i, j: 1.0), "got float"),
        (lambda q, k: attention_entropy(q, k[:1]), "key"),
        (lambda q, k: window_prior(0), "at least 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(*inputs())


def test_a_row_without_prior_mass_is_left_out():
    query, key = inputs()
    prior = torch.rand(B, H, N, N)
    prior[:, :, 4] = 0.0
    prior[:, :, 2, 0:3] = 0.0  # mass only on keys that causality hides
    rows = prior_divergence(query, key, prior, is_causal=True, reduction="none")
    assert rows.isnan().nonzero()[:, 2].unique().tolist() == [2, 4]
    got = gradients(rows, [query, key])
    assert all(one.isfinite().all() for one in got)
    assert got[0][:, :, [2, 4]].abs().max() == 0
