"""Statistics of one captured call, however it was captured."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.capture.call import statistics_arguments
from lightning_qk.capture.record import AttentionCall, SoftmaxCall, UnsupportedCallError
from lightning_qk.functional._logits import MASKED_BELOW
from lightning_qk.functional.localization import AttentionSums, attention_sums, logit_sums
from lightning_qk.heads.sizes import head_count


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


def by_head(call: SoftmaxCall, heads: int | None) -> Tensor:
    """The logits as ``(batch, heads, n, m)``: axes before the heads, and windows and blocks, are the batch.

    Columns of sinks stay behind those of the keys.

    Args:
        call: one softmax.
        heads: how many heads the layer has; None where the weights do not say: the layer's attributes are asked.

    Raises:
        UnsupportedCallError: the axes cannot be told apart.
    """
    logits = call.logits
    if hasattr(logits, "to_local"):
        logits = logits.to_local()
    leading = tuple(logits.shape[:-2])
    n, m = logits.shape[-2:]
    if heads is None:
        heads = head_count(call.module)
    if heads is None and len(leading) == 2:
        return logits
    if heads is not None:
        if heads == 1 or (len(leading) == 1 and leading[0] % heads == 0):
            return logits.reshape(-1, heads, n, m)
        if len(leading) == 2 and leading[1] == heads:
            return logits
        # The batch comes first.
        places = [place for place, size in enumerate(leading) if place and size == heads]
        if len(leading) > 2 and len(places) == 1:
            return logits.movedim(places[0], -3).reshape(-1, heads, n, m)
        if len(leading) > 2 and not places and math.prod(leading[1:]) == heads:
            return logits.reshape(-1, heads, n, m)  # key heads, and the query heads of each
    known = "of unknown number" if heads is None else f"of which there are {heads}"
    raise UnsupportedCallError(
        f"its softmax gets logits of shape {tuple(logits.shape)}, whose heads, {known}, cannot be told from the "
        "batch: it has no statistics"
    )


def query_offset(logits: Tensor, self_attention: bool | None) -> int | None:
    """Place of the first query among the keys; None where queries have none.

    Args:
        logits: ``(batch, heads, n, m)``.
        self_attention: whether queries and keys are the same tokens; None where unknown.
    """
    n, m = logits.shape[2:]
    if self_attention is False:
        return None
    if n == m:
        return 0
    if not self_attention or n > m:
        return None
    # With a cache the queries are the newest tokens: each row sees one key more than the one before, its own.
    visible = ~(logits[:, 0] <= MASKED_BELOW)
    last = (visible * torch.arange(1, m + 1, device=logits.device)).amax(-1) - 1
    offset = last - torch.arange(n, device=logits.device)
    is_row = last >= 0
    if not bool(is_row.any()):
        return None
    first = offset[is_row][0]
    pairs = is_row[:, 1:] & is_row[:, :-1]
    more = (visible[:, 1:] ^ visible[:, :-1]).sum(-1)
    if bool(((offset != first) & is_row).any() | ((more != 1) & pairs).any()):
        return None
    return int(first)
