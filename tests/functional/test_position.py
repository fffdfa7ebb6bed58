"""Share of logit variance that the offset explains, against dense least squares in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qk.functional import logits as module
from lightning_qk.functional import positional_share

HEADS, D_HEAD = 3, 6


def tensors(n: int, m: int, batch: int = 2, kv_heads: int = HEADS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, HEADS, n, D_HEAD, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, m, D_HEAD, generator=generator, dtype=torch.float64)
    return query, key


def dense_share(logits: Tensor, visible: Tensor) -> float:
    """Of one head's logits, ``(batch, n, m)``: two least-squares fits with a column for each row and offset."""
    batch, n, m = logits.shape
    values, constants, offsets = [], [], []
    for b in range(batch):
        for i in range(n):
            for j in range(m):
                if visible[b, i, j]:
                    values.append(logits[b, i, j])
                    constants.append(b * n + i)
                    offsets.append(i - j + m - 1)
    y = torch.stack(values)
    of_row = torch.nn.functional.one_hot(torch.tensor(constants), batch * n).double()
    of_offset = torch.nn.functional.one_hot(torch.tensor(offsets), n + m - 1).double()

    def left(design: Tensor) -> Tensor:
        basis, singular, _ = torch.linalg.svd(design, full_matrices=False)
        basis = basis[:, singular > 1e-10]
        return (y - basis @ (basis.T @ y)).square().sum()

    return float(1 - left(torch.cat([of_row, of_offset], 1)) / left(of_row))


def visibility(kind: str, n: int, m: int) -> Tensor:
    shown = torch.ones(2, 1, n, m, dtype=torch.bool)
    if kind in ("causal", "left-padded"):
        shown = shown.tril(m - n).clone()
    if kind == "left-padded":
        shown[1, :, :, :3] = False
    if kind == "right-padded":
        shown[0, :, :, -2:] = False
    if kind in ("gaps", "gaps of heads"):
        heads = HEADS if kind == "gaps of heads" else 1
        shown = torch.rand(2, heads, n, m, generator=torch.Generator().manual_seed(5)) < 0.6
    return shown


@pytest.fixture(params=[1 << 21, 60], ids=["one chunk", "chunks"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("kind", ["all", "causal", "left-padded", "right-padded", "gaps", "gaps of heads"])
def test_equals_dense_least_squares(kind):
    n = 8
    query, key = tensors(n, n)
    shown = visibility(kind, n, n)
    logits = 0.3 * query @ key.mT + 0.2 * torch.arange(n).sub(torch.arange(n)[:, None]).abs()
    bias = (logits - 0.3 * query @ key.mT)[:1, :1]
    full = shown.expand(2, HEADS, n, n)
    seen = full.any(1).any(1) if kind != "causal" else torch.ones(2, n, dtype=torch.bool)
    counted = full & seen[:, None, :, None]
    arguments = {"mask": shown, "scaling": 0.3, "bias": bias}
    if kind == "causal":
        arguments |= {"mask": None, "is_causal": True}
    got = positional_share(query, key, **arguments)
    each = positional_share(query, key, per_sequence=True, **arguments)
    for head in range(HEADS):
        assert got[head].item() == pytest.approx(dense_share(logits[:, head], counted[:, head]), abs=1e-9)
        for b in range(2):
            one = slice(b, b + 1)
            want = dense_share(logits[one, head], counted[one, head])
            assert each[b, head].item() == pytest.approx(want, abs=1e-9)


@pytest.mark.usefixtures("_chunks")
def test_windows_offsets_groups_and_softcap_equal_dense():
    n, m = 5, 9
    query, key = tensors(n, m, kv_heads=1)
    got = positional_share(
        query, key, is_causal=True, sliding_window=4, query_offset=3, softcap=2.0, scaling=1.0
    )
    logits = 2 * torch.tanh(query @ key.mT / 2)
    ahead = torch.arange(m) - (torch.arange(n)[:, None] + 3)
    shown = ((ahead <= 0) & (ahead > -4)).expand(2, n, m)
    for head in range(HEADS):
        assert got[head].item() == pytest.approx(dense_share(logits[:, head], shown), abs=1e-9)


@given(
    st.integers(2, 12),
    st.sampled_from(["all", "causal", "window", "gaps"]),
    st.integers(0, 99),
    st.floats(-3, 3),
)
@settings(max_examples=40, deadline=None)
def test_one_for_functions_of_the_offset_and_row_constants(n, kind, seed, constant):
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(n)
    toeplitz = torch.randn(2 * n, generator=generator)[place[:, None] - place + n]
    zero = torch.zeros(1, 1, n, 1)
    rows = constant * torch.randn(n, 1, generator=generator)
    arguments: dict = {"bias": toeplitz + rows}
    if kind == "causal":
        arguments["is_causal"] = True
    elif kind == "window":
        arguments["sliding_window"] = 3
    elif kind == "gaps":
        arguments["mask"] = torch.rand(n, n, generator=generator) < 0.7
    share = positional_share(zero, zero, **arguments).item()
    assert math.isnan(share) or share == pytest.approx(1, abs=1e-4)


@given(st.integers(2, 16), st.booleans(), st.integers(0, 99), st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_in_the_unit_interval_and_unchanged_by_what_softmax_ignores(n, is_causal, seed, scale):
    query, key = tensors(n, n, seed=seed)
    share = positional_share(query, key, is_causal=is_causal)
    assert ((share >= 0) & (share <= 1)).all()
    scaled = positional_share(scale * query, key, is_causal=is_causal)
    torch.testing.assert_close(scaled, share, rtol=1e-5, atol=1e-7)
    shifted = positional_share(
        query, key, is_causal=is_causal, bias=torch.randn(n, 1, dtype=torch.float64, generator=None)
    )
    torch.testing.assert_close(shifted, share, rtol=1e-5, atol=1e-7)


def test_small_for_content_and_smaller_for_more_sequences():
    query, key = tensors(64, 64, batch=8)
    assert (positional_share(query, key, per_sequence=True).mean() - 2 / 64).abs() < 0.01
    assert positional_share(query, key).max() < 0.01


def test_mixes_in_proportion():
    n = 96
    query, key = tensors(n, n, batch=4)
    content = query @ key.mT
    place = torch.arange(n)
    toeplitz = torch.randn(2 * n, dtype=torch.float64)[place[:, None] - place + n]
    bias = toeplitz * (content.var() * 3 / toeplitz.var()).sqrt()  # three quarters
    share = positional_share(query, key, bias=bias, scaling=1.0)
    assert (share - 0.75).abs().max() < 0.04


def test_half_precision_and_padding_that_holds_anything():
    query, key = tensors(16, 16)
    want = positional_share(query.bfloat16().float(), key.bfloat16().float())
    torch.testing.assert_close(positional_share(query.bfloat16(), key.bfloat16()), want)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[..., 16:] = False
    filler = torch.full((2, HEADS, 4, D_HEAD), math.nan, dtype=torch.float64)
    padded = positional_share(torch.cat([query, filler], 2), torch.cat([key, filler], 2), mask=mask)
    torch.testing.assert_close(padded, positional_share(query, key))


def test_logits_that_do_not_vary_have_no_share():
    query = torch.ones(1, 2, 5, 3)
    assert positional_share(query, query).isnan().all()
    assert positional_share(query[:, :, :0], query[:, :, :0]).isnan().all()
    assert positional_share(query, query, per_sequence=True).shape == (1, 2)


def test_long_causal_sequences_converge():
    n = 1500
    place = torch.arange(n, dtype=torch.float64)
    angles = place[:, None] * torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    query = torch.cat([angles.cos(), angles.sin()], -1)[None, None]
    assert positional_share(query, query, is_causal=True).item() == pytest.approx(1, abs=1e-9)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="expected query"):
        positional_share(torch.zeros(2, 3), torch.zeros(2, 3))
