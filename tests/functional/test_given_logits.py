"""Statistics of logits that are given, against those of queries and keys, and dense in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import dense_attention

from lightning_qk.functional import attention as localization
from lightning_qk.functional import attention_statistics, logit_statistics
from lightning_qk.functional.logits import GivenLogits

HEADS, N, D_HEAD = 3, 11, 8
# Without queries and keys there are none.
NORMS = ("query_norm", "key_norm")


def tensors(n: int = N, m: int = N, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(2, HEADS, n, D_HEAD, generator=generator, dtype=torch.float64)
    key = torch.randn(2, HEADS, m, D_HEAD, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), (query @ key.mT * D_HEAD**-0.5).to(dtype)


def visibility(kind: str, n: int = N, m: int = N) -> torch.Tensor:
    shown = torch.ones(2, 1, n, m, dtype=torch.bool)
    if kind in ("causal", "left-padded"):
        shown = shown.tril(m - n).clone()
    if kind == "left-padded":
        shown[1, :, :, :4] = False
    if kind == "right-padded":
        shown[0, :, :, -3:] = False
    return shown


@pytest.fixture(params=[1 << 21, 50], ids=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    from lightning_qk.functional import logits as module

    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("kind", ["all", "causal", "left-padded", "right-padded"])
def test_equal_those_of_the_queries_and_keys(kind, value, chunks):
    query, key, logits = tensors()
    shown = visibility(kind)
    padding = None if "padded" not in kind else shown.any(1).any(1)
    got = logit_statistics(logits.masked_fill(~shown, value))
    want = dense_attention(query, key, shown, padding=padding)
    assert want.keys() <= got.keys()
    for name in NORMS:
        assert got[name].isnan().all()
        del want[name]
    for name, expected in want.items():
        torch.testing.assert_close(got[name].double(), expected.double(), rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.parametrize("rows", [1, 5, N, None])
def test_samples_the_rows_that_queries_and_keys_do(rows):
    query, key, logits = tensors(dtype=torch.float32)
    shown = visibility("left-padded")
    seeds = (torch.Generator().manual_seed(4) for _ in range(2))
    want = attention_statistics(query, key, mask=shown, rows=rows, generator=next(seeds))
    got = logit_statistics(logits.masked_fill(~shown, -1e9), rows=rows, generator=next(seeds))
    assert got.keys() == want.keys()
    for name, expected in want.items():
        if name.removesuffix("_se") in NORMS:
            continue
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


def test_a_sink_of_each_row(chunks):
    query, key, logits = tensors()
    sinks = torch.randn(2, HEADS, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = logit_statistics(logits, sinks=sinks, per_sequence=True)
    p = torch.cat([logits, sinks[..., None]], -1).softmax(-1)
    torch.testing.assert_close(got["entropy"], torch.special.entr(p).sum(-1).mean(-1))
    torch.testing.assert_close(got["sink_learnt"], p[..., -1].mean(-1))
    torch.testing.assert_close(got["max_prob"], p[..., :-1].amax(-1).mean(-1))
    of_heads = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    same = logit_statistics(logits, sinks=of_heads[:, None])
    want = attention_statistics(query, key, sinks=of_heads)
    for name, expected in want.items():
        if name in NORMS:
            continue
        torch.testing.assert_close(same[name], expected, msg=name)


def test_queries_without_a_place_have_no_distance():
    _, _, logits = tensors(5, 9)
    got = logit_statistics(logits, query_offset=None)
    placed = logit_statistics(logits, query_offset=4)
    for name in localization.POSITION_STATISTICS:
        assert got[name].isnan().all()
        assert placed[name].isfinite().all()
    torch.testing.assert_close(got["entropy"], placed["entropy"])


@given(shift=st.floats(-50, 50), seed=st.integers(0, 5))
def test_a_constant_of_each_row_changes_nothing_but_the_maxima(shift, seed):
    _, _, logits = tensors(seed=seed)
    shifted = logits + shift * torch.linspace(-1, 1, N, dtype=torch.float64)[:, None]
    got, want = logit_statistics(shifted, relative=True), logit_statistics(logits)
    for name in localization.EXTREMES:
        assert got.pop(name).isnan().all()
        want.pop(name)
    for name, expected in want.items():
        torch.testing.assert_close(
            got[name], expected, rtol=1e-8, atol=1e-8, equal_nan=name in NORMS, msg=name
        )


def test_a_small_mask_hides_nothing_and_nan_is_seen():
    _, _, logits = tensors()
    shown = visibility("causal")
    low = logit_statistics(logits.masked_fill(~shown, -100.0))
    assert (low["max_abs_logit"] == 100).all()
    poisoned = logits.clone()
    poisoned[0, 0, 3, 2] = math.nan
    assert logit_statistics(poisoned)["entropy"][0].isnan()
    assert logit_statistics(poisoned)["entropy"][1:].isfinite().all()


def test_padding_may_hold_anything():
    _, _, logits = tensors()
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, -2:] = False
    want = logit_statistics(logits, query_mask=mask)
    logits[1, :, -2:] = math.nan
    for name, expected in want.items():
        got = logit_statistics(logits, query_mask=mask)[name]
        torch.testing.assert_close(got, expected, equal_nan=name in NORMS, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    _, _, logits = tensors(dtype=dtype)
    got, want = logit_statistics(logits), logit_statistics(logits.double())
    assert all(value.dtype == torch.float32 for value in got.values())
    for name, expected in want.items():
        torch.testing.assert_close(
            got[name].double(), expected, rtol=1e-4, atol=1e-5, equal_nan=name in NORMS, msg=name
        )


def test_the_whole_tensor_is_never_copied(monkeypatch):
    _, _, logits = tensors(64, 64, torch.float32)
    largest = []
    chunk = GivenLogits.chunk
    monkeypatch.setattr(GivenLogits, "chunk", lambda *a: largest.append(chunk(*a)) or largest[-1])
    logit_statistics(logits, rows=4)
    assert max(one.logits.numel() for one in largest) == 2 * HEADS * 4 * 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "expected floating logits"),
        ({"logits": torch.zeros(2, 3, 4, 4, dtype=torch.long)}, "expected floating logits"),
        ({"rows": 0}, "expected rows"),
        ({"query_mask": torch.ones(2, 3)}, "expected query_mask"),
        ({"sinks": torch.ones(4)}, "expected learnt sinks"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        logit_statistics(**{"logits": torch.zeros(2, 3, 5, 5), **arguments})
