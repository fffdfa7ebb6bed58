"""The largest logits of one captured call, however it was captured."""

import torch
from torch import Tensor

from lightning_qk.capture.call import statistics_arguments
from lightning_qk.capture.record import AttentionCall, SoftmaxCall, UnsupportedCallError
from lightning_qk.capture.statistics import by_head, query_offset
from lightning_qk.functional._logits import GivenLogits
from lightning_qk.functional.extremes import max_logits

# Positions that leave the logits what they are: products of queries and keys.
PRODUCTS = ("none", "rotary", "rotary (2-D)")


def call_max_logits(
    call: AttentionCall | SoftmaxCall,
    *,
    self_attention: bool | None,
    heads: int | None = None,
    position: str | None = None,
    above: float | None = None,
) -> Tensor:
    """Largest ``scaling q·k`` of each head of one call, over all visible pairs, ``(heads,)``.

    Args:
        call: from :class:`~lightning_qk.capture.interface.AttentionCapture`.
        self_attention: whether queries and keys are the same tokens; None where unknown.
        heads: how many heads the layer has, where that is known.
        position: what positions do to the layer's logits, see :class:`~lightning_qk.HeadProjections`: the
            logits of a softmax are products only where positions add nothing.
        above: see :func:`~lightning_qk.functional.max_logits`.

    Raises:
        UnsupportedCallError: the products of the call cannot be told.
    """
    if isinstance(call, AttentionCall):
        given = statistics_arguments(call, self_attention=self_attention)
        for name in ("softcap", "bias", "sinks"):  # no part of q · k
            given.pop(name)
        return max_logits(**given, above=above)
    if call.relative or position not in PRODUCTS:
        raise UnsupportedCallError(
            "it takes its softmax itself, of logits from which q · k cannot be told; with "
            'attn_implementation="sdpa" or "eager" they may be, where the model has one'
        )
    logits = by_head(call, heads)
    logits = logits[..., : -call.sinks] if call.sinks else logits
    source = GivenLogits.check(logits, None, bool(self_attention), query_offset(logits, self_attention) or 0)
    if logits.numel() == 0:
        return torch.full(logits.shape[1:2], -torch.inf, dtype=source.dtype, device=logits.device)
    largest = logits.amax(-1).to(source.dtype)
    return largest.masked_fill(~source.used[:, None], -torch.inf).amax((0, 2))
