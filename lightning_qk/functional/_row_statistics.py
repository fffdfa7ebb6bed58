"""Statistics of softmax rows, chunk by chunk: the arithmetic of one pass over the logits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional._kernel import Collected
from lightning_qk.functional.chunks import Chunk, hide
from lightning_qk.functional.logits import AttentionLogits
from lightning_qk.functional.precision import is_readable

ROW_STATISTICS = (
    "entropy",
    "entropy_normalized",
    "participation",
    "max_prob",
    "logit_std",
    "distance",
    "distance_spread",
    "diagonal",
    "sink_first",
    "sink_learnt",
    "linear_share",
)
"""Statistics that are means over query rows and follow from their logits."""

EXTREMES = ("max_logit", "max_abs_logit")
"""Statistics that are maxima; over sampled rows, a lower bound of the maximum over all rows."""


def collect_rows(source: AttentionLogits, used: Tensor, index: Tensor | None) -> Collected:
    """Statistics of all rows, or of those of an index, chunk by chunk."""
    result = source.result_dtype
    source = source.in_range()
    batch, heads, n, m = source.shape
    dtype, device = source.dtype, source.device
    count = n if index is None else index.shape[1]

    values = torch.zeros(len(ROW_STATISTICS), batch, heads, count, dtype=dtype, device=device)
    counted = torch.zeros_like(values, dtype=torch.bool)
    received = torch.zeros(batch, heads, m, dtype=dtype, device=device)
    received_sq = torch.zeros_like(received)
    seen = torch.zeros(batch, heads, m, dtype=dtype, device=device)
    maximum = torch.full((len(EXTREMES), batch, heads), -math.inf, dtype=dtype, device=device)
    chunks = list(source.chunks(count))
    # One set of buffers for all chunks: fresh memory costs more than what is computed in it.
    elements = batch * heads * m * max((chunk.stop - chunk.start for chunk in chunks), default=0)
    buffers = [torch.empty(elements, dtype=dtype, device=device) for _ in range(3)]
    for part in chunks if m else ():
        chunk = source.chunk(part if index is None else index[:, part], buffers[0])
        keep = used[:, part]
        rows = _row_statistics(chunk, keep, buffers[1:])
        values[..., part] = rows.values
        counted[..., part] = rows.counted
        maximum = torch.maximum(maximum, rows.maximum)
        width = rows.weights.shape[-1]
        counts = keep[:, None, None].to(dtype)
        share = counts / rows.partition.unsqueeze(-2)
        received[..., :width] += (share @ rows.weights).squeeze(-2)
        if index is not None:
            received_sq[..., :width] += (share.square() @ rows.weights.square_()).squeeze(-2)
        seen[..., : chunk.edge if chunk.shown is not None else width] += counts.sum(-1)
        if chunk.shown is not None:
            seen[..., chunk.edge : width] += (counts @ chunk.shown).squeeze(-2)

    if result != dtype:
        values, maximum, received, received_sq, seen = (
            part.to(result) for part in (values, maximum, received, received_sq, seen)
        )
    return Collected(values, counted, maximum, received, received_sq, seen)


class _Rows(NamedTuple):
    values: Tensor  # (len(ROW_STATISTICS), batch, heads, rows)
    counted: Tensor  # the same shape: which of them count
    maximum: Tensor  # (len(EXTREMES), batch, heads)
    weights: Tensor  # (batch, heads, rows, keys): probabilities times partition
    partition: Tensor  # (batch, heads, rows)


def _row_statistics(chunk: Chunk, keep: Tensor, buffers: Sequence[Tensor]) -> _Rows:
    """Statistics of some rows, in as few passes over the logits as they take.

    Args:
        chunk: its logits are overwritten.
        keep: rows that count, ``(batch, rows)``.
        buffers: two flat buffers of the size of the logits; the first holds the returned weights.
    """
    x, shown, edge, position, sinks = chunk
    batch, heads, count, width = x.shape
    dtype, tiny = x.dtype, torch.finfo(x.dtype).tiny
    weights, scratch = (buffer[: x.numel()].view(x.shape) for buffer in buffers)
    keys = chunk.keys
    number = keys.clamp_min(1)
    keep_rows = (keep[:, None] & (keys > 0)).expand(batch, heads, count)

    # Hidden keys are pushed far down for the maximum and multiplied by 0 after it: arithmetic with a matrix that
    # all heads share is many times faster than filling by a mask, and so is exp of 0 than of what is far down.
    if shown is not None:
        hide(x[..., edge:], shown)
    top = x.amax(-1)
    x -= top[..., None]
    if shown is not None:
        x[..., edge:] *= shown
    torch.exp(x, out=weights)
    if shown is not None:
        weights[..., edge:] *= shown

    # Moments of the logits over visible keys, relative to the row's largest.
    mean = x.sum(-1) / number
    torch.sub(x, mean[..., None], out=scratch)
    if shown is not None:
        scratch[..., edge:] *= shown
    logit_std = torch.linalg.vector_norm(scratch, dim=-1) / number.sqrt()
    # Hidden keys are 0 in the scratch, inside the window of every row that sees more than one key.
    inside = torch.gt(scratch, -1.0, out=scratch).sum(-1) - (width - keys)
    linear = torch.where(keys > 1, inside, 0.0)
    if not is_readable(x) or bool((-mean >= keys - 1).any()):
        above = torch.ge(x, (mean + keys - 1)[..., None], out=scratch)
        if shown is not None:
            above[..., edge:] *= shown
        linear = linear - torch.where(keys > 1, above.sum(-1), 0.0)
    linear = linear / number
    max_abs = torch.maximum(top, -(x.amin(-1) + top))
    extremes = torch.stack([top, max_abs]).masked_fill(~keep_rows, -math.inf).amax(-1)

    # Softmax relative to the row's largest logit, so that entropy does not cancel where logits are large.
    # At least 1, the weight of the largest logit, save in a row that sees nothing.
    partition = weights.sum(-1).clamp_min(1.0)
    square = torch.linalg.vector_norm(weights, dim=-1).square()
    energy = torch.mul(weights, x, out=scratch).sum(-1)
    outcomes = keys
    learnt = torch.zeros_like(partition)
    if sinks is not None:
        # Relative to the larger of the two, so that the sink's own weight does not overflow.
        sink = sinks - top
        lower = torch.where(sink > 0, (-sink).exp(), 1.0)
        learnt = torch.where(sink > 0, 1.0, sink.exp())
        total = partition * lower + learnt
        entropy = total.log() - (energy * lower + learnt * sink - sink.clamp_min(0) * total) / total
        square = (square * lower.square() + learnt.square()) / total.square()
        learnt = learnt / total
        partition = total / lower.clamp_min(tiny)
        outcomes = keys + 1
    else:
        entropy = partition.log() - energy / partition
        square = square / partition.square()
    entropy = entropy.clamp_min(0.0)

    distance = (position[..., None] - torch.arange(width, device=position.device)).abs().to(dtype)[:, None]
    torch.mul(weights, distance, out=scratch)
    travelled = scratch.sum(-1) / partition
    # Centred: a difference of squares of positions loses float32's digits in long sequences.
    torch.sub(distance, travelled[..., None], out=scratch).square_().mul_(weights)
    spread = scratch.sum(-1) / partition + learnt * travelled.square()

    def probability(key: Tensor) -> Tensor:
        index = key.clamp(0, width - 1).expand(batch, heads, count)
        return weights.gather(-1, index[..., None]).squeeze(-1) / partition

    own = probability(position[:, None])
    diagonal = torch.where(((position >= 0) & (position < width))[:, None], own, 0.0)
    first = chunk.first
    values = torch.stack(
        [
            entropy,
            entropy / outcomes.log(),
            square.clamp_min(tiny).reciprocal(),
            1 / partition,
            logit_std,
            travelled,
            spread.sqrt(),
            diagonal,
            weights[..., 0] / partition if first is None else probability(first),
            learnt,
            linear,
        ]
    )
    counted = keep_rows.expand(len(ROW_STATISTICS), -1, -1, -1).clone()
    counted[ROW_STATISTICS.index("entropy_normalized")] &= outcomes > 1
    counted[ROW_STATISTICS.index("sink_learnt")] &= sinks is not None
    return _Rows(values, counted, extremes, weights, partition)
