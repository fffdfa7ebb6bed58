"""Statistics of given logits against those of the queries and keys that they come from."""

import math

import pytest
import torch
from torch import Tensor

from lightning_qk.functional import attention_statistics, logit_statistics

BATCH, HEADS, N, D_HEAD = 3, 4, 17, 8


def qk(n: int = N, m: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, n, D_HEAD, generator=generator).to(dtype)
    return query, torch.randn(BATCH, HEADS, m, D_HEAD, generator=generator).to(dtype)


def mask(kind: str) -> Tensor | None:
    """True: the key is seen."""
    if kind == "none":
        return None
    keep = torch.ones(BATCH, 1, N, N, dtype=torch.bool)
    if "causal" in kind:
        keep = keep.tril()
    if "padding" in kind:
        keep[1, :, :, -5:] = False
    return keep


@pytest.mark.parametrize("hide", [-math.inf, torch.finfo(torch.float32).min, -1e4, -1e9])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "causal padding"])
def test_they_agree_with_queries_and_keys(kind: str, hide: float) -> None:
    query, key = qk()
    keep = mask(kind)
    logits = query @ key.mT * D_HEAD**-0.5
    if keep is not None:
        logits = logits.masked_fill(~keep, hide)
    got = logit_statistics(logits)
    want = attention_statistics(query, key, mask=keep)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-5, atol=2e-5, msg=name)


def test_sampled_rows_are_the_same_rows() -> None:
    query, key = qk()
    logits = (query @ key.mT * D_HEAD**-0.5).masked_fill(
        ~torch.ones(N, N, dtype=torch.bool).tril(), -math.inf
    )
    got = logit_statistics(logits, rows=5, generator=torch.Generator().manual_seed(3))
    want = attention_statistics(
        query, key, is_causal=True, rows=5, generator=torch.Generator().manual_seed(3)
    )
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_read_exactly(dtype: torch.dtype) -> None:
    logits = torch.randn(BATCH, HEADS, N, N, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = logits.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), torch.finfo(dtype).min)
    got = logit_statistics(logits)
    p = logits.double().softmax(-1)
    entropy = torch.special.entr(p).sum(-1).mean((0, 2))
    torch.testing.assert_close(got["entropy"].double(), entropy, rtol=1e-5, atol=1e-5)


def test_what_is_not_known_is_nan() -> None:
    query, key = qk(5, 9)
    logits = query @ key.mT
    placed, unplaced = logit_statistics(logits), logit_statistics(logits, query_offset=None, relative=True)
    for name in ("distance", "distance_spread", "diagonal", "max_logit", "max_abs_logit"):
        assert unplaced[name].isnan().all() or unplaced[name].isinf().all(), name
        assert placed[name].isfinite().all(), name
    # A constant that each row is known up to changes nothing else.
    shifted = logit_statistics(logits - logits.amax(-1, keepdim=True), query_offset=None, relative=True)
    for name in ("entropy", "participation", "max_prob", "logit_std", "sink_first", "sink_rate"):
        torch.testing.assert_close(shifted[name], placed[name], rtol=1e-5, atol=1e-5, msg=name)


def test_not_a_number_is_seen() -> None:
    logits = torch.zeros(1, 2, 3, 3)
    logits[0, 1, 2, 0] = math.nan
    got = logit_statistics(logits)
    assert got["entropy"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("logits", [torch.zeros(2, 3, 3), torch.zeros(1, 2, 3, 3, dtype=torch.int64)])
def test_other_tensors_are_refused(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="expected floating logits"):
        logit_statistics(logits)
    with pytest.raises(ValueError, match="expected rows"):
        logit_statistics(torch.zeros(1, 1, 2, 2), rows=0)
