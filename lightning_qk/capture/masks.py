"""Which pairs an attention function shows, where the arguments are something else than a mask tensor.

All are functions of batch, head, query and key indices, as ``attention_statistics(mask=...)`` takes them.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_qk.functional.chunks import MaskFunction


def block_mask_function(block_mask: Any) -> MaskFunction:
    """The mask of a ``BlockMask``, as flex_attention's kernels read it.

    Within blocks listed as partial its ``mask_mod`` decides, blocks listed as full are visible, others hidden.
    The ``mask_mod`` is written for scalar indices: it is mapped over them, never called with whole tensors,
    in which ``document[b][q]`` would mean something else.

    Args:
        block_mask: a ``torch.nn.attention.flex_attention.BlockMask``.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    size = block_mask.BLOCK_SIZE
    rows, columns = (size, size) if isinstance(size, int) else size
    blocks = -(-block_mask.shape[-1] // columns)
    partial = _listed_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    full = None
    if block_mask.full_kv_num_blocks is not None:
        full = _listed_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
    over_keys = torch.vmap(block_mask.mask_mod, in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    over_heads = torch.vmap(over_queries, in_dims=(None, 0, None, None))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # What is the same for all sequences or heads is evaluated once.
        if partial.shape[0] == 1:
            batch = batch[:1]
        if partial.shape[1] == 1:
            head = head[:1]
        over_batch = torch.vmap(over_heads, in_dims=(0, None, None if query.shape[0] == 1 else 0, None))
        queries = query[0, 0, :, 0] if query.shape[0] == 1 else query[:, 0, :, 0]
        if query.shape[0] > 1 and batch.shape[0] == 1:
            batch = batch.expand(query.shape[0], -1, -1, -1)
        # A mapped function may index a tensor with a scalar, as when torch builds a BlockMask.
        with TransformGetItemToIndex():
            shown = over_batch(batch[:, 0, 0, 0], head.flatten(), queries, key)
        at = batch % partial.shape[0], head % partial.shape[1], query // rows, key // columns
        shown = shown & partial[at]
        return shown if full is None else shown | full[at]

    return visible


def _listed_blocks(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Whether a block is listed, ``(batch|1, heads|1, query blocks, key blocks)``."""
    is_used = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    # Entries beyond the count are unused: they go into a column of their own.
    where = torch.where(is_used, indices, blocks).long()
    out = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return out.scatter_(-1, where, True)[..., :blocks]


def padded_function(
    keep: Tensor, queries: int, *, is_causal: bool, sliding_window: int | None
) -> MaskFunction:
    """Attention among the tokens that a padding mask keeps, as if the others had been taken out.

    Distances are counted in kept tokens and the last query is at the last key. Padding queries see
    nothing.

    Args:
        keep: boolean ``(batch, m)``.
        queries: n; they are the last ones of the m tokens, and a single one is never padding.
        is_causal: a query sees the keys up to its own place.
        sliding_window: keys fewer than this many places away.
    """
    batch = keep.shape[0]
    if queries == 1:
        own = torch.ones(batch, 1, dtype=torch.bool, device=keep.device)
    else:
        own = keep[:, -queries:]
    place = own.cumsum(1) - 1 + (keep.sum(1, keepdim=True) - own.sum(1, keepdim=True))
    # Two numbers that never agree: padding of either side belongs to no sequence.
    query_sequence = torch.where(own, 0, -1)
    key_sequence = torch.where(keep, 0, -2)
    return _sequences_function(
        query_sequence, place, key_sequence, keep.cumsum(1) - 1, is_causal, sliding_window
    )


def packed_function(
    query_starts: Tensor,
    key_starts: Tensor,
    n: int,
    m: int,
    *,
    is_causal: bool,
    sliding_window: int | None,
) -> MaskFunction:
    """Sequences one after another in one row, each of which sees itself alone.

    Args:
        query_starts: where they begin and the last one ends, ``(sequences + 1,)``; tokens outside see nothing.
        key_starts: the same for the keys; the last query of a sequence is at its last key.
        n: number of queries.
        m: number of keys.
        is_causal: a query sees the keys up to its own place.
        sliding_window: keys fewer than this many places away.
    """
    query_sequence, query_place = _places(query_starts, n)
    key_sequence, key_place = _places(key_starts, m)
    longer = key_starts.diff() - query_starts.diff()
    query_place = query_place + longer[query_sequence.clamp(0, len(longer) - 1)]
    outside = torch.full_like(key_sequence, -2)
    key_sequence = torch.where(key_sequence >= 0, key_sequence, outside)
    return _sequences_function(
        query_sequence[None],
        query_place[None],
        key_sequence[None],
        key_place[None],
        is_causal,
        sliding_window,
    )


def _places(starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Each token's sequence (−1 outside of all) and its place in it."""
    starts = starts.long()
    token = torch.arange(length, device=starts.device)
    sequence = torch.bucketize(token, starts, right=True) - 1
    place = token - starts[sequence.clamp_min(0)]
    return torch.where(sequence < len(starts) - 1, sequence, -1), place


def _sequences_function(
    query_sequence: Tensor,
    query_place: Tensor,
    key_sequence: Tensor,
    key_place: Tensor,
    is_causal: bool,
    sliding_window: int | None,
) -> MaskFunction:
    one = query_sequence.shape[0] == 1

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if one:
            batch = torch.zeros_like(batch[:1])
        shown = query_sequence[batch, query] == key_sequence[batch, key]
        if is_causal or sliding_window is not None:
            ahead = key_place[batch, key] - query_place[batch, query]
            if is_causal:
                shown = shown & (ahead <= 0)
            if sliding_window is not None:
                shown = shown & (ahead.abs() < sliding_window)
        return shown

    return visible
