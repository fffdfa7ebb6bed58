"""Sums of queries and keys against dense float64 moments, and their samples against all tokens."""

import pytest
import torch

from lightning_qk import TokenMoments
from lightning_qk.functional import Rotary, qk_moments
from lightning_qk.functional.token_sums import TokenLayout, moments_of, token_sums

HEADS, GROUPS, D_HEAD, WIDTH = 4, 2, 6, 10


def tokens(batch=3, n=50, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(batch, n, WIDTH, dtype=torch.float64) @ torch.randn(WIDTH, WIDTH).double() + 5
    x[:, 0] += 100
    query, key = torch.randn(HEADS, D_HEAD, WIDTH).double(), torch.randn(GROUPS, D_HEAD, WIDTH).double()
    q, k = (torch.einsum("btd,hed->bhte", x, weight) for weight in (query, key))
    return x, query, key, q, k


def sums(q, k, weight=None):
    weight = torch.ones(q.shape[0], q.shape[2]) if weight is None else weight
    place = ((weight > 0).long().cumsum(1) - 1).clamp_min(0)
    return token_sums(q, k, weight, weight, place, place).total[:, 0]


def covariance(x):
    flat = x.flatten(0, 1)
    return (flat - flat.mean(0)).T @ (flat - flat.mean(0)) / len(flat)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_spectra_are_those_of_the_dense_covariance(kind):
    x, query, key, q, k = tokens()
    # Two calls of different sizes, and a mean of tens of standard deviations.
    parts = [sums((q[i] + 300).to(kind), (k[i] + 300).to(kind)) for i in (slice(0, 1), slice(1, 3))]
    found = moments_of(sum(parts), TokenLayout(D_HEAD), GROUPS)
    want = qk_moments(0.5 * query, key, covariance(x[:, 1:]))
    for name, value in found.spectrum(0.5, n=WIDTH).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4 * float(want[name].abs().max()))
    rotary = Rotary(torch.tensor([1.0, 0.1]), start=2, scale=1.2)
    want = qk_moments(0.5 * query, key, covariance(x[:, 1:]), offset=-3, rotary=rotary)
    for name, value in found.spectrum(0.5, n=WIDTH, offset=-3, rotary=rotary).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4 * float(want[name].abs().max()))


def test_weights_and_padding():
    _, _, _, q, k = tokens()
    mask = torch.ones(3, 50)
    mask[:, :7] = 0
    q[:, :, :7] = k[:, :, :7] = torch.nan
    found = moments_of(sums(q, k, mask), TokenLayout(D_HEAD), GROUPS)
    want = TokenMoments.of(q, k, query_mask=mask > 0)
    torch.testing.assert_close(found.cross_scatter, want.cross_scatter)
    torch.testing.assert_close(found.key.scatter, want.key.scatter)
    torch.testing.assert_close(found.query.first_mean, want.query.first_mean)
    assert float(found.query.count) == float(want.query.count) == 3 * 42
    # A token that stands for two is that token twice.
    mask[:, 20] = 2
    twice = moments_of(sums(q, k, mask), TokenLayout(D_HEAD), GROUPS)
    q, k = (torch.cat([part, part[:, :, 20:21]], 2) for part in (q, k))
    want = TokenMoments.of(q, k, query_mask=torch.cat([mask > 0, torch.ones(3, 1, dtype=torch.bool)], 1))
    torch.testing.assert_close(twice.key.scatter, want.key.scatter)


def test_moments_of_another_sequence_have_no_spectrum():
    _, _, _, q, _ = tokens()
    _, _, _, _, k = tokens(n=30, seed=1)
    place = [torch.arange(n)[None].expand(3, -1) for n in (50, 30)]
    found = token_sums(q, k, torch.ones(3, 50), torch.ones(3, 30), *place, self_attention=False).total[:, 0]
    got = moments_of(found, TokenLayout(D_HEAD), GROUPS, self_attention=False)
    want = TokenMoments.of(q, k, self_attention=False)
    assert got.cross_scatter is None
    for side in ("query", "key"):
        torch.testing.assert_close(getattr(got, side).scatter, getattr(want, side).scatter)
        torch.testing.assert_close(getattr(got, side).first_mean, getattr(want, side).first_mean)


def test_a_sample_is_as_wide_as_all_tokens_up_to_a_known_bias():
    """Mean over many samples of 40 tokens, against all tokens."""
    torch.manual_seed(0)
    d, number = 8, 40
    q = torch.randn(1, 2, 2001, d).double()
    k = 0.5 * q + torch.randn(1, 2, 2001, d).double()
    want = moments_of(sums(q, k), TokenLayout(d), 2).spectrum()
    found = []
    for _ in range(400):
        index = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(2000)[:number]])
        weight = torch.cat([torch.ones(1), torch.full((number,), 2000 / number)])[None]
        found.append(moments_of(sums(q[:, :, index], k[:, :, index], weight), TokenLayout(d), 2).spectrum())
    for name in ("trace", "trace_sq"):
        values = torch.stack([one[name] for one in found])
        # The mean is that of the sample too: one token in 40.
        expected = (1 - 1 / number) ** (2 if name == "trace_sq" else 1) * want[name]
        if name == "trace_sq":
            expected = expected + (want["frobenius_sq"] + want["trace"] ** 2) / number
        error = values.std(0) / len(found) ** 0.5
        assert ((values.mean(0) - expected).abs() < 3 * error + 0.02 * expected.abs()).all(), name


def test_positions_share_means_and_further_sinks_are_a_class_of_their_own():
    torch.manual_seed(0)
    q, k = torch.randn(8, 2, 40, 6).double(), torch.randn(8, 2, 40, 6).double()
    q += torch.arange(40)[:, None]
    k[:, :, 0] += 30
    k[3, :, 17] += 30
    total = sums(q[:3], k[:3]) + sums(q[3:], k[3:])
    found = moments_of(total, TokenLayout(6), 2)
    want = TokenMoments.of(q, k)
    for side in ("query", "key"):
        got, own = getattr(found, side), getattr(want, side)
        number = own.slot_count.shape[1]
        torch.testing.assert_close(got.slot_count[:, :number], own.slot_count)
        torch.testing.assert_close(got.slot_sum[:, :number], own.slot_sum)
        assert not got.slot_count[:, number:].any()
    assert found.key.slot_count.sum(1).tolist() == [8 * 39 - 1, 1]
