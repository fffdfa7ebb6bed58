"""Largest logits of a softmax that a layer takes itself; those of attention calls are tested with the callback."""

import pytest
import torch
from torch import nn

from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.captured import SoftmaxCall
from lightning_qk.functional import max_logits


def softmax_call(**options) -> tuple[SoftmaxCall, torch.Tensor]:
    """Causal logits (batch, heads, n, n), the last token of the second sequence padding."""
    logits = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    logits[1, :, 5] = 50.0
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1).expand(2, 1, 6, 6).clone()
    hidden[1, :, :, 5] = True
    logits = logits.masked_fill(hidden, torch.finfo(torch.float32).min)
    want = logits.clone()
    want[1, :, 5] = -torch.inf
    return SoftmaxCall(nn.Identity(), logits, 4, **options), want.amax((0, 2, 3))


@pytest.mark.parametrize("position", ["none", "rotary"])
def test_what_is_hidden_or_padding_does_not_count(position):
    call, want = softmax_call()
    torch.testing.assert_close(
        max_logits(call.products(self_attention=True, heads=3, position=position)), want
    )


def test_a_learnt_sink_does_not_count():
    call, want = softmax_call(sinks=1)
    call.tensor = torch.cat([call.tensor, torch.full((2, 3, 6, 1), 99.0)], -1)
    torch.testing.assert_close(max_logits(call.products(self_attention=True, heads=3, position="none")), want)


@pytest.mark.parametrize(
    ("options", "position"), [({}, "alibi"), ({}, "relative bias"), ({}, None), ({"relative": True}, "none")]
)
def test_logits_that_are_no_products_are_refused(options, position):
    call, _ = softmax_call(**options)
    with pytest.raises(UnsupportedCallError, match=r"q · k cannot be separated.*attn_implementation"):
        max_logits(call.products(self_attention=True, heads=3, position=position))
