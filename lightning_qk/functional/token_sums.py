r"""Moments of queries and keys as sums that add up over calls, micro-batches and ranks in one reduction.

:class:`~lightning_qk.TokenMoments` merges by means and scatters, which no reduction of a process group does. Here
are plain sums in float64, about zero: those of a call are first taken about its own mean, so that nothing cancels
in float32, and a mean of a thousand standard deviations leaves ten digits of a covariance.

Tokens may be sampled, and weigh as many as they stand for. The spectrum of a sample is a little too wide: with M
tokens, ``tr Cov(k, q)²`` by ``(‖Σ^½ W_QK Σ^½‖² + trace²) / M``. Derived.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.precision import full_precision
from lightning_qk.functional.token_moments import SideMoments, TokenMoments, _like_first, slots

_SLOTS = 46
"""Number of slots for positions, up to 8192 tokens; later ones share the last."""


class TokenSums(NamedTuple):
    """Sums over the tokens of a layer.

    Attributes:
        total: shape ``(features, 1, heads)``, float64; :class:`TokenLayout` says what they are.
    """

    total: Tensor


class TokenLayout:
    """What the features of :class:`TokenSums` are: name → shape, in order.

    Args:
        d_head: width of a head.
    """

    def __init__(self, d_head: int) -> None:
        square, line = (d_head, d_head), (d_head,)
        self.d_head = d_head
        self.shapes: dict[str, tuple[int, ...]] = {
            # Tokens but the first ones, of queries and of keys; first tokens.
            "count": (2,),
            "first_count": (2,),
            "query": line,
            "key": line,
            "first_query": line,
            "first_key": line,
            "query_query": square,
            "key_key": square,
            "key_query": square,
            # By slots of positions: regular tokens, and those whose keys are like first ones.
            "slot_count": (2, 2, _SLOTS),
            "slot_query": (2, _SLOTS, d_head),
            "slot_key": (2, _SLOTS, d_head),
        }

    @property
    def size(self) -> int:
        """Number of features."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def pack(self, parts: Mapping[str, Tensor]) -> TokenSums:
        """Parts ``(heads, …)`` as sums."""
        flat = [
            parts[name].flatten(1) if shape else parts[name][:, None] for name, shape in self.shapes.items()
        ]
        return TokenSums(torch.cat(flat, 1).T[:, None])

    def parts(self, total: Tensor) -> dict[str, Tensor]:
        """Features ``(features, heads)`` as parts ``(heads, …)``."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        found = total.T.split(sizes, -1)
        return {
            name: part.reshape(len(part), *shape)
            for (name, shape), part in zip(self.shapes.items(), found, strict=True)
        }


def token_sums(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    query_place: Tensor,
    key_place: Tensor,
    *,
    self_attention: bool = True,
) -> TokenSums:
    """Sums of one attention call.

    Args:
        query: before rotation, after norms, ``(batch, heads, n, d_head)``.
        key: ``(batch, kv_heads, m, d_head)``.
        query_weight: how many tokens each stands for, ``(batch, n)``; 0 leaves it out, whatever it holds.
        key_weight: likewise, ``(batch, m)``.
        query_place: positions counted from the first token that counts, which is kept apart, ``(batch, n)``.
        key_place: likewise, ``(batch, m)``.
        self_attention: queries and keys are of the same tokens; without, queries have no first token.
    """
    heads, d_head = query.shape[1], query.shape[3]
    groups = heads // key.shape[1]
    parts: dict[str, Tensor] = {}
    counts, firsts, slot_counts, centred, weights = [], [], [], {}, {}
    like = torch.zeros_like(query_weight, dtype=torch.bool)
    with torch.no_grad(), full_precision(query.device):
        if self_attention:
            like = _alike(key, key_weight, key_place)
        for name, vectors, weight, place in (
            ("query", query, query_weight, query_place),
            ("key", key, key_weight, key_place),
        ):
            apart = self_attention or name == "key"
            # By token: (batch · n, heads, d_head).
            flat = vectors.transpose(1, 2).flatten(0, 1)
            weight, place = weight.double().reshape(-1), place.reshape(-1)
            flat = torch.where((weight > 0)[:, None, None], flat, 0.0)
            is_first = (weight > 0) & (place == 0) & apart
            rest = torch.where(is_first, 0.0, weight)
            wide = flat.double()
            total = torch.einsum("t,thd->hd", rest, wide)
            count = rest.sum()
            mean = total / count.clamp_min(1)
            repeat = groups if name == "key" else 1
            kind = torch.float64 if flat.dtype == torch.float64 else torch.float32
            own = torch.where((rest > 0)[:, None, None], wide - mean, 0.0).to(kind).transpose(0, 1)
            scatter = (own * rest.to(kind)[:, None]).mT @ own
            raw = scatter.double() + count * mean[:, :, None] * mean[:, None]
            index = slots(place).clamp(0, _SLOTS - 1)
            if self_attention:
                index = index + _SLOTS * like.reshape(-1)
            by_slot = wide.new_zeros(2 * _SLOTS, *wide.shape[1:])
            by_slot.index_add_(0, index, wide * rest[:, None, None])
            in_slot = wide.new_zeros(2 * _SLOTS).index_add_(0, index, rest)
            parts |= {
                name: total.repeat_interleave(repeat, 0),
                f"first_{name}": _sum_of(wide, is_first).repeat_interleave(repeat, 0),
                f"{name}_{name}": raw.repeat_interleave(repeat, 0),
                f"slot_{name}": by_slot.unflatten(0, (2, -1)).movedim(2, 0).repeat_interleave(repeat, 0),
            }
            counts.append(count)
            firsts.append(is_first.sum().double())
            slot_counts.append(in_slot.unflatten(0, (2, -1)))
            centred[name], weights[name] = own, rest
        parts["count"] = torch.stack(counts).expand(heads, -1)
        parts["first_count"] = torch.stack(firsts).expand(heads, -1)
        parts["slot_count"] = torch.stack(slot_counts).expand(heads, -1, -1, -1)
        parts["key_query"] = query.new_zeros(heads, d_head, d_head, dtype=torch.float64)
        if self_attention:
            q, k = centred["query"], centred["key"].repeat_interleave(groups, 0)
            inner = (k * weights["query"].to(k)[:, None]).mT @ q
            centre = [parts[name] / counts[0].clamp_min(1) for name in ("query", "key")]
            parts["key_query"] = inner.double() + counts[0] * centre[1][:, :, None] * centre[0][:, None]
    return TokenLayout(d_head).pack(parts)


def _alike(key: Tensor, weight: Tensor, place: Tensor) -> Tensor:
    """Tokens whose keys are like first ones, by the moments of the call itself, boolean ``(batch, n)``."""
    valid = weight > 0
    first = valid & (place == 0)
    rest = valid & ~first
    count, first_count = rest.sum().double(), first.sum().double()
    key = torch.where(valid[:, None, :, None], key, 0.0)
    by_token = key.double().transpose(1, 2)
    mean = _sum_of(by_token, rest) / count.clamp_min(1)
    first_mean = _sum_of(by_token, first) / first_count.clamp_min(1)
    own = torch.where(rest[:, :, None, None], by_token - mean, 0.0).flatten(0, 1).float().transpose(0, 1)
    nothing = mean.new_zeros(0)
    known = SideMoments(count, mean, (own.mT @ own).double(), first_count, first_mean, nothing, nothing)
    return _like_first(key, rest, known)


def _sum_of(vectors: Tensor, mask: Tensor) -> Tensor:
    """Sum of some of the vectors ``(…, heads, d_head)``; picking them out would wait for the device."""
    return torch.where(mask[..., None, None], vectors, 0.0).flatten(0, mask.dim() - 1).sum(0)


def moments_of(
    total: Tensor, layout: TokenLayout, kv_heads: int, *, self_attention: bool = True
) -> TokenMoments:
    """The moments that sums ``(features, heads)`` come to."""
    found = layout.parts(total.double())
    heads = len(found["count"])
    step = heads // kv_heads
    sides, means = [], {}
    for index, name in enumerate(("query", "key")):
        every = slice(None, None, step if name == "key" else 1)
        count, first_count = found["count"][0, index], found["first_count"][0, index]
        mean = means[name] = found[name] / count.clamp_min(1)
        scatter = found[f"{name}_{name}"] - count * mean[:, :, None] * mean[:, None]
        sides.append(
            SideMoments(
                count=count,
                mean=mean[every],
                scatter=scatter[every],
                first_count=first_count,
                first_mean=found[f"first_{name}"][every] / first_count.clamp_min(1),
                slot_count=found["slot_count"][0, index],
                slot_sum=found[f"slot_{name}"][every].movedim(0, 2),
            )
        )
    if not self_attention:
        return TokenMoments(sides[0], sides[1], None)
    outer = means["key"][:, :, None] * means["query"][:, None]
    cross = found["key_query"] - found["count"][0, 0] * outer
    return TokenMoments(sides[0], sides[1], cross)
