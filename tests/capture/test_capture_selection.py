"""A part of a call is that part of its queries, keys, mask and bias."""

import pytest
import torch

from lightning_qk.capture.call import output_arguments, statistics_arguments
from lightning_qk.capture.record import AttentionCall, UnsupportedCallError
from lightning_qk.capture.selection import a_stretch, some_sequences
from lightning_qk.functional import attention_statistics

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


def arguments(kind: str) -> dict:
    query, key = torch.randn(2, BATCH, HEADS, N, 6).unbind()
    return {
        "query": query,
        "key": key,
        "value": torch.randn(BATCH, HEADS, N, 2),
        "mask": MASKS[kind],
        "bias": BIAS if kind != "two axes" else BIAS[0],
        "is_causal": kind == "none",
        "query_offset": 0,
        "self_attention": True,
    }


def statistics(given: dict) -> dict:
    return attention_statistics(**{k: v for k, v in given.items() if k != "value"}, per_sequence=True)


@pytest.mark.parametrize("kind", MASKS)
def test_sequences(kind):
    given = arguments(kind)
    part = some_sequences(given, 2, torch.Generator().manual_seed(0))
    whole = statistics(given)
    chosen = [int((given["query"] == one).flatten(1).all(1).nonzero()) for one in part["query"]]
    assert len(set(chosen)) == 2
    assert torch.equal(part["value"], given["value"][chosen])
    for name, value in statistics(part).items():
        torch.testing.assert_close(value, whole[name][chosen], msg=name)
    assert some_sequences(given, 9, None).keys() == given.keys()
    assert some_sequences(given, None, None)["query"] is given["query"]


@pytest.mark.parametrize("kind", MASKS)
def test_stretches(kind):
    given = arguments(kind)
    part = a_stretch(given, 7, torch.Generator().manual_seed(3))
    start = next(s for s in range(N) if torch.equal(given["query"][:, :, s : s + 7], part["query"]))
    assert start > 0
    tokens = slice(start, start + 7)
    visible = {
        "none": CAUSAL,
        "all sequences'": CAUSAL,
        "two axes": CAUSAL,
        "of keys": KEEP[:, None, None, :].expand(-1, 1, N, -1),
    }.get(kind, KEEP[:, None, None, :] & CAUSAL)
    want = attention_statistics(
        given["query"][:, :, tokens],
        given["key"][:, :, tokens],
        mask=visible.expand(BATCH, 1, N, N)[..., tokens, tokens],
        bias=BIAS[..., tokens, tokens],
        per_sequence=True,
    )
    for name, value in statistics(part).items():
        torch.testing.assert_close(value, want[name], equal_nan=True, msg=name)
    assert torch.equal(part["value"], given["value"][:, :, tokens])


@pytest.mark.parametrize("change", [{"query_offset": 3}, {"self_attention": False}])
def test_no_stretch_where_tokens_are_not_the_same(change):
    given = arguments("none") | change
    assert a_stretch(given, 7, None)["query"] is given["query"]
    assert a_stretch(arguments("none"), 7, None)["query"].shape[2] == 7
    shorter = arguments("none")
    assert a_stretch(shorter, N, None)["query"] is shorter["query"]


def test_draws_leave_the_global_generator_alone():
    given = arguments("none")
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    firsts = set()
    for _ in range(40):
        part = a_stretch(some_sequences(given, 1, generator), 10, generator)
        here = (given["query"][:, :, :3] == part["query"][:, :, :1]).all(-1).all(1).nonzero()
        firsts.add(tuple(here[0].tolist()))
    assert torch.equal(before, torch.get_rng_state())
    # Every sequence and every place comes.
    assert {sequence for sequence, _ in firsts} == set(range(BATCH))
    assert {place for _, place in firsts} == {0, 1, 2}


@pytest.mark.parametrize("value", [None, torch.zeros(2, N, 6), torch.zeros(2, HEADS, N - 1, 6)])
def test_calls_whose_values_are_not_at_hand(value):
    query, key = torch.randn(2, 2, HEADS, N, 6).unbind()
    call = AttentionCall(torch.nn.Identity(), query, key, value, None, "sdpa", {"is_causal": True})
    with pytest.raises(
        UnsupportedCallError, match=r"expected values \(batch, kv_heads, m, d_value\) of 12 keys"
    ):
        output_arguments(call._replace(value=value), self_attention=True)
    good = output_arguments(call._replace(value=key), self_attention=True)
    assert torch.equal(good.pop("value"), key)
    assert good.keys() == statistics_arguments(call, self_attention=True).keys()
