"""The largest logits of attention calls, exact wherever they matter and bounded where they do not."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional._checks import boolean, floating, number
from lightning_qk.functional._logits import MASKED_BELOW, Logits, MaskFunction, check_query_mask, valid_rows
from lightning_qk.functional._precision import full_precision

# Products and norms are rounded: a bound that is larger by so much holds for rounded logits too.
_ROUNDING = 1 + 1e-5


def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | MaskFunction | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    sliding_window: int | None = None,
    query_mask: Tensor | None = None,
    query_offset: int = 0,
    self_attention: bool | None = None,
    above: float | None = None,
) -> Tensor:
    r"""Largest ``scaling q_i·k_j`` of each head over all visible pairs, by chunks of query rows.

    What is added to the products, a bias or the values of an additive mask, and a soft cap take no part: it is
    the number that QK-Clip holds (Kimi K2, arXiv 2507.20534 [V]). Every row is looked at. Padding does not
    count: rows that see no key, and, with ``self_attention``, tokens that no row sees.

    By the Cauchy-Schwarz inequality no logit of a head is larger than ``|scaling| max_i ‖q_i‖ max_j ‖k_j‖``,
    which takes O(n d_head) and no mask. With ``above``, products are taken only in sequences and heads whose
    bound is larger.

    Args:
        query: after rotary encoding and norms, shape ``(batch, heads, n, d_head)``.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        mask: as in :func:`~lightning_qk.functional.attention_statistics`; of an additive mask only counts what
            it hides.
        is_causal: row i sees the keys up to ``query_offset + i``.
        scaling: factor on q·k, default ``d_head ** -0.5``.
        sliding_window: keys fewer than this many places away are visible.
        query_mask: rows that count, boolean ``(batch, n)``.
        query_offset: place of the first query among the keys.
        self_attention: queries and keys are the same tokens; None: if there are as many of both.
        above: None for the exact maximum of every head. Else a head whose maximum is at most this may be given
            a number between the two instead: what is larger than ``above`` is exact.

    Returns:
        Shape ``(heads,)``, float32 at least, without gradient. −inf for a head without a visible pair, NaN for
        one with a NaN among its logits.

    Raises:
        ValueError: shapes that do not fit.
    """
    query, key = floating(query, "query").detach(), floating(key, "key").detach()
    boolean(self_attention, "self_attention", none=True)
    if above is not None:
        above = number(above, "above")
    mask = mask.detach() if isinstance(mask, Tensor) else mask
    Logits.check(query, key)
    check_query_mask(query_mask, query.shape[0], query.shape[2])
    call = _Call(mask, is_causal, scaling, sliding_window, query_mask, query_offset, self_attention)
    if not query.shape[0]:
        wide = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
        return torch.full(query.shape[1:2], -torch.inf, dtype=wide, device=query.device)
    with torch.no_grad(), full_precision(query.device):
        if above is None:
            return call.exact(query, key).amax(0)
        checked = call.check(query, key)  # shapes, before the bound needs them to fit
        bound = _bound(query, key, checked.scaling)
        # Written so that NaN is looked at.
        open_ = ~(bound <= above)
        if not bool(open_.any()):
            return bound.amax(0)
        sequences, heads = open_.any(1).nonzero()[:, 0], open_.any(0).nonzero()[:, 0]
        found = call.of(sequences, heads, query.shape[:2]).exact(*_part(query, key, sequences, heads))
        bound[sequences[:, None], heads] = found
        return bound.amax(0)


class _Call(NamedTuple):
    """What belongs to a call beside its tensors."""

    mask: Tensor | MaskFunction | None
    is_causal: bool
    scaling: float | None
    sliding_window: int | None
    query_mask: Tensor | None
    query_offset: int
    self_attention: bool | None

    def check(self, query: Tensor, key: Tensor) -> Logits:
        mask = self.mask
        if isinstance(mask, Tensor) and mask.is_floating_point():
            mask = floating(mask, "mask") > MASKED_BELOW
        return Logits.check(
            query,
            key,
            mask=mask,
            is_causal=self.is_causal,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            query_offset=self.query_offset,
        )

    def of(self, sequences: Tensor, heads: Tensor, shape: torch.Size) -> "_Call":
        """The same for some sequences and heads of ``(batch, heads)``."""
        mask, query_mask = self.mask, self.query_mask
        if isinstance(mask, Tensor):
            mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
            for dim, index in enumerate((sequences, heads)):
                if mask.shape[dim] != 1 and len(index) < shape[dim]:
                    mask = mask.index_select(dim, index)
        elif mask is not None:
            mask = _renumbered(mask, sequences, heads)
        if query_mask is not None:
            query_mask = query_mask.to(sequences.device)[sequences]
        return self._replace(mask=mask, query_mask=query_mask)

    def exact(self, query: Tensor, key: Tensor) -> Tensor:
        """The maximum of every sequence and head, ``(batch, heads)``."""
        logits = self.check(query, key)
        dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
        logits = logits._replace(key=key.to(dtype).contiguous())
        batch, heads, n, m = logits.shape
        best = torch.full((batch, heads), -torch.inf, dtype=dtype, device=query.device)
        if best.numel() == 0 or n == 0 or m == 0:
            return best
        is_self = n == m if self.self_attention is None else self.self_attention
        valid, _ = valid_rows(logits, self.query_mask, is_self)
        rows_left_out = not bool(valid.all())
        buffer: Tensor | None = None
        for rows in logits.chunks(n):
            if buffer is None:
                buffer = torch.empty(
                    batch * heads * (rows.stop - rows.start) * m, dtype=dtype, device=query.device
                )
            chunk = logits.chunk(rows, buffer)
            seen = chunk.logits
            if chunk.shown is not None:
                seen[..., chunk.edge :].masked_fill_(chunk.shown == 0, -torch.inf)
            largest = seen.amax(-1)
            if rows_left_out:
                largest = largest.masked_fill(~valid[:, None, rows], -torch.inf)
            best = torch.maximum(best, largest.amax(-1))
        return best


def _bound(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """``|scaling| max ‖q‖ max ‖k‖`` of every sequence and head, over all tokens, ``(batch, heads)``."""
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    longest = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype) for part in (query, key)]
    if 0 in (query.shape[2], key.shape[2]):
        return torch.full(query.shape[:2], -torch.inf, dtype=dtype, device=query.device)
    of_query, of_key = (norms.amax(-1) for norms in longest)
    of_key = of_key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return of_query * of_key * (abs(scaling) * _ROUNDING)


def _part(query: Tensor, key: Tensor, sequences: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Some sequences and heads of a call; of a group's key as many copies as there are heads."""
    batch, count = query.shape[:2]
    if len(sequences) < batch:
        query, key = query[sequences], key[sequences]
    if len(heads) < count:
        group = count // key.shape[1]
        query, key = query[:, heads], key[:, heads // group]
    return query, key


def _renumbered(
    mask: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], sequences: Tensor, heads: Tensor
) -> MaskFunction:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask(sequences[batch], heads[head], query, key)

    return visible
