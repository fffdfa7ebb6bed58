"""Which rows and keys of an attention call count, the probabilities of some rows, and the norms of both."""

import torch
from torch import Tensor

from lightning_qk.functional.chunks import Chunk, check_rows, hide, sample_rows, take_rows
from lightning_qk.functional.logits import AttentionLogits
from lightning_qk.functional.precision import norms

# A key's mean over rows counts when it is seen by at least this share of the rows that see the most-seen key.
_MIN_SEEN = 0.25


class Selection:
    """The rows of a call that are measured; padding is set to 0.

    Args:
        logits: the call.
        rows: how many query rows to sample in each sequence; None for all.
        generator: where sampled rows are drawn from; None is torch's global generator.

    Attributes:
        logits: the call, its padding set to 0.
        valid: rows that count, ``(batch, n)``.
        index: which rows were drawn, ``(batch, rows)``; None for all.
        used: of these, the ones that count, ``(batch, rows)``.
        may_be_padded: there is a mask, so that keys that no row sees may hold anything.

    Raises:
        ValueError: ``rows`` below 1.
    """

    def __init__(
        self, logits: AttentionLogits, *, rows: int | None, generator: torch.Generator | None
    ) -> None:
        rows = check_rows(rows, generator)
        self._counted = logits.counted()
        self.valid = self._counted.rows
        self.logits = logits.without_padding(self._counted)
        self.may_be_padded = self._counted.keys is not None
        n = logits.shape[2]
        # In order, so that a block of rows in a causal kernel sees no more keys than its last one.
        self.index = (
            None if rows is None or rows >= n else sample_rows(self.valid, rows, generator).sort(1)[0]
        )
        self.used = self.valid if self.index is None else self.valid.gather(1, self.index)

    @property
    def seen(self) -> Tensor:
        """Keys that some row sees, ``(batch, m)``."""
        return self.logits.seen_keys(self._counted)

    @property
    def count(self) -> int:
        """Number of selected rows of each sequence."""
        return self.used.shape[1]

    def part(self, rows: slice) -> slice | Tensor:
        """Some of the selected rows, as :meth:`AttentionLogits.chunk` takes them."""
        return rows if self.index is None else self.index[:, rows]

    def weights(self) -> Tensor:
        """Number of valid rows for each selected row of its sequence, ``(batch, 1)``."""
        return self.valid.sum(1, keepdim=True) / self.used.sum(1, keepdim=True).clamp_min(1)


def probabilities(chunk: Chunk) -> Tensor:
    """Softmax over the visible keys, a learnt sink in its denominator; the chunk's logits are overwritten.

    Returns:
        Shape ``(batch, heads, rows, keys)``; 0 where a key is hidden, and all over a row that sees none.
    """
    x, shown, edge, _, sinks = chunk
    if shown is not None:
        hide(x[..., edge:], shown)
    top = x.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks[..., None])
    x -= top
    if shown is not None:
        x[..., edge:] *= shown
    x.exp_()
    if shown is not None:
        x[..., edge:] *= shown
    total = x.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks[..., None] - top).exp()
    return x.div_(total.clamp_min(torch.finfo(x.dtype).tiny))


def eligible_keys(seen: Tensor) -> Tensor:
    """Keys that enough rows see for their mean over rows to count, boolean.

    Args:
        seen: how many rows see each key, ``(..., keys)``.
    """
    if not seen.shape[-1]:
        return seen > 0
    return (seen > 0) & (seen >= _MIN_SEEN * seen.amax(-1, keepdim=True))


def query_norms(query: Tensor, index: Tensor | None) -> Tensor:
    """Euclidean norms of the queries of some rows, ``(batch, heads, rows)``; float32 at least."""
    return norms(query if index is None else take_rows(query, index))


def key_norm_sums(key: Tensor, seen: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Sum of the Euclidean norms of the keys that are seen, and their number, both ``(batch, heads)``."""
    total = torch.where(seen[:, None], norms(key), 0.0).sum(-1)
    total = total.repeat_interleave(heads // key.shape[1], dim=1)
    return total, seen.sum(-1, keepdim=True).to(total.dtype).expand_as(total)
