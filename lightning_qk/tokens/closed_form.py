"""What moments of queries and keys predict of attention without drawing tokens."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.token_moments import TokenClasses, TokenMoments, token_classes
from lightning_qk.heads import HeadProjections
from lightning_qk.tokens.predict import (
    check_closed_form,
    predict_logit_std,
    rotated,
    rotated_covariance,
)

_ROWS = 32
# Gauss–Hermite nodes and weights for a standard normal number, five of them.
_NODES = ((-2.856970013872806, 0.011257411327720693), (-1.355626179974266, 0.2220759220056126),
          (0.0, 0.5333333333333333), (1.355626179974266, 0.2220759220056126),
          (2.856970013872806, 0.011257411327720693))  # fmt: skip


class _Group(NamedTuple):
    """Keys of one kind that a row sees: how many, their mean, and their spread around it; by head."""

    keys: float
    mean: Tensor
    spread: Tensor


def predict_closed_form(
    head: HeadProjections, moments: TokenMoments, *, length: int, is_causal: bool
) -> dict[str, Tensor]:
    """``entropy``, ``entropy_normalized``, ``sink_first``, ``linear_share``, ``logit_std`` without drawing tokens.

    A row sees three groups of keys: the first one, those like it, and the others. Given its query q, the logits of
    a group of n keys with mean m and spread A are Gaussian with mean ``s qᵀm`` and variance ``σ² = s² qᵀ A q``, of
    which the mean over queries is taken. A group's partition sum and entropy are those of a random energy model
    (Derrida 1981): ``ln n + σ²/2`` and ``ln n - σ²/2`` as long as ``σ² < 2 ln n``, and frozen beyond,
    ``σ √(2 ln n)`` and 0. Groups compete by a softmax over their partition sums; the distance between their means
    is Gaussian over queries and is averaged by quadrature. Of 32 rows, evenly spaced. Derived.

    The model overlooks that σ² differs between queries and that n is finite near the transition: it is a check of
    :func:`~lightning_qk.predict_attention`, which draws tokens, and not better than it.

    Args:
        head: projections of the layer.
        moments: of the layer.
        length: tokens of a sequence.
        is_causal: whether a token sees those before it alone.

    Returns:
        Float64 tensors ``(heads,)``.

    Raises:
        ValueError: as :func:`~lightning_qk.predict_attention`; also a soft cap, a bias, learnt sinks or a window,
            which have no such form.
    """
    check_closed_form(head, moments, length)
    if moments.sinks is not None:
        raise ValueError("expected logits without learnt sinks for the closed form: use predict_attention")
    classes = token_classes(moments, length)
    d_head = moments.d_head
    has_first = float(moments.key.first_count.sum()) > 0
    of_class = torch.stack([1 - classes.share, classes.share])
    width = classes.covariance[..., :d_head, :d_head]
    rows = torch.linspace(1 if is_causal else 0, length - 1, min(_ROWS, length - 1)).long().unique().tolist()
    sums = _Sums(head, classes, of_class, d_head, has_first)
    found: dict[str, Tensor] = {}
    for row in rows:
        groups = sums.until(row + 1 if is_causal else length)
        here = torch.tensor([row], device=classes.means.device)
        spread = rotated_covariance(width, head, here)
        for weight, mean in zip(of_class[:, row].tolist(), classes.means[..., :d_head], strict=True):
            if weight > 0:
                centre = rotated(mean[:, here], head, here)[:, 0]
                for name, value in _row(groups, centre, spread, head.scaling, has_first).items():
                    found[name] = found.get(name, 0.0) + value * (weight / len(rows))
    return found | {"logit_std": predict_logit_std(head, moments, length=length, is_causal=is_causal)}


class _Sums:
    """Running sums over the keys that rows see, one group of them after the other."""

    def __init__(
        self, head: HeadProjections, classes: TokenClasses, of_class: Tensor, d_head: int, has_first: bool
    ) -> None:
        self._head = head
        self._means = classes.means[..., d_head:]
        self._covariance = classes.covariance[..., d_head:, d_head:]
        self._of_class = of_class
        self._has_first = has_first
        self._start = int(has_first)
        self._count = [0.0, 0.0]
        self._total = [torch.zeros_like(self._means[0, :, 0]) for _ in range(2)]
        self._outer = [torch.zeros_like(self._covariance) for _ in range(2)]

    def until(self, stop: int) -> list[_Group]:
        """The groups of keys before a position: the first one where it is apart, the others, those like it."""
        place = torch.arange(self._start, stop, device=self._means.device)
        self._start = max(stop, self._start)
        for kind in range(2):
            weight = self._of_class[kind, place]
            if len(place) and float(weight.sum()) > 0:
                mean = rotated(self._means[kind][:, place], self._head, place)
                self._count[kind] += float(weight.sum())
                self._total[kind] = self._total[kind] + (weight[:, None] * mean).sum(1)
                self._outer[kind] = self._outer[kind] + (weight[:, None] * mean).mT @ mean
                self._outer[kind] += rotated_covariance(self._covariance, self._head, place, weight)
        groups = []
        if self._has_first:
            zero = torch.zeros(1, dtype=torch.long, device=self._means.device)
            first = rotated(self._means[0][:, zero], self._head, zero)[:, 0]
            groups.append(_Group(1.0, first, torch.zeros_like(self._covariance)))
        for count, total, outer in zip(self._count, self._total, self._outer, strict=True):
            if count > 0:
                mean = total / count
                groups.append(_Group(count, mean, outer / count - mean[:, :, None] * mean[:, None]))
        return groups


def _row(
    groups: list[_Group], centre: Tensor, width: Tensor, scaling: float, has_first: bool
) -> dict[str, Tensor]:
    """The statistics of one row, averaged over its queries."""
    n = sum(group.keys for group in groups)
    # Distances are from the largest group's mean; of that of the first group the query's part is the coordinate.
    base = max(groups, key=lambda group: group.keys).mean
    ways = [group.mean - base for group in groups]
    gap = [scaling * (centre * way).sum(-1) for way in ways]
    lead = ways[0] if has_first else ways[-1]
    lead_spread = (scaling**2 * torch.einsum("hd,hde,he->h", lead, width, lead)).clamp_min(0)
    slope = [
        scaling**2 * torch.einsum("hd,hde,he->h", way, width, lead) / lead_spread.clamp_min(1e-30)
        for way in ways
    ]
    inner = [torch.einsum("hd,hde,he->h", centre, group.spread, centre) for group in groups]
    inner = [one + (group.spread * width.mT).sum((-2, -1)) for one, group in zip(inner, groups, strict=True)]
    variance = [(scaling**2 * one).clamp_min(0) for one in inner]
    parts = [_energy(group.keys, one) for group, one in zip(groups, variance, strict=True)]
    share = torch.tensor([group.keys / n for group in groups], dtype=centre.dtype)
    out: dict[str, Tensor] = {}
    for node, weight in _NODES:
        step = node * lead_spread.sqrt()
        level = torch.stack([own + way * step for own, way in zip(gap, slope, strict=True)])
        part = torch.softmax(level + torch.stack([one for one, _ in parts]), 0)
        entropy = (part * torch.stack([one for _, one in parts])).sum(0) - torch.xlogy(part, part).sum(0)
        mean = (share[:, None].to(level) * level).sum(0)
        off = level - mean
        sigma = torch.stack(variance).sqrt().clamp_min(1e-12)
        inside = torch.special.ndtr((n - 1 - off) / sigma) - torch.special.ndtr((-1 - off) / sigma)
        values = {
            "entropy": entropy,
            "entropy_normalized": entropy / math.log(n) if n > 1 else torch.full_like(entropy, torch.nan),
            "sink_first": part[0] if has_first else part.sum(0) / n,
            "linear_share": (share[:, None].to(inside) * inside).sum(0),
        }
        for name, value in values.items():
            out[name] = out.get(name, 0.0) + weight * value
    return out


def _energy(count: float, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the partition sum of a random energy model, and its entropy."""
    logarithm = math.log(count)
    critical = 2 * max(logarithm, 0.0)
    frozen = variance >= critical
    free = torch.where(frozen, (critical * variance).sqrt(), logarithm + variance / 2)
    if logarithm < 0:
        free = torch.full_like(variance, logarithm)
    return free, torch.where(frozen, 0.0, logarithm - variance / 2)
