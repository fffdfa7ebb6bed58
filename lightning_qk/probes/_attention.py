"""Probabilities of one captured call by chunks of query rows, and what follows from them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.chunks import Chunk
from lightning_qk.functional.logits import AttentionLogits
from lightning_qk.functional.precision import full_precision


class Attention(NamedTuple):
    """The softmax of one call.

    Attributes:
        source: where chunks of its logits come from.
        valid: rows that see a key and are no padding, ``(batch, n)``.
        value: ``(batch, kv_heads, m, d_value)``; None where the call does not hold one for every key.
    """

    source: AttentionLogits
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
    """

    rows: slice
    probabilities: Tensor
    shown: Tensor


def attention_of(call: CapturedCall) -> Attention:
    """Read a captured call.

    Raises:
        UnsupportedCallError: its softmax cannot be read.
    """
    source = call.logits()
    batch, _, _, m = source.shape
    with full_precision(source.device):
        counted = source.counted()
        value = call.value
        if not isinstance(value, Tensor) or value.dim() != 4 or (len(value), value.shape[2]) != (batch, m):
            value = None
        if value is not None and counted.keys is not None:
            # Padding may hold anything, NaN included, and what follows multiplies it by 0.
            value = torch.where(counted.keys[:, None, :, None], value, 0.0)
        return Attention(source.without_padding(counted).in_range(), counted.rows, value)


def row_parts(attention: Attention, keep: Tensor | None = None) -> Iterator[Part]:
    """Probabilities of all rows, some at a time; memory is that of one chunk.

    Args:
        attention: one call.
        keep: rows that count, boolean ``(batch, n)``; valid ones do in any case only. None for all of them.
    """
    source, valid = attention.source, attention.valid
    n = source.shape[2]
    keep = valid if keep is None else valid & keep.to(valid.device)
    for rows in source.chunks(n):
        with full_precision(source.device):
            chunk = source.chunk(rows, source.buffer(rows.stop - rows.start))
            shown = _shown(chunk, keep[:, rows])
            yield Part(rows, _softmax(chunk, shown), shown)


def rows_at(attention: Attention, index: Tensor) -> Tensor:
    """Probabilities of some rows of each sequence, ``(batch, heads, rows, m)``.

    Args:
        attention: one call.
        index: which rows, ``(batch, rows)``; few, since all of them are computed at once.
    """
    source = attention.source
    with full_precision(source.device):
        index = index.to(source.device)
        chunk = source.chunk(index, source.buffer(index.shape[1]))
        return _softmax(chunk, _shown(chunk, attention.valid.gather(1, index)))


def received(attention: Attention, keep: Tensor | None = None) -> Tensor:
    """Attention that each key receives, mean over the rows that see it; arguments as of :func:`row_parts`.

    Returns:
        Shape ``(batch, heads, m)``, NaN where no row sees the key.
    """
    batch, heads, _, m = attention.shape
    total = torch.zeros(batch, heads, m, dtype=attention.source.dtype, device=attention.source.device)
    rows = torch.zeros_like(total)
    for part in row_parts(attention, keep):
        width = part.probabilities.shape[-1]
        total[..., :width] += part.probabilities.sum(-2)
        rows[..., :width] += part.shown.sum(-2)
    return total / rows


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
    source, (_, _, n, m) = attention.source, attention.shape
    for rows in source.chunks(n):
        position = source.positions(rows)
        visible = source.visible(rows, position, slice(0, m))
        keep = attention.valid[:, None, rows, None]
        shown = keep.expand(-1, -1, -1, m) if visible is None else visible & keep
        places = torch.arange(m, device=shown.device)
        if bool((shown & (places > position[:, None, :, None])).any()):
            return False
    return True


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy over the last axis, in nats."""
    return torch.special.entr(probabilities).sum(-1)


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
    # A row that sees nothing has no maximum. NaN stays NaN, to be visible.
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    if chunk.sinks is not None:
        total = total + (chunk.sinks[..., None] - top).exp()
    return weights / torch.where(total == 0, 1.0, total)
