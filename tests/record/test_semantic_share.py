"""Predicted against measured statistics of attention: by hand, by scipy, and a bound that holds of attention."""

import math

import pytest
import scipy.stats
import torch

from lightning_qk.functional import attention_statistics
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.predictions import agreement, semantic_share

LAYERS, HEADS = ("layer_00", "layer_01"), (3, 2)


def history(values, layers=LAYERS, heads=HEADS, step=4):
    out = History(layers, heads)
    out.append(step, {name: torch.tensor(flat) for name, flat in values.items()})
    return out


def test_semantic_share_is_the_largest_gap():
    predicted = {"sink_first": [0.1, 0.2, 0.3, 0.4, 0.5], "max_prob": [0.5, 0.5, 0.5, 0.5, 0.5],
                 "diagonal": [0.1, 0.1, 0.1, torch.nan, torch.nan], "entropy": [9.0] * 5}  # fmt: skip
    measured = history({"sink_first": [0.1, 0.6, 0.3, 0.4, torch.nan], "max_prob": [0.9, 0.5, 0.5, 0.2, torch.nan],
                        "diagonal": [0.1, 0.1, 0.3, torch.nan, torch.nan], "entropy": [0.0] * 5})  # fmt: skip
    own = history(predicted)
    flat = {name: column[0] for name, column in own.values.items()}
    found = semantic_share(own, flat, [measured], 4)
    torch.testing.assert_close(found, torch.tensor([0.4, 0.4, 0.2, 0.3, torch.nan]), equal_nan=True)
    assert semantic_share(own, flat, [measured], 5) is None
    assert semantic_share(own, flat, [], 4) is None
    # Only the second layer was measured.
    part = history({"max_prob": [0.6, 0.7]}, LAYERS[1:], HEADS[1:])
    found = semantic_share(own, flat, [part], 4)
    torch.testing.assert_close(found, torch.tensor([torch.nan] * 3 + [0.1, 0.2]), equal_nan=True)


def test_it_is_never_more_than_what_has_to_be_moved():
    """Total variation between two attentions of the same shape, averaged over rows, is at least as large."""
    torch.manual_seed(0)
    n, found = 12, []
    for scale in (0.1, 1.0, 4.0):
        q, k = (scale * torch.randn(2, 3, n, 8) for _ in range(2))
        sides = []
        for query in (q, q + torch.randn_like(q)):
            logits = query @ k.mT / 8**0.5
            p = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
            sides.append((p, attention_statistics(query, k, is_causal=True)))
        (one, predicted), (other, measured) = sides
        moved = 0.5 * (one - other).abs().sum(-1).mean((0, 2))
        pairs = history({name: value.tolist() for name, value in measured.items()}, ("a",), (3,))
        share = semantic_share(pairs, predicted, [pairs], 4)
        assert (share <= moved + 1e-6).all()
        found.append(share)
    assert torch.cat(found).max() > 0.1


def test_agreement_is_scipys():
    torch.manual_seed(0)
    one, other = torch.rand(5).tolist(), torch.rand(5).tolist()
    one[1] = one[3]
    record = RunRecord(attention=history({"entropy": other}), histories={"pred": history({"entropy": one})})
    record.attention = history({"entropy": other})
    count, rho, error = agreement(record, "entropy")
    assert count == 5
    assert rho == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
    assert error == pytest.approx(sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 5)
    assert agreement(record, "max_prob") is None
    assert agreement(RunRecord(), "entropy") is None
    record.attention = history({"entropy": other}, step=5)
    assert agreement(record, "entropy") is None


def test_heads_that_are_all_alike_have_no_correlation_and_the_words_say_why():
    predicted = history({"sink_rate": [0.1] * 5, "entropy": [1.5, 2.5, 3.5, 4.5, 5.5]})
    record = RunRecord(histories={"pred": predicted})
    record.attention = history({"sink_rate": [0.0, 0.1, 0.2, 0.3, 0.3], "entropy": [1.0, 2.0, 3.0, 4.0, 5.0]})
    found = agreement(record, "sink_rate")
    assert math.isnan(found.correlation)
    assert "nan" not in found.words
    assert "alike" in found.words
    assert agreement(record, "entropy").words == "1.00 and 0.5"
