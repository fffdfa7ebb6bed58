"""The largest logits of attention calls, exact wherever they matter and bounded where they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qk.functional.arguments import as_logits
from lightning_qk.functional.checks import number
from lightning_qk.functional.chunks import MaskFunction
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits
from lightning_qk.functional.precision import full_precision

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Products and norms are rounded: a bound that is larger by so much holds for rounded logits too.
_ROUNDING = 1 + 1e-5


def max_logits(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    above: float | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Largest ``scaling q_i·k_j`` of each head over all visible pairs, by chunks of query rows.

    What is added to the products, a bias or the values of an additive mask, and a soft cap take no part: it is
    the number that QK-Clip holds (Kimi K2, arXiv 2507.20534 [V]). Every row is looked at. Padding does not
    count: rows that see no key, and, with ``self_attention``, tokens that no row sees.

    By the Cauchy-Schwarz inequality no logit of a head is larger than ``|scaling| max_i ‖q_i‖ max_j ‖k_j‖``,
    which takes O(n d_head) and no mask. With ``above``, products are taken only in sequences and heads whose
    bound is larger.

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`AttentionLogits`: given logits count as products.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        above: None for the exact maximum of every head. Else a head whose maximum is at most this may be given
            a number between the two instead: what is larger than ``above`` is exact.
        options: mask and so on: :class:`~lightning_qk.functional.AttentionOptions`. Of an additive mask only
            counts what it hides; soft cap, bias and sinks have no effect.

    Returns:
        Shape ``(heads,)``, float32 at least, without gradient. −inf for a head without a visible pair, NaN for
        one with a NaN among its logits.

    Raises:
        ValueError: shapes that do not fit.
    """
    if above is not None:
        above = number(above, "above")
    logits = as_logits(query, key, options)
    with torch.no_grad(), full_precision(logits.device):
        if not isinstance(logits, ProductLogits):
            return _of_given(logits)
        logits = logits.detach().products()
        query, key = logits.query, logits.key
        if not query.shape[0]:
            wide = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
            return torch.full(query.shape[1:2], -torch.inf, dtype=wide, device=query.device)
        if above is None:
            return _exact(logits).amax(0)
        bound = _bound(query, key, logits.scaling)
        # Written so that NaN is looked at.
        open_ = ~(bound <= above)
        if not bool(open_.any()):
            return bound.amax(0)
        sequences, heads = open_.any(1).nonzero()[:, 0], open_.any(0).nonzero()[:, 0]
        part = logits if len(sequences) == len(query) else logits.sequences(sequences)
        if len(heads) < query.shape[1]:
            part = _some_heads(part, heads)
        bound[sequences[:, None], heads] = _exact(part)
        return bound.amax(0)


def _of_given(logits: AttentionLogits) -> Tensor:
    largest = torch.full(logits.shape[1:2], -torch.inf, dtype=logits.dtype, device=logits.device)
    valid = logits.counted().rows
    for rows in logits.chunks(logits.shape[2]):
        chunk = logits.chunk(rows, logits.buffer(rows.stop - rows.start))
        seen = valid[:, None, rows, None]
        if chunk.shown is not None:
            seen = seen & (chunk.shown > 0)
        largest = torch.maximum(largest, chunk.logits.masked_fill(~seen, -torch.inf).amax((0, 2, 3)))
    return largest


def _exact(logits: ProductLogits) -> Tensor:
    """The maximum of every sequence and head, ``(batch, heads)``."""
    query, key = logits.query, logits.key
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    logits = logits.replace(key=key.to(dtype).contiguous())
    batch, heads, n, m = logits.shape
    best = torch.full((batch, heads), -torch.inf, dtype=dtype, device=query.device)
    if best.numel() == 0 or n == 0 or m == 0:
        return best
    valid = logits.counted().rows
    rows_left_out = not bool(valid.all())
    buffer: Tensor | None = None
    for rows in logits.chunks(n):
        if buffer is None:
            buffer = logits.buffer(rows.stop - rows.start)
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


def _some_heads(logits: ProductLogits, heads: Tensor) -> ProductLogits:
    """The same call with some of its heads; of a group's key as many copies as there are heads."""
    group = logits.query.shape[1] // logits.key.shape[1]
    mask = logits.mask
    if isinstance(mask, Tensor):
        mask = mask if mask.shape[1] == 1 else mask.index_select(1, heads)
    elif mask is not None:
        mask = _of_heads(mask, heads)
    return logits.replace(query=logits.query[:, heads], key=logits.key[:, heads // group], mask=mask)


def _of_heads(mask: MaskFunction, heads: Tensor) -> MaskFunction:
    return lambda batch, head, query, key: mask(batch, heads[head], query, key)
