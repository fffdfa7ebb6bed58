"""Attention on marked keys against whole maps in float64."""

import math

import pytest
import torch

from lightning_qk.functional import attention_on_keys
from lightning_qk.functional import logits as module

BATCH, HEADS, N, D = 2, 4, 12, 6


def tensors(n: int = N, m: int = N, kv_heads: int = 2, dtype=torch.float32):
    return (
        torch.randn(BATCH, HEADS, n, D).to(dtype),
        torch.randn(BATCH, kv_heads, m, D).to(dtype),
        torch.rand(BATCH, m) < 0.4,
    )


def dense(query, key, marks, shown, rows=None, learnt=None):
    """Mean over rows of the map's columns, and of the visible keys."""
    query, key = query.double(), key.double()
    n, m = query.shape[2], key.shape[2]
    key = key.repeat_interleave(HEADS // key.shape[1], 1)
    shown = shown.expand(BATCH, HEADS, n, m)
    logits = (query @ key.mT * D**-0.5).masked_fill(~shown, -math.inf)
    if learnt is not None:
        logits = torch.cat([logits, learnt.double()[None, :, None, None].expand(BATCH, HEADS, n, 1)], -1)
    p = logits.softmax(-1)[..., :m]
    counted = shown.any(-1) if rows is None else shown.any(-1) & rows[:, None]
    here = marks.expand(BATCH, m)[:, None, None, :].double()
    uniform = (shown * here).sum(-1) / shown.sum(-1)
    out = {}
    for name, values in (("mass", (p * here).sum(-1)), ("uniform", uniform)):
        kept = values.masked_fill(~counted, 0.0)
        out[name] = kept.sum((0, 2)) / counted.sum((0, 2))
    return out


def check(got, want, tolerance=1e-5):
    assert set(got) == set(want)
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("size", [1 << 21, 200])
@pytest.mark.parametrize("kind", ["all", "causal", "window", "left", "right", "heads", "cache"])
def test_equals_whole_maps(kind, size, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", size)
    n = 5 if kind == "cache" else N
    query, key, marks = tensors(n)
    i, j = torch.arange(n)[:, None], torch.arange(N)[None]
    keep = torch.ones(BATCH, N, dtype=torch.bool)
    keep[1, slice(0, 4) if kind == "left" else slice(-4, None)] = False
    ahead = j - i - (N - n)
    shown, arguments = {
        "all": (torch.ones(1, 1, n, N, dtype=torch.bool), {}),
        "causal": ((ahead <= 0)[None, None], {"is_causal": True}),
        "window": (((ahead <= 0) & (ahead > -3))[None, None], {"is_causal": True, "sliding_window": 3}),
        "left": (keep[:, None, None, :] & (ahead <= 0), None),
        "right": (keep[:, None, None, :] & (ahead <= 0), None),
        "heads": (torch.rand(BATCH, HEADS, n, N) < 0.5, None),
        "cache": ((ahead <= 0)[None, None], {"is_causal": True, "query_offset": N - n}),
    }[kind]
    rows = keep if kind in ("left", "right") else None
    want = dense(query, key, marks, shown, rows)
    if rows is not None:
        query[1, :, ~keep[1]] = key[1, :, ~keep[1]] = torch.nan
    check(attention_on_keys(query, key, marks, **(arguments or {"mask": shown})), want)


def test_learnt_sinks_precision_and_marks_of_all_sequences():
    query, key, marks = tensors(m=9, dtype=torch.bfloat16)
    learnt = torch.tensor([0.0, 1.0, -1.0, 40.0])
    got = attention_on_keys(query, key, marks[0], sinks=learnt)
    check(got, dense(query, key, marks[0], torch.ones(1, 1, N, 9, dtype=torch.bool), learnt=learnt))
    assert got["mass"].dtype == torch.float32
    assert got["mass"][3] < 1e-6


def test_rows_that_count_sampling_and_sequences_apart():
    query, key, marks = tensors()
    keep = ~marks
    want = dense(query, key, marks, torch.ones(1, 1, N, N, dtype=torch.bool), keep)
    check(attention_on_keys(query, key, marks, query_mask=keep), want)
    check(attention_on_keys(query, key, marks, query_mask=keep, rows=N), want)
    apart = attention_on_keys(query, key, marks, is_causal=True, per_sequence=True)
    for b in range(BATCH):
        one = attention_on_keys(query[b : b + 1], key[b : b + 1], marks[b : b + 1], is_causal=True)
        for name, value in one.items():
            torch.testing.assert_close(apart[name][b], value)
    query, key, marks = torch.randn(2, 4, 200, 6), torch.randn(2, 4, 200, 6), torch.rand(2, 200) < 0.3
    truth = attention_on_keys(query, key, marks, is_causal=True)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(2)
    draws = [
        attention_on_keys(query, key, marks, is_causal=True, rows=32, generator=generator) for _ in range(60)
    ]
    assert torch.equal(before, torch.get_rng_state())
    for name in truth:
        torch.testing.assert_close(
            torch.stack([d[name] for d in draws]).mean(0), truth[name], rtol=0.03, atol=0
        )


def test_all_marks_and_none():
    query, key, _ = tensors()
    everything = attention_on_keys(query, key, torch.ones(N, dtype=torch.bool), is_causal=True)
    nothing = attention_on_keys(query, key, torch.zeros(N, dtype=torch.bool), is_causal=True)
    for name in ("mass", "uniform"):
        torch.testing.assert_close(everything[name], torch.ones(HEADS))
        assert (nothing[name] == 0).all()
    hidden = attention_on_keys(
        query, key, torch.ones(N, dtype=torch.bool), mask=torch.zeros(1, 1, N, N, dtype=torch.bool)
    )
    assert all(value.isnan().all() for value in hidden.values())


@pytest.mark.parametrize("marks", [torch.ones(N), torch.ones(BATCH, N + 1, dtype=torch.bool)])
def test_bad_marks(marks):
    query, key, _ = tensors()
    with pytest.raises(ValueError, match="expected boolean marks"):
        attention_on_keys(query, key, marks)
