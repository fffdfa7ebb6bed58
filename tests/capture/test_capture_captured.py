"""What a captured call gives."""

import pytest
import torch

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.captured import FunctionCall

HEADS, N = 3, 12


@pytest.mark.parametrize("value", [None, torch.zeros(2, N, 6), torch.zeros(2, HEADS, N - 1, 6)])
def test_calls_whose_values_are_not_at_hand(value):
    query, key = torch.randn(2, 2, HEADS, N, 6).unbind()
    call = AttentionCall(torch.nn.Identity(), query, key, value, None, "sdpa", {"is_causal": True})
    with pytest.raises(
        UnsupportedCallError, match=r"expected values \(batch, kv_heads, m, d_value\) of 12 keys"
    ):
        FunctionCall(call._replace(value=value)).output(self_attention=True)
    good = FunctionCall(call._replace(value=key)).output(self_attention=True)
    assert torch.equal(good.value, key)
    assert torch.equal(good.logits.query, query)
    assert good.logits.is_causal


def test_the_old_name_of_what_was_seen():
    capture = AttentionCapture({}, lambda name, call: None)
    capture.seen.add("layer")
    with pytest.warns(DeprecationWarning, match="heard is seen now"):
        assert capture.heard == {"layer"}
