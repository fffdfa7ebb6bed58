"""A part of a call is that part of its queries, keys, mask and bias; logits at hand are what products come to."""

import pytest
import torch

from lightning_qk.functional import (
    AttentionLogits,
    attention_entropy,
    attention_on_keys,
    attention_statistics,
    linear_share_profile,
    max_logits,
    positional_share,
    sink_statistics,
)

BATCH, HEADS, N = 5, 3, 12
KEEP = torch.ones(BATCH, N, dtype=torch.bool)
KEEP[1, :4] = KEEP[3, -5:] = False
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
BIAS = torch.randn(1, HEADS, N, N)

MASKS = {
    "none": None,
    "each sequence's": KEEP[:, None, None, :] & CAUSAL,
    "all sequences'": CAUSAL[None, None],
    "two axes": CAUSAL,
    "of keys": KEEP[:, None, None, :],
    "additive": torch.zeros(BATCH, 1, N, N).masked_fill(~(KEEP[:, None, None, :] & CAUSAL), -1e9),
    "function": lambda b, h, q, k: KEEP[b, k] & (k <= q),
}


def options(kind: str) -> dict:
    return {"mask": MASKS[kind], "bias": BIAS if kind != "two axes" else BIAS[0], "is_causal": kind == "none"}


def products(kind: str) -> AttentionLogits:
    query, key = torch.randn(2, BATCH, HEADS, N, 6).unbind()
    return AttentionLogits.of(query, key, **options(kind), query_mask=KEEP)


def at_hand(kind: str) -> AttentionLogits:
    """The same as a softmax gets them."""
    call = products(kind)
    return AttentionLogits.given(dense(call), query_mask=KEEP)


def dense(call) -> torch.Tensor:
    x = call.query @ call.key.mT * call.scaling + call.bias
    index = torch.meshgrid(*(torch.arange(size) for size in call.shape), indexing="ij")
    if call.is_causal:
        return x.masked_fill(~CAUSAL, -torch.inf)
    if callable(call.mask):
        return x.masked_fill(~call.mask(*index), -torch.inf)
    return x.masked_fill(~call.mask, -torch.inf) if call.mask.dtype == torch.bool else x + call.mask


def rows_of(call: AttentionLogits) -> torch.Tensor:
    return call.query if hasattr(call, "query") else call.logits


KINDS = [(make, kind) for make in (products, at_hand) for kind in MASKS]


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_sequences(make, kind):
    call = make(kind)
    whole = attention_statistics(call, per_sequence=True)
    drawn = call.draw(2, torch.Generator().manual_seed(0))
    part = call.some_sequences(2, torch.Generator().manual_seed(0))
    assert torch.equal(rows_of(part), rows_of(call)[drawn])
    for name, value in attention_statistics(part, per_sequence=True).items():
        torch.testing.assert_close(value, whole[name][drawn], equal_nan=True, msg=name)
    first = attention_statistics(call.sequences(slice(2)), per_sequence=True)
    for name, value in first.items():
        torch.testing.assert_close(value, whole[name][:2], equal_nan=True, msg=name)
    assert call.some_sequences(9, None) is call
    assert call.some_sequences(None, None) is call


@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_cropped_tokens(make, kind):
    call = make(kind)
    part = call.crop_tokens(7, torch.Generator().manual_seed(3))
    start = int(torch.randint(N - 7 + 1, (), generator=torch.Generator().manual_seed(3)))
    assert start > 0
    tokens = slice(start, start + 7)
    visible = {
        "none": CAUSAL,
        "all sequences'": CAUSAL,
        "two axes": CAUSAL,
        "of keys": KEEP[:, None, None, :].expand(-1, 1, N, -1),
    }.get(kind, KEEP[:, None, None, :] & CAUSAL)
    same = products(kind) if make is at_hand else call
    if make is at_hand:
        logits = call.logits[:, :, tokens, tokens]
        hidden = ~visible.expand(BATCH, 1, N, N)[..., tokens, tokens]
        used = call.used[:, tokens]
        want = attention_statistics(
            AttentionLogits.given(logits.masked_fill(hidden, -torch.inf), query_mask=used), per_sequence=True
        )
    else:
        want = attention_statistics(
            same.query[:, :, tokens],
            same.key[:, :, tokens],
            mask=visible.expand(BATCH, 1, N, N)[..., tokens, tokens],
            bias=BIAS[..., tokens, tokens],
            query_mask=KEEP[:, tokens],
            per_sequence=True,
        )
    for name, value in attention_statistics(part, per_sequence=True).items():
        torch.testing.assert_close(value, want[name], equal_nan=True, msg=name)


def test_no_crop_where_tokens_are_not_the_same():
    query, key = torch.randn(2, BATCH, HEADS, N, 6).unbind()
    for more in ({"query_offset": 3}, {"self_attention": False}):
        call = AttentionLogits.of(query, key, **more)
        assert call.crop_tokens(7, None) is call
    call = AttentionLogits.of(query, key)
    assert call.crop_tokens(7, None).shape == (BATCH, HEADS, 7, 7)
    assert call.crop_tokens(N, None) is call


def test_draws_leave_the_global_generator_alone():
    call = products("none")
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    firsts = set()
    for _ in range(40):
        part = call.some_sequences(1, generator).crop_tokens(10, generator)
        here = (call.query[:, :, :3] == part.query[:, :, :1]).all(-1).all(1).nonzero()
        firsts.add(tuple(here[0].tolist()))
    assert torch.equal(before, torch.get_rng_state())
    # Every sequence and every place comes.
    assert {sequence for sequence, _ in firsts} == set(range(BATCH))
    assert {place for _, place in firsts} == {0, 1, 2}


@pytest.mark.parametrize("kind", MASKS)
def test_logits_at_hand_give_what_products_give(kind):
    call = products(kind)
    same = AttentionLogits.given(dense(call), query_mask=KEEP)
    value = torch.randn(BATCH, HEADS, N, 2)
    marked = torch.arange(N) > 5
    for function, more in (
        (linear_share_profile, {"bins": 3}),
        (positional_share, {"per_sequence": True}),
        (attention_on_keys, {"marked": marked}),
        (sink_statistics, {"value": value}),
    ):
        want, got = function(call, **more), function(same, **more)
        for one, other in zip(*(flat(found) for found in (want, got)), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, equal_nan=True)
    biasless = call.replace(bias=None)
    want = max_logits(biasless)
    torch.testing.assert_close(
        max_logits(AttentionLogits.given(dense(call.replace(bias=0 * call.bias)), query_mask=KEEP)), want
    )


def flat(found) -> list[torch.Tensor]:
    return list(found.values()) if isinstance(found, dict) else [found]


def test_a_call_comes_by_itself():
    call = products("none")
    with pytest.raises(TypeError, match="expected an AttentionLogits by itself, got key, scaling beside it"):
        attention_statistics(call, call.key, scaling=1.0)
    with pytest.raises(TypeError, match=r"expected options among mask, .*got 'caual'"):
        attention_statistics(call.query, call.key, caual=True)
    with pytest.raises(TypeError, match="with queries and keys, got logits alone"):
        attention_entropy(at_hand("none"))
