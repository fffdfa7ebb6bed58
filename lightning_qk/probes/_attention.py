"""Probabilities of one captured call by chunks of query rows, and what follows from them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_qk.capture.call import statistics_arguments
from lightning_qk.capture.record import AttentionCall, SoftmaxCall
from lightning_qk.capture.statistics import by_head, query_offset
from lightning_qk.functional._logits import Chunk, GivenLogits, Logits, valid_rows
from lightning_qk.functional._precision import at_least_float32, full_precision


class Attention(NamedTuple):
    """The softmax of one call.

    Attributes:
        source: where chunks of its logits come from.
        valid: rows that see a key and are no padding, ``(batch, n)``.
        value: ``(batch, kv_heads, m, d_value)``; None where the call does not hold one for every key.
    """

    source: Logits | GivenLogits
    valid: Tensor
    value: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, n, m)``."""
        return self.source.shape


class Part(NamedTuple):
    """Probabilities of some query rows.

    Attributes:
        rows: which ones.
        probabilities: ``(batch, heads, rows, keys)``, 0 where a key is hidden and in rows that do not count. Keys
            may end before the last where no row sees the rest.
        shown: pairs of rows that count and keys that they see, ``(batch, heads|1, rows, keys)``.
        position: of the rows on the axis of the keys, ``(batch|1, rows)``.
    """

    rows: slice
    probabilities: Tensor
    shown: Tensor
    position: Tensor


class Received(NamedTuple):
    """What keys receive.

    Attributes:
        total: attention summed over rows, ``(batch, heads, m)``.
        rows: how many of them see the key, the same shape.
    """

    total: Tensor
    rows: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over the rows that see the key; NaN where none does."""
        return self.total / self.rows


def attention_of(
    call: AttentionCall | SoftmaxCall, *, self_attention: bool | None, heads: int | None = None
) -> Attention:
    """Read a captured call.

    Args:
        call: from :class:`~lightning_qk.capture.interface.AttentionCapture`.
        self_attention: whether queries and keys are the same tokens; None where unknown.
        heads: how many heads the layer has; None where unknown.

    Raises:
        UnsupportedCallError: the softmax of the call cannot be told.
    """
    if isinstance(call, SoftmaxCall):
        logits, sinks = by_head(call, heads), None
        if call.sinks:
            logits, sinks = logits[..., : -call.sinks], logits[..., -1]
        offset = query_offset(logits, self_attention)
        own = (logits.shape[2] == logits.shape[3] if self_attention is None else self_attention) and (
            offset is not None
        )
        given = GivenLogits.check(logits, None, own, offset or 0, sinks)
        return Attention(given, given.used, None)
    arguments = statistics_arguments(call, self_attention=self_attention)
    arguments.pop("self_attention")
    source = Logits.check(arguments.pop("query"), arguments.pop("key"), **arguments)
    n, m = source.shape[2:]
    with full_precision(source.device):
        valid, seen = valid_rows(source, None, n == m if self_attention is None else self_attention)
        query, key = source.query, at_least_float32(source.key)
        value: Tensor | None = call.value
        if not isinstance(value, Tensor) or value.dim() != 4 or (len(value), value.shape[2]) != (len(key), m):
            value = None
        if seen is not None:
            # Padding may hold anything, NaN included, and what follows multiplies it by 0.
            query = torch.where(valid[:, None, :, None], query, 0.0)
            key = torch.where(seen[:, None, :, None], key, 0.0)
            value = None if value is None else torch.where(seen[:, None, :, None], value, 0.0)
    return Attention(source._replace(query=query, key=key.contiguous()), valid, value)


def row_parts(attention: Attention, keep: Tensor | None = None) -> Iterator[Part]:
    """Probabilities of all rows, some at a time; memory is that of one chunk.

    Args:
        attention: one call.
        keep: rows that count, boolean ``(batch, n)``; valid ones do in any case only. None for all of them.
    """
    source, valid = attention.source, attention.valid
    batch, heads, n, m = source.shape
    keep = valid if keep is None else valid & keep.to(valid.device)
    for rows in source.chunks(n):
        with full_precision(source.device):
            buffer = torch.empty(
                batch * heads * (rows.stop - rows.start) * m, dtype=source.dtype, device=source.device
            )
            chunk = source.chunk(rows, buffer)
            shown = _shown(chunk, keep[:, rows])
            yield Part(rows, _softmax(chunk, shown), shown, chunk.position)


def rows_at(attention: Attention, index: Tensor) -> Tensor:
    """Probabilities of some rows of each sequence, ``(batch, heads, rows, m)``.

    Args:
        attention: one call.
        index: which rows, ``(batch, rows)``; few, since all of them are computed at once.
    """
    source = attention.source
    batch, heads, _, m = source.shape
    with full_precision(source.device):
        index = index.to(source.device)
        buffer = torch.empty(batch * heads * index.shape[1] * m, dtype=source.dtype, device=source.device)
        chunk = source.chunk(index, buffer)
        return _softmax(chunk, _shown(chunk, attention.valid.gather(1, index)))


def received(attention: Attention, keep: Tensor | None = None) -> Received:
    """Attention that each key receives from the rows that count; arguments as those of :func:`row_parts`."""
    batch, heads, _, m = attention.shape
    total = torch.zeros(batch, heads, m, dtype=attention.source.dtype, device=attention.source.device)
    rows = torch.zeros_like(total)
    for part in row_parts(attention, keep):
        width = part.probabilities.shape[-1]
        total[..., :width] += part.probabilities.sum(-2)
        rows[..., :width] += part.shown.sum(-2)
    return Received(total, rows)


def weighted_values(probabilities: Tensor, value: Tensor) -> Tensor:
    """Output of some rows before the output projection.

    Args:
        probabilities: ``(batch, heads, rows, keys)``; keys may end before the last.
        value: ``(batch, kv_heads, m, d_value)``; ``kv_heads`` divides ``heads``.

    Returns:
        Shape ``(batch, heads, rows, d_value)``, in the precision of the probabilities.
    """
    batch, heads, rows, width = probabilities.shape
    value = value[:, :, :width].to(probabilities.dtype)
    grouped = probabilities.reshape(batch, value.shape[1], -1, width)
    with full_precision(value.device):
        return (grouped @ value).view(batch, heads, rows, value.shape[-1])


def is_causal(attention: Attention) -> bool:
    """Whether no row sees a key behind its own position."""
    source, n = attention.source, attention.shape[2]
    if isinstance(source, Logits):
        if source.is_causal:
            return True
        if source.mask is None and source.sliding_window is None:
            return n == 1
        for rows in source.chunks(n):
            position = source.positions(rows)
            visible = source.visible(rows, position, slice(0, attention.shape[3]))
            assert visible is not None  # there is a mask
            keep = attention.valid[:, None, rows, None]
            if _sees_ahead(visible & keep, position):
                return False
        return True
    return not any(_sees_ahead(part.shown, part.position) for part in row_parts(attention))


def entropy(probabilities: Tensor) -> Tensor:
    """Of the last axis, nats."""
    return torch.special.entr(probabilities).sum(-1)


def _sees_ahead(shown: Tensor, position: Tensor) -> bool:
    places = torch.arange(shown.shape[-1], device=shown.device)
    return bool((shown & (places > position[:, None, :, None])).any())


def _shown(chunk: Chunk, keep: Tensor) -> Tensor:
    rows = keep[:, None, :, None]
    if chunk.shown is None:
        return rows.expand(-1, -1, -1, chunk.logits.shape[-1])
    shown = chunk.shown > 0
    if chunk.edge:
        shown = pad(shown, (chunk.edge, 0), value=True)
    return shown & rows


def _softmax(chunk: Chunk, shown: Tensor) -> Tensor:
    logits = chunk.logits.masked_fill(~shown, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    if chunk.sinks is not None:
        top = torch.maximum(top, chunk.sinks[..., None])
    # A row that sees nothing has no maximum. NaN stays NaN: it is to be seen.
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    if chunk.sinks is not None:
        total = total + (chunk.sinks[..., None] - top).exp()
    return weights / torch.where(total == 0, 1.0, total)
