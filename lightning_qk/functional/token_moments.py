r"""Moments of the queries and keys of a layer's tokens, before rotation, and the spectrum that follows from them.

A head's query is ``q = W_q x + b_q`` and its key ``k = W_k x + b_k``. For tokens x of covariance Σ,
``W_k Σ W_q^T = Cov(k, q)``, ``W_q Σ W_q^T = Cov(q)`` and ``W_k Σ W_k^T = Cov(k)``: the three ``d_head × d_head``
products of :func:`~lightning_qk.functional.qk_moments` with ``sigma=Σ``. So the spectrum of ``Σ^½ W_QK Σ^½``
needs no weights and no ``d_model × d_model`` matrix. Derived.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.checks import floating
from lightning_qk.functional.precision import full_precision
from lightning_qk.functional.rotary import Rotary
from lightning_qk.functional.spectrum import Products, core_eigenvalues

_SLOTS_PER_OCTAVE = 4
_APART = 0.25
# Tokens that the mean of a class counts for beside those of a slot.
_SHRINKAGE = 1.0


@dataclass(frozen=True, eq=False)
class SideMoments:
    """Moments of the queries or of the keys of a layer, float64; the first token of each sequence is apart.

    Attributes:
        count: tokens besides the first ones, a scalar.
        mean: of them, ``(heads, d_head)``.
        scatter: sum of ``(v - mean)(v - mean)^T`` over them, ``(heads, d_head, d_head)``.
        first_count: first tokens, a scalar.
        first_mean: of them, ``(heads, d_head)``.
        slot_count: tokens besides the first ones in each slot of positions (see :func:`slots`), ``(2, slots)``:
            regular ones, and those that are like first ones.
        slot_sum: sum over them, ``(2, slots, heads, d_head)``.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    first_count: Tensor
    first_mean: Tensor
    slot_count: Tensor
    slot_sum: Tensor

    @staticmethod
    def of(
        vectors: Tensor, valid: Tensor, *, first_apart: bool = True, like_first: Tensor | None = None
    ) -> SideMoments:
        """Moments of the vectors ``(batch, heads, n, d_head)`` of the tokens that are valid, ``(batch, n)``.

        ``like_first``: further tokens that are like first ones, ``(batch, n)``.
        """
        first, rest, position = _places(valid, first_apart)
        number = int(slots(torch.tensor(vectors.shape[2]))) + 1
        place = slots(position)
        if like_first is not None:
            place = place + number * like_first
        wide = vectors.double()
        by_token = wide.permute(0, 2, 1, 3)
        slot_sum = wide.new_zeros(2 * number, *vectors.shape[1::2])
        slot_sum.index_add_(0, place[rest], by_token[rest])
        slot_count = wide.new_zeros(2 * number)
        slot_count.index_add_(0, place[rest], wide.new_ones(int(rest.sum())))
        count = slot_count.sum()
        mean = slot_sum.sum(0) / count.clamp_min(1)
        centred = _centred(vectors, mean, rest)
        scatter = (centred.mT @ centred).double()
        first_count = first.sum().double()
        first_mean = by_token[first].sum(0) / first_count.clamp_min(1)
        by_class = slot_count.unflatten(0, (2, number)), slot_sum.unflatten(0, (2, number))
        return SideMoments(count, mean, scatter, first_count, first_mean, *by_class)

    def merge(self, other: SideMoments) -> SideMoments:
        """Moments of both sets of tokens (Chan's formula)."""
        count, first_count = self.count + other.count, self.first_count + other.first_count
        step = other.mean - self.mean
        share = other.count / count.clamp_min(1)
        scatter = self.scatter + other.scatter + self.count * share * step[..., :, None] * step[..., None, :]
        first_share = other.first_count / first_count.clamp_min(1)
        number = max(self.slot_count.shape[1], other.slot_count.shape[1])
        return SideMoments(
            count,
            self.mean + share * step,
            scatter,
            first_count,
            self.first_mean + first_share * (other.first_mean - self.first_mean),
            _longer(self.slot_count, number) + _longer(other.slot_count, number),
            _longer(self.slot_sum, number) + _longer(other.slot_sum, number),
        )

    @property
    def covariance(self) -> Tensor:
        """``(heads, d_head, d_head)``; divided by the number of tokens."""
        return self.scatter / self.count


@dataclass(frozen=True, eq=False)
class TokenMoments:
    """Joint mean and covariance of a layer's queries and keys before rotation, ``d_head`` wide.

    Made by :meth:`of` from one attention call; :meth:`merge` (or ``+``) pools micro-batches and ranks exactly,
    in any order. Memory is ``O(heads · d_head²)``: positions share means, about four for each doubling.

    Tokens whose keys are more than half-way from the others' mean to the first token's are further sinks. Their
    means are apart from the others' (they are among the tokens of all other attributes); none are separated where
    the keys of first tokens are not apart. Which tokens these are is decided when a call is added, by the moments
    until then.

    Attributes:
        query: moments of queries, ``(heads, …)``.
        key: moments of keys, ``(kv_heads, …)``.
        cross_scatter: sum of ``(k - k̄)(q - q̄)^T`` over tokens, ``(heads, d_head, d_head)``; None for
            cross-attention, where a query and a key are never of the same token.
        softcap: cap of the logits, or None.
        sliding_window: of the calls, or None.
        sinks: learnt sink logits ``(heads,)``, or None.
        offset_bias: what is added to the logits, by relative position of the key from ``-(m - 1)`` to ``m - 1``,
            ``(heads, 2 m - 1)``; None where nothing is added.
        unexplained: why no attention can be predicted although moments are known; None where it can.
    """

    query: SideMoments
    key: SideMoments
    cross_scatter: Tensor | None
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None
    offset_bias: Tensor | None = None
    unexplained: str | None = None

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        *,
        query_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        self_attention: bool = True,
        known: TokenMoments | None = None,
    ) -> TokenMoments:
        """Moments of one attention call.

        Args:
            query: before rotation, after norms, ``(batch, heads, n, d_head)``.
            key: ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
            query_mask: tokens that count, boolean ``(batch, n)``; None for all. For self-attention it holds for
                keys too.
            key_mask: keys that count, ``(batch, m)``, for cross-attention.
            self_attention: queries and keys are the same tokens.
            known: of calls before, by which it is decided what tokens are like first ones; None: by this call.

        Raises:
            ValueError: shapes that do not fit.
        """
        floating(query, "query")
        floating(key, "key")
        if (
            query.dim() != 4
            or key.dim() != 4
            or query.shape[0] != key.shape[0]
            or query.shape[3] != key.shape[3]
            or query.shape[1] % key.shape[1]
            or (self_attention and query.shape[2] != key.shape[2])
        ):
            raise ValueError(
                "expected query (batch, heads, n, d_head) and key (batch, kv_heads, n, d_head), got "
                f"{tuple(query.shape)} and {tuple(key.shape)}: pass them as the attention function gets them, "
                "with self_attention=False where they are different tokens"
            )
        valid = _mask(query_mask, query)
        with torch.no_grad(), full_precision(query.device):
            if not self_attention:
                sides = (
                    SideMoments.of(query, valid, first_apart=False),
                    SideMoments.of(key, _mask(key_mask, key)),
                )
                return TokenMoments(*sides, None)
            rest = _places(valid, True)[1]
            alike = _like_first(key, rest, SideMoments.of(key, valid) if known is None else known.key)
            of_query, of_key = (SideMoments.of(part, valid, like_first=alike) for part in (query, key))
            return TokenMoments(of_query, of_key, _cross(query, key, of_query.mean, of_key.mean, rest))

    def merge(self, other: TokenMoments) -> TokenMoments:
        """Moments of the tokens of both; what calls say of softcap, window and bias is that of ``self``.

        Raises:
            ValueError: moments of other shapes, or of self-attention and cross-attention.
        """
        if (self.cross_scatter is None) != (other.cross_scatter is None) or (
            self.query.mean.shape != other.query.mean.shape or self.key.mean.shape != other.key.mean.shape
        ):
            raise ValueError(
                f"expected moments of one layer, got {tuple(self.query.mean.shape)} and "
                f"{tuple(other.query.mean.shape)}: merge those of the same layer"
            )
        cross = None
        if self.cross_scatter is not None and other.cross_scatter is not None:
            groups = self.heads // self.kv_heads
            step_q = other.query.mean - self.query.mean
            step_k = (other.key.mean - self.key.mean).repeat_interleave(groups, 0)
            weight = (
                self.query.count * other.query.count / (self.query.count + other.query.count).clamp_min(1)
            )
            cross = self.cross_scatter + other.cross_scatter
            cross = cross + weight * step_k[..., :, None] * step_q[..., None, :]
        longer = max(
            (self, other), key=lambda one: 0 if one.offset_bias is None else one.offset_bias.shape[1]
        )
        return dataclasses.replace(
            self,
            query=self.query.merge(other.query),
            key=self.key.merge(other.key),
            cross_scatter=cross,
            offset_bias=longer.offset_bias,
            unexplained=self.unexplained or other.unexplained,
        )

    __add__ = merge

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.mean.shape[0]

    @property
    def kv_heads(self) -> int:
        """Number of key heads."""
        return self.key.mean.shape[0]

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.query.mean.shape[1]

    def products(self, scaling: float = 1.0, *, checked: bool = True) -> Products:
        """``Cov(k, q)``, ``Cov(q)`` and ``Cov(k)`` of every head, with the softmax scale on the query.

        Args:
            scaling: the softmax scale.
            checked: raise where tokens are too few; False where the caller knows, or takes NaN: to look at their
                number is to wait for the device.

        Raises:
            ValueError: cross-attention, which has no eigenvalues, or fewer than two tokens.
        """
        if self.cross_scatter is None:
            raise ValueError(
                "expected moments of self-attention for a spectrum, got those of cross-attention, where no token "
                "has both a query and a key: leave the layer out"
            )
        if checked and float(self.query.count) < 2:
            raise ValueError(
                f"expected at least two tokens besides the first of a sequence, got {int(self.query.count)}: "
                "pass longer sequences"
            )
        groups = self.heads // self.kv_heads
        return Products(
            scaling * self.cross_scatter / self.query.count,
            scaling**2 * self.query.covariance,
            self.key.covariance.repeat_interleave(groups, 0),
        )

    def spectrum(
        self,
        scaling: float = 1.0,
        *,
        n: int | None = None,
        offset: int | Tensor | None = None,
        rotary: Rotary | None = None,
        checked: bool = True,
    ) -> dict[str, Tensor]:
        """Moments of the eigenvalues of ``scaling · Σ^½ W_QK Σ^½``, Σ the covariance of tokens but the first.

        Args:
            scaling: the softmax scale, for numbers in units of logits.
            n: size of the support; None: ``d_head``.
            offset: relative position of the key, or several ``(offsets,)``. Needs ``rotary``.
            rotary: the layer's rotation.
            checked: see :meth:`products`.

        Returns:
            As :func:`~lightning_qk.functional.qk_moments` with ``sigma=Σ`` (and ``support="head"``), float64.

        Raises:
            ValueError: cross-attention, too few tokens, or an offset without a rotation.
        """
        return self._at(scaling, offset, rotary, checked).moments(n or self.d_head)

    def eigenvalues(
        self, scaling: float = 1.0, *, offset: int | Tensor | None = None, rotary: Rotary | None = None
    ) -> Tensor:
        """The eigenvalues themselves, complex ``(…, heads, d_head)``; arguments as :meth:`spectrum`."""
        core = self._at(scaling, offset, rotary).core
        return core_eigenvalues(core.cpu()).to(core.device)

    def _at(
        self, scaling: float, offset: int | Tensor | None, rotary: Rotary | None, checked: bool = True
    ) -> Products:
        products = self.products(scaling, checked=checked)
        if offset is None:
            return products
        if rotary is None:
            raise ValueError(
                f"expected the layer's rotation with offset={offset!r}, got None: pass rotary= of HeadProjections"
            )
        return products.at(rotary, torch.as_tensor(offset, device=products.core.device))


def slots(position: Tensor) -> Tensor:
    """Slot of each position: one each at first, then four for each doubling, so that memory stays small."""
    return (_SLOTS_PER_OCTAVE * (position.double() / _SLOTS_PER_OCTAVE).log1p() / math.log(2) + 1e-9).long()


class TokenClasses(NamedTuple):
    """Tokens of a position: regular ones, and those like first ones, with a mean each and one covariance.

    Attributes:
        share: of those like first ones at each position, ``(length,)``; that of the first one is 0.
        means: ``(2, heads, length, width)``; the first position has its own mean.
        covariance: around the means, ``(heads, width, width)``.
    """

    share: Tensor
    means: Tensor
    covariance: Tensor


def token_classes(moments: TokenMoments, length: int) -> TokenClasses:
    """What (q, k) of each position are drawn from, 2 d_head wide; sides of cross-attention are independent.

    A mean of few tokens is noisy: it is shrunk to that of its class. What means do not hold stays in the
    covariance. Positions that were not seen are like the last ones before them that were.
    """
    groups = moments.heads // moments.kv_heads
    q, k, cross = moments.query, moments.key, moments.cross_scatter
    if cross is None:
        of_q, of_k = (_classes(side, side.slot_sum, side.mean, side.scatter, length) for side in (q, k))
        of_k = TokenClasses(of_k.share, *(part.repeat_interleave(groups, -3) for part in of_k[1:]))
        covariance = torch.stack(
            [torch.block_diag(*pair) for pair in zip(of_q.covariance, of_k.covariance, strict=True)]
        )
        return TokenClasses(of_k.share, torch.cat([of_q.means, of_k.means], -1), covariance)
    scatter_k = k.scatter.repeat_interleave(groups, 0)
    scatter = torch.cat([torch.cat([q.scatter, cross.mT], -1), torch.cat([cross, scatter_k], -1)], -2)
    mean, first = (
        torch.cat([one, other.repeat_interleave(groups, 0)], -1)
        for one, other in ((q.mean, k.mean), (q.first_mean, k.first_mean))
    )
    sums = torch.cat([q.slot_sum, k.slot_sum.repeat_interleave(groups, 2)], -1)
    return _classes(dataclasses.replace(q, first_mean=first), sums, mean, scatter, length)


def _classes(side: SideMoments, sums: Tensor, mean: Tensor, scatter: Tensor, length: int) -> TokenClasses:
    count = side.slot_count
    # Deviations from the mean of all tokens: (2, slots, heads, width).
    weight = count[..., None, None]
    found = torch.where(weight > 0, sums / weight.clamp_min(1) - mean, 0.0)
    whole = (weight * found).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    kept = torch.where(weight > 0, (weight * found + _SHRINKAGE * whole) / (weight + _SHRINKAGE), whole)
    explained, left = (torch.einsum("cs,cshd,cshe->hde", count, part, part) for part in (found, found - kept))
    index = torch.arange(count.shape[1], device=count.device)
    nearest = torch.where(count.sum(0) > 0, index, 0).cummax(0).values
    place = nearest[slots(torch.arange(length, device=count.device)).clamp_max(len(index) - 1)]
    share = count[1] / count.sum(0).clamp_min(1)
    share, means = share[place], (mean + kept)[:, place].transpose(1, 2).contiguous()
    if side.first_count > 0:
        share[0], means[:, :, 0] = 0.0, side.first_mean
    return TokenClasses(share, means, (scatter - explained + left) / side.count)


def _places(valid: Tensor, first_apart: bool) -> tuple[Tensor, Tensor, Tensor]:
    """First tokens, the others, and positions counted from the first valid one, all ``(batch, n)``."""
    position = (valid.long().cumsum(1) - 1).clamp_min(0)
    first = valid & (position == 0) if first_apart else torch.zeros_like(valid)
    return first, valid & ~first, position


def _mask(mask: Tensor | None, vectors: Tensor) -> Tensor:
    shape = (vectors.shape[0], vectors.shape[2])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=vectors.device)
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"expected a mask (batch, n) = {shape}, got {tuple(mask.shape)}: pass one value a token"
        )
    return mask.to(device=vectors.device, dtype=torch.bool)


def _centred(vectors: Tensor, mean: Tensor, rest: Tensor) -> Tensor:
    """Deviations ``(heads, batch · n, d_head)``, 0 where a token does not count; float32 at least."""
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    out = vectors.to(torch.float64) - mean[None, :, None]
    out = torch.where(rest[:, None, :, None], out, 0.0).to(dtype)
    return out.transpose(0, 1).flatten(1, 2)


def _cross(query: Tensor, key: Tensor, mean_query: Tensor, mean_key: Tensor, rest: Tensor) -> Tensor:
    q, k = _centred(query, mean_query, rest), _centred(key, mean_key, rest)
    return (k.repeat_interleave(len(q) // len(k), 0).mT @ q).double()


def _like_first(key: Tensor, rest: Tensor, known: SideMoments) -> Tensor:
    """Tokens whose keys are more than half-way to the first token's, ``(batch, n)``; none where that says nothing.

    Averaged over key heads; along this line the others must spread less than a quarter of the way.
    """
    way = known.first_mean - known.mean
    square = way.square().sum(-1).clamp_min(1e-30)
    spread = torch.einsum("hd,hde,he->h", way, known.covariance, way).clamp_min(0).sqrt() / square
    says_something = (known.first_count > 0) & (spread.mean() < _APART)
    along = way / square[:, None] / len(way)
    share = torch.einsum("bhnd,hd->bn", key.to(along.dtype), along) - (known.mean * along).sum()
    return rest & (share > 0.5) & says_something


def _longer(tensor: Tensor, number: int) -> Tensor:
    missing = number - tensor.shape[1]
    return tensor if not missing else torch.cat([tensor, tensor.new_zeros(2, missing, *tensor.shape[2:])], 1)


def rotate_tokens(vectors: Tensor, rotary: Rotary, position: Tensor, *, undo: bool = False) -> Tensor:
    """Rotate each token's vectors by its own position, or undo that.

    Args:
        vectors: ``(batch, heads, n, d_head)``.
        rotary: the layer's rotation, its scale included.
        position: ``(batch|1, n)``.
        undo: rotate back, and divide by the scale.
    """
    pairs = rotary.inv_freq.numel()
    stop = rotary.start + 2 * pairs
    before, turned, after = vectors.split([rotary.start, 2 * pairs, vectors.shape[-1] - stop], -1)
    shape = (pairs, 2) if rotary.interleaved else (2, pairs)
    one, other = turned.unflatten(-1, shape).unbind(-1 if rotary.interleaved else -2)
    angle = position.double()[:, None, :, None] * rotary.inv_freq.double()
    angle = -angle if undo else angle
    scale = 1 / rotary.scale if undo else rotary.scale
    cos, sin = (angle.cos() * scale).to(vectors), (angle.sin() * scale).to(vectors)
    parts = torch.stack(
        [one * cos - other * sin, one * sin + other * cos], -1 if rotary.interleaved else -2
    ).flatten(-2)
    return torch.cat([before, parts, after], -1)
