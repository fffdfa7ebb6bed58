"""Entropy, sinks and linear share in closed form, against the drawn tokens that they are a check of."""

import dataclasses

import pytest
import torch
from test_token_moments import HEADS, drawn, projected, weights

from lightning_qk import HeadProjections, TokenMoments, predict_attention
from lightning_qk.functional import Rotary
from lightning_qk.tokens import predict_closed_form


def layer(size: float, rotary: Rotary | None = None) -> tuple[HeadProjections, TokenMoments]:
    """A layer of which the logits are as large as asked, and the moments of its tokens."""
    query, key = (size * part for part in weights())
    moments = TokenMoments.of(*projected(drawn(batch=64, n=40), query, key))
    return HeadProjections(query, key, None, None, 0.4, "toy", rotary=rotary), moments


@pytest.mark.parametrize("rotary", [None, Rotary(torch.tensor([1.0, 0.2, 0.01]))])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [0.01, 0.03])
def test_it_is_near_what_drawn_tokens_give(rotary: Rotary | None, is_causal: bool, size: float) -> None:
    head, moments = layer(size, rotary)
    want = predict_attention(head, moments, length=40, is_causal=is_causal, sequences=64)
    got = predict_closed_form(head, moments, length=40, is_causal=is_causal)
    assert set(got) == {"entropy", "entropy_normalized", "sink_first", "linear_share", "logit_std"}
    for name, value in got.items():
        atol = 0.15 if name == "entropy" else 0.05
        torch.testing.assert_close(value, want[name].double(), rtol=0.05, atol=atol, msg=name)


def test_logits_without_spread_are_uniform_attention() -> None:
    head, moments = layer(1e-5)
    got = predict_closed_form(head, moments, length=40, is_causal=False)
    torch.testing.assert_close(got["entropy_normalized"], torch.ones(HEADS).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(got["sink_first"], torch.full((HEADS,), 1 / 40).double(), rtol=1e-2, atol=0)
    torch.testing.assert_close(got["linear_share"], torch.ones(HEADS).double(), rtol=1e-3, atol=0)


def test_huge_logits_freeze_on_one_key() -> None:
    entropies = []
    for size in (0.03, 0.3, 3.0):
        head, moments = layer(size)
        entropies.append(predict_closed_form(head, moments, length=40, is_causal=True)["entropy"])
    assert (entropies[0] > entropies[1]).all()
    assert (entropies[2] < 0.05).all()
    assert (entropies[2] >= 0).all()


def test_cross_attention_has_no_first_token_apart_from_its_keys() -> None:
    query, key = (0.02 * part for part in weights())
    x, y = drawn(seed=0), drawn(seed=3)
    moments = TokenMoments.of(projected(x, query, key)[0], projected(y, query, key)[1], self_attention=False)
    head = HeadProjections(query, key, None, None, 0.4, "toy", self_attention=False)
    want = predict_attention(head, moments, length=30, is_causal=False, sequences=64)
    got = predict_closed_form(head, moments, length=30, is_causal=False)
    for name in ("entropy_normalized", "sink_first", "linear_share"):
        torch.testing.assert_close(got[name], want[name].double(), rtol=0.05, atol=0.05, msg=name)


def test_what_has_no_closed_form_is_refused() -> None:
    head, moments = layer(0.02)
    moments = dataclasses.replace(moments, sliding_window=4)
    with pytest.raises(ValueError, match="without sliding_window"):
        predict_closed_form(head, moments, length=40, is_causal=True)
