r"""What a query and the keys of tokens near it have in common: their cross-covariance at a few lags.

A prediction from independent tokens knows nothing of neighbours, whose topics, words and positions are alike. The
logit of a query with a key Δ positions away is on average ``s tr R_Δ Cov(k_{i+Δ}, q_i)`` higher than with a key
drawn independently, R the layer's rotation. Derived.
"""

import math

import torch
from torch import Tensor

from lightning_qk.functional.rotary import Rotary, rotate_between

LAGS = (1, 2, 4)
"""Positions between a query and a key, of which the covariance is streamed."""
REACH = 8
"""Positions from which on a key is drawn independently."""


def neighbour_sums(query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    """Sums about zero of ``[k, 1] [q, 1]^T`` over pairs of tokens at each of :data:`LAGS`; they add up over calls.

    Args:
        query: before rotation, ``(batch, heads, n, d_head)``.
        key: of the same tokens, ``(batch, kv_heads, n, d_head)``.
        valid: tokens that count, ``(batch, n)``: a pair counts where both do.

    Returns:
        Float64 of shape ``(2, lags, heads, d_head + 1, d_head + 1)``: keys before their queries, and behind them.
    """
    heads, n, d_head = query.shape[1:]
    groups = heads // key.shape[1]
    count = valid.sum().clamp_min(1)
    centres, parts = [], []
    for vectors in (query, key):
        # About the call's own mean first, so that products in float32 lose nothing.
        kind = torch.float64 if vectors.dtype == torch.float64 else torch.float32
        kept = torch.where(valid[:, None, :, None], vectors, 0.0).double()
        mean = kept.sum((0, 2)) / count
        own = torch.where(valid[:, None, :, None], kept - mean[:, None], 0.0)
        own = torch.cat([own, valid[:, None, :, None].expand(*own.shape[:3], 1)], -1)
        shift = torch.eye(d_head + 1, dtype=torch.float64, device=mean.device).repeat(len(mean), 1, 1)
        shift[:, :d_head, d_head] = mean
        repeat = 1 if vectors is query else groups
        centres.append(shift.repeat_interleave(repeat, 0))
        parts.append(own.to(kind).transpose(0, 1).repeat_interleave(repeat, 0))
    q, k = parts
    total = q.new_zeros(2, len(LAGS), heads, d_head + 1, d_head + 1, dtype=torch.float64)
    for index, lag in enumerate(LAGS):
        if lag < n:
            early, late = slice(0, n - lag), slice(lag, n)
            for side, (of_q, of_k) in enumerate(((late, early), (early, late))):
                both = (valid[:, of_q] & valid[:, of_k])[..., None]
                left = torch.where(both, k[:, :, of_k], 0.0).flatten(1, 2)
                total[side, index] = (left.mT @ torch.where(both, q[:, :, of_q], 0.0).flatten(1, 2)).double()
    return centres[1] @ total @ centres[0].mT


def neighbour_shift(
    sums: Tensor, explained: Tensor, scaling: float, rotary: Rotary | None, length: int
) -> Tensor:
    """Mean of what neighbours' logits are higher by, by relative position of the key.

    Between the lags that were seen, and from the last one to :data:`REACH`, where it is 0, the covariance is
    interpolated by the logarithm of the lag.

    Args:
        sums: from :func:`neighbour_sums`.
        explained: part of the covariance that means by position hold, ``(heads, d_head, d_head)``.
        scaling: the softmax scale.
        rotary: the layer's rotation, or None.
        length: tokens of a sequence.

    Returns:
        Float64 of shape ``(heads, 2 length - 1)``, relative positions from ``-(length - 1)`` on; 0 for a token's
        own key.
    """
    d_head = sums.shape[-1] - 1
    count = sums[..., d_head:, d_head:]
    key, query = (
        sums[..., :d_head, d_head:] / count.clamp_min(1),
        sums[..., d_head:, :d_head] / count.clamp_min(1),
    )
    covariance = sums[..., :d_head, :d_head] / count.clamp_min(1) - key * query - explained
    covariance = torch.where(count > 1, covariance, 0.0)
    nodes = [math.log2(lag) for lag in (*LAGS, REACH)]
    shift = sums.new_zeros(sums.shape[2], 2 * length - 1)
    for lag in range(1, min(REACH, length)):
        place = math.log2(lag)
        left = max(index for index, node in enumerate(nodes) if node <= place)
        share = (place - nodes[left]) / (nodes[left + 1] - nodes[left])
        for side, sign in enumerate((-1, 1)):
            here = (1 - share) * covariance[side, left]
            if left + 1 < len(LAGS):
                here = here + share * covariance[side, left + 1]
            if rotary is not None:
                here = rotate_between(here, rotary, torch.tensor(sign * lag, device=here.device))
            shift[:, length - 1 + sign * lag] = scaling * here.diagonal(dim1=-2, dim2=-1).sum(-1)
    return shift
