"""The measured propagation curve against a loop over pairs, the scalar statistic and the theory's tokens."""

import math

import pytest
import torch

from lightning_qk.functional import attention_statistics, linear_share_profile, signal_propagation_probability


def by_loop(logits: torch.Tensor, visible: torch.Tensor, bins: int) -> torch.Tensor:
    """One pair after the other; logits ``(batch, heads, n, m)``, visible ``(batch, n, m)``."""
    batch, heads, n, _ = logits.shape
    inside, total = torch.zeros(heads, bins), torch.zeros(heads, bins)
    for b in range(batch):
        for i in range(n):
            keys = visible[b, i].nonzero().flatten()
            if len(keys) < 16:
                continue
            for h in range(heads):
                row = logits[b, h, i, keys].double()
                for place, value in enumerate(row):
                    share = (1 + value - row.mean()) / len(keys)
                    cell = min(int((place + 0.5) / len(keys) * bins), bins - 1)
                    inside[h, cell] += float(0 < share < 1)
                    total[h, cell] += 1
    return inside / total


@pytest.mark.parametrize("kind", ["causal", "full", "padded", "window"])
def test_against_a_loop(kind: str) -> None:
    query, key = 3 * torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8)
    place = torch.arange(24)
    visible = torch.ones(2, 24, 24, dtype=torch.bool)
    call: dict[str, object] = {}
    if kind in ("causal", "window"):
        visible &= place <= place[:, None]
        call["is_causal"] = True
    if kind == "window":
        visible &= place > place[:, None] - 18
        call["sliding_window"] = 18
    if kind == "padded":
        visible[1, :, :5] = False
        call["mask"] = visible[:, None]
        visible = visible.clone()
        visible[1, :5] = False  # rows of padding do not count
    logits = query @ key.repeat_interleave(2, 1).mT / math.sqrt(8)
    got = linear_share_profile(query, key, bins=4, **call)
    torch.testing.assert_close(got, by_loop(logits, visible, 4))


def test_its_mean_is_the_linear_share() -> None:
    query, key = 4 * torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    profile = linear_share_profile(query, key, bins=10)
    share = attention_statistics(query, key)["linear_share"]
    torch.testing.assert_close(profile.mean(-1), share)  # 4 keys in each part, of every row


def test_sampled_rows_agree_with_all() -> None:
    query, key = 3 * torch.randn(64, 2, 48, 8), torch.randn(64, 2, 48, 8)
    generator = torch.Generator().manual_seed(1)
    some = linear_share_profile(query, key, rows=24, is_causal=True, generator=generator)
    torch.testing.assert_close(some, linear_share_profile(query, key, is_causal=True), atol=0.03, rtol=0)


def test_random_walks_pass_signal_as_predicted() -> None:
    """The last query of a Gaussian random walk, as in the theory, with an eigenvalue mean that is not zero."""
    length, width, heads = 256, 64, 2
    walks = torch.randn(400, length, width).cumsum(1) / math.sqrt(length)
    matrix = torch.randn(heads, width, width) * 0.6 / width + 0.8 * torch.eye(width) / width
    query = (walks[:, None] @ matrix)[:, :, -1:]
    query, key = query * math.sqrt(length) * math.sqrt(length), walks[:, None].expand(-1, heads, -1, -1)
    got = linear_share_profile(
        query, key, scaling=1.0, is_causal=True, query_offset=length - 1, self_attention=False
    )
    theta = (torch.arange(10) + 0.5) / 10
    trace = matrix.diagonal(dim1=1, dim2=2).sum(-1)
    want = signal_propagation_probability(
        theta[:, None],
        trace,
        (matrix * matrix.mT).sum((1, 2)),
        matrix.square().sum((1, 2)),
        length=length,
    )
    assert float((got.mT - want).abs().max()) < 0.1
    assert float(want[-1].min() - want[0].max()) > 0.4  # there is something to see


def test_short_rows_and_bad_bins() -> None:
    query = torch.randn(1, 1, 8, 4)
    assert linear_share_profile(query, query).isnan().all()
    with pytest.raises(ValueError, match="expected bins of at least 1"):
        linear_share_profile(query, query, bins=0)
