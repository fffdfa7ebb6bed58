"""Input of any size: a statistic that does not depend on scale stays what it is, or is NaN, never another."""

import pytest
import torch
from oracles import dense_attention

from lightning_qk.functional import (
    attention_entropy,
    attention_on_keys,
    attention_statistics,
    circle_law_radius,
    effective_rank,
    energy_concentration,
    hard_attention,
    hidden_statistics,
    linear_share_profile,
    logit_statistics,
    max_logits,
    positional_share,
    prior_divergence,
    qk_moments,
    sink_statistics,
    uniform_prior,
    update_ratio,
)

SCALES = [1e-30, 1e-22, 1e-19, 1e-12, 1e-4, 1e4, 1e12, 1e19, 1e22, 1e30]
# Of queries and keys both: logits up to 1e37, of which float32 can still add up a few.
LARGE = [1e6, 1e12, 1e15, 3e15, 1e17, 1e18]
BATCH, HEADS, N, D = 2, 4, 9, 8
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()[None, None]


def tensors(size: float = 1.0, dtype=torch.float32):
    torch.manual_seed(1)
    query, key, value = (
        torch.randn(BATCH, HEADS, N, D),
        torch.randn(BATCH, 2, N, D),
        torch.randn(BATCH, 2, N, D),
    )
    return (query * size).to(dtype), (key * size).to(dtype), value


def same(got: torch.Tensor, want: torch.Tensor, name: str, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    want = torch.where(got.isnan(), torch.nan, want.double())
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-15, 1e-10, *LARGE])
def test_logits_of_any_size(size, dtype):
    """As dense softmax in float64, hidden keys larger and smaller than all that is seen among them."""
    query, key, _value = tensors(size, dtype)
    want = dense_attention(query, key, CAUSAL)
    for hidden in ({"is_causal": True}, {"mask": CAUSAL}, {"mask": lambda b, h, i, j: j <= i}):
        got = attention_statistics(query, key, **hidden)
        for name, value_ in got.items():
            assert not value_.isnan().any(), name
            same(value_, want[name], name, atol=0 if name == "logit_std" else 1e-6)
    # The largest key is hidden from all rows but the last, and all that is seen is far below zero.
    entropy = attention_entropy(query, key, is_causal=True, reduction="batch")
    same(entropy, want["entropy"], "entropy")
    same(max_logits(query, key, is_causal=True), want["max_logit"], "max_logit")


@pytest.mark.parametrize("low", [-1e30, -1e32, -1e35, -1e38])
def test_rows_that_see_only_very_low_logits(low):
    """The bias is far below what hidden keys were once pushed down by."""
    query, key, value = (0 * part for part in tensors())
    bias = torch.full((1, 1, N, N), low).masked_fill(~CAUSAL, -low)
    number = torch.arange(1, N + 1).double()
    got = attention_statistics(query, key, bias=bias, is_causal=True)
    same(got["entropy"], number.log().mean().expand(HEADS), "entropy", rtol=1e-6)
    same(got["max_logit"], torch.tensor(low).expand(HEADS), "max_logit", rtol=1e-6)
    marked = torch.zeros(N, dtype=torch.bool)
    marked[0] = True
    for name, mass in attention_on_keys(query, key, marked, bias=bias, is_causal=True).items():
        assert not mass.isnan().any()
        same(mass, number.reciprocal().mean().expand(HEADS), name)
    value = value + torch.arange(1.0, D + 1)
    with_bias = sink_statistics(query, key, value, bias=bias, is_causal=True)
    for name, plain in sink_statistics(query, key, value, is_causal=True).items():
        torch.testing.assert_close(with_bias[name], plain, equal_nan=True)
    divergence = prior_divergence(query, key, uniform_prior, bias=bias, is_causal=True, reduction="none")
    assert divergence.abs().max() < 1e-5
    mine = torch.randn(BATCH, 2, N, D)
    first = hard_attention(query, key, mine, bias=bias, is_causal=True)
    torch.testing.assert_close(first, mine[:, :, :1].repeat_interleave(2, 1).expand(-1, -1, N, -1))


@pytest.mark.parametrize("size", [1e19, 1e30, 1e36])
def test_given_logits_of_any_size(size):
    torch.manual_seed(2)
    logits = torch.rand(BATCH, HEADS, N, N) * size
    got = logit_statistics(logits.masked_fill(~CAUSAL, -torch.inf))
    wide = logits.double().masked_fill(~CAUSAL, 0).sum(-1) / CAUSAL.sum(-1)
    square = (logits.double() - wide[..., None]).square().masked_fill(~CAUSAL, 0).sum(-1) / CAUSAL.sum(-1)
    same(got["logit_std"], square.sqrt().mean((0, 2)), "logit_std")
    assert (got["entropy"] < 0.01).all()
    same(got["max_logit"], logits.masked_fill(~CAUSAL, 0).amax((0, 2, 3)), "max_logit")


def test_a_divergence_that_no_number_holds_is_infinite():
    query, key, _ = (0 * part for part in tensors())
    bias = torch.zeros(1, 1, N, N)
    bias[..., 0] = -torch.inf
    assert prior_divergence(query, key, uniform_prior, bias=bias).isposinf().all()


@pytest.mark.parametrize("size", [1e6, 1e12, 1e15, 1e18])
def test_gradients_of_large_logits_are_finite(size):
    query, key, _ = tensors(size)
    bias = torch.zeros(1, HEADS, N, N)
    inputs = [part.requires_grad_() for part in (query, key, bias)]
    for function in (attention_entropy, lambda *a, **k: prior_divergence(*a, uniform_prior, **k)):
        total = function(*inputs[:2], bias=bias, is_causal=True).sum()
        for gradient in torch.autograd.grad(total, inputs):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("size", SCALES)
def test_hidden_statistics(size):
    torch.manual_seed(3)
    x = torch.randn(3, 7, 5)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    want = hidden_statistics(x.double(), mask=mask)
    got = hidden_statistics(x * size, mask=mask)
    for name in ("rank_residual_relative", "cosine", "cosine_abs", "effective_rank"):
        assert not got[name].isnan(), name
        same(got[name], want[name], name)
    lengths = (
        "rank_residual",
        "token_norm",
        "singular_min",
        "singular_max",
        "activation_top_1",
        "activation_median",
    )
    for name in lengths:
        same(got[name], want[name] * size, name, rtol=1e-3, atol=0)
    # Tokens of very different sizes have cosines too.
    turned = x * (size ** torch.arange(-0.5, 0.51, 1 / 6))[:, None]
    for name in ("cosine", "cosine_abs"):
        same(hidden_statistics(turned)[name], hidden_statistics(x.double())[name], name)


@pytest.mark.parametrize("size", SCALES)
def test_sinks_do_not_depend_on_the_size_of_values(size):
    query, key, value = tensors()
    value[:, :, ::3] *= 0.1
    want = sink_statistics(3 * query, 3 * key, value.double(), is_causal=True)
    for name, got in sink_statistics(3 * query, 3 * key, value * size, is_causal=True).items():
        same(got, want[name], name)


@pytest.mark.parametrize("size", [*SCALES, 1e37])
def test_singular_values(size):
    values = torch.tensor([5.0, 3.0, 1.0, 0.5])
    same(effective_rank(values * size), effective_rank(values), "effective_rank")
    same(energy_concentration(values * size, 2), energy_concentration(values, 2), "energy_concentration")


def test_infinite_and_negative_singular_values_have_no_rank():
    assert effective_rank(torch.tensor([[1.0, torch.inf], [1.0, -1.0], [0.0, 0.0]])).isnan().all()


@pytest.mark.parametrize("size", SCALES)
def test_weights(size):
    torch.manual_seed(4)
    query, key = torch.randn(4, 3, 6), torch.randn(2, 3, 6)
    change = torch.randn(4, 3, 6) / 10
    want = qk_moments(query.double(), key.double())
    for other in (size, 1 / size, 1.0):
        got = qk_moments(query * size, key * other)
        for name in ("asymmetry", "concentration"):
            assert not got[name].isnan().any(), name
            same(got[name], want[name], name)
        powers = {"trace": 1, "eig_mean": 1, "trace_sq": 2, "frobenius_sq": 2, "eig_var": 2, "sym_var": 2}
        for name, power in powers.items():
            scaled = want[name] * (size * other) ** power
            held = (scaled.abs() < 1e38) & (scaled.abs() > 1e-36)
            same(got[name][held], scaled[held], name, atol=0, rtol=2e-4)
        small = update_ratio((query + change) * size, key * other, query * size, key * other)
        for name, ratio in update_ratio(query + change, key, query, key).items():
            assert not small[name].isnan().any(), name
            same(small[name], ratio, name, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-20, 1e-15, 1e-11, 1e-4, 1e4, 1e12, 1e18])
def test_positional_share(size):
    query, key, _ = tensors()
    want = positional_share(query.double(), key.double(), is_causal=True)
    got = positional_share(query * size, key * size, is_causal=True)
    assert not got.isnan().any()
    same(got, want, "positional_share")


def test_profile_of_logits_that_are_all_low():
    query, key = torch.zeros(2, 1, 2, 32, 4)
    bias = torch.full((1, 1, 32, 32), -1e35)
    assert torch.equal(linear_share_profile(query, key, bias=bias, is_causal=True), torch.ones(2, 10))


@pytest.mark.parametrize("size", SCALES)
def test_radius(size):
    norm = torch.tensor([3.0, 7.0])
    same(circle_law_radius(norm * size, 16), (norm.double() * size / 16).sqrt(), "radius", atol=0)
