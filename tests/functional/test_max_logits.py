"""Largest logits against dense ones."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qk.functional import attention_statistics, max_logits
from lightning_qk.functional import logits as module


def qk(batch=3, heads=4, kv_heads=2, n=13, m=13, d=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n, d, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, m, d, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def dense(query, key, visible, scaling) -> torch.Tensor:
    """(batch, heads) maxima by definition, of all rows."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query.double() @ key.double().mT) * scaling
    return logits.masked_fill(~visible.expand_as(logits), -torch.inf).amax((-1, -2))


def picked(mask, *index) -> torch.Tensor:
    return mask[index]


@pytest.fixture(autouse=True, params=[1 << 21, 60], ids=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    causal=st.booleans(),
    window=st.sampled_from([None, 3]),
    kind=st.sampled_from(["none", "boolean", "additive", "per head", "function"]),
    above=st.sampled_from([None, 0.0, 1.5, 3.0, 50.0]),
    scaling=st.sampled_from([0.4, -1.0]),
)
def test_maxima_are_dense_ones(seed, causal, window, kind, above, scaling):
    query, key = qk(seed=seed)
    visible = torch.ones(1, 1, 13, 13, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    shape = {"per head": (3, 4, 13, 13)}.get(kind, (3, 1, 13, 13))
    hidden = torch.rand(shape, generator=generator) < 0.6
    mask = None
    if kind == "additive":
        # A bias in the mask is no part of q · k.
        mask = torch.randn(shape, generator=generator).masked_fill(hidden, torch.finfo(torch.float32).min)
    elif kind == "function":
        mask = partial(picked, ~hidden.expand(3, 4, 13, 13))
    elif kind != "none":
        mask = ~hidden
    if kind != "none":
        visible = visible & ~hidden
    ahead = torch.arange(13)[None, :] - torch.arange(13)[:, None]
    if causal:
        visible = visible & (ahead <= 0)
    if window:
        visible = visible & (ahead.abs() < window)
    got = max_logits(
        query,
        key,
        mask=mask,
        is_causal=causal,
        sliding_window=window,
        scaling=scaling,
        self_attention=False,
        above=above,
    )
    want = dense(query, key, visible, scaling).amax(0)
    if above is None:
        torch.testing.assert_close(got, want)
        return
    exact = got > above
    torch.testing.assert_close(got[exact], want[exact])
    assert (want[~exact] <= got[~exact] + 1e-12).all()
    assert not (want > above)[~exact].any()


def test_padding_does_not_count():
    query, key = qk()
    keep = torch.ones(3, 13, dtype=torch.bool)
    keep[0, :4] = keep[1, 9:] = False
    # What stands in padding is larger than anything.
    query = torch.where(keep[:, None, :, None], query, 1e3)
    key = torch.where(keep[:, None, :, None], key, 1e3)
    visible = (keep[:, None, :, None] & keep[:, None, None, :]).expand(-1, 4, -1, -1)
    want = dense(query, key, visible, 5**-0.5).amax(0)
    for above in (None, 0.1):
        got = max_logits(query, key, mask=keep[:, None, None, :], above=above)
        torch.testing.assert_close(got, want)
    cross = max_logits(query, key, mask=keep[:, None, None, :], query_mask=keep, self_attention=False)
    torch.testing.assert_close(cross, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_statistic_of_the_same_name(dtype):
    query, key = qk(dtype=dtype)
    got = max_logits(query, key, is_causal=True)
    want = attention_statistics(query, key, is_causal=True)["max_logit"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)


def test_a_bound_below_takes_no_products(monkeypatch):
    query, key = qk()
    expected = max_logits(query, key)
    monkeypatch.setattr(torch, "bmm", lambda *args, **kwargs: pytest.fail("a product was taken"))
    bound = max_logits(query, key, above=1e3)
    assert (bound >= expected).all()
    longest = query.norm(dim=-1).amax(-1) * key.norm(dim=-1).amax(-1).repeat_interleave(2, 1) * 5**-0.5
    torch.testing.assert_close(bound, longest.amax(0), rtol=2e-5, atol=0)


def test_nan_and_emptiness_are_told():
    query, key = qk()
    query[1, 2, 3, 0] = torch.nan
    for above in (None, 1e3):
        got = max_logits(query, key, above=above)
        assert got.isnan().tolist() == [False, False, True, False]
    hidden = torch.zeros(1, 1, 1, 13, dtype=torch.bool)
    assert max_logits(query[:, :2], key, mask=hidden).isneginf().all()
    assert max_logits(query[:, :, :0], key, above=1.0).isneginf().all()
    with pytest.raises(ValueError, match="kv_heads"):
        max_logits(query, key[:, :, :, :3], above=1.0)


def test_gradients_are_left_alone():
    query, key = qk()
    assert not max_logits(query.requires_grad_(), key, above=0.0).requires_grad
