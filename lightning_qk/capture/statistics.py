"""Statistics of one captured call, however it was captured."""

from typing import NamedTuple

import torch

from lightning_qk.capture.call import statistics_arguments
from lightning_qk.capture.record import AttentionCall, SoftmaxCall
from lightning_qk.capture.softmax import by_head, query_offset
from lightning_qk.functional.localization import AttentionSums, attention_sums, logit_sums


class CallSums(NamedTuple):
    """Additive statistics of one call.

    Attributes:
        sums: of every sequence and head.
        shape: ``(batch, heads, n, m)``.
        d_head: width of what is multiplied.
    """

    sums: AttentionSums
    shape: tuple[int, int, int, int]
    d_head: int


def call_sums(
    call: AttentionCall | SoftmaxCall,
    *,
    self_attention: bool | None,
    heads: int | None = None,
    rows: int | None = None,
    generator: torch.Generator | None = None,
) -> CallSums:
    """Statistics of one call.

    Args:
        call: from :class:`~lightning_qk.capture.interface.AttentionCapture`.
        self_attention: whether queries and keys are the same tokens; None where unknown.
        heads: how many heads the layer has, where that is known: the logits of a softmax may hold heads and
            batch in one axis.
        rows: query rows to sample in each sequence; None for all.
        generator: where they are drawn from; None is torch's global generator.

    Raises:
        UnsupportedCallError: the softmax of the call cannot be told.
    """
    if isinstance(call, SoftmaxCall):
        logits = by_head(call, heads)
        sinks = None
        if call.sinks:
            logits, sinks = logits[..., : -call.sinks], logits[..., -1]
        sums = logit_sums(
            logits,
            rows=rows,
            query_offset=query_offset(logits, self_attention),
            self_attention=self_attention,
            relative=call.relative,
            sinks=sinks,
            generator=generator,
        )
        batch, count, n, m = logits.shape
        return CallSums(sums, (batch, count, n, m), call.d_head)
    given = statistics_arguments(call, self_attention=self_attention)
    sums = attention_sums(**given, rows=rows, generator=generator)
    batch, count, n, d_head = given["query"].shape
    return CallSums(sums, (batch, count, n, given["key"].shape[2]), d_head)
