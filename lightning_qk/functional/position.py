"""How much of a head's logits is explained by the distance between query and key alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_qk.functional.arguments import as_logits
from lightning_qk.functional.checks import boolean
from lightning_qk.functional.chunks import Chunk
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions
from lightning_qk.functional.precision import full_precision

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ITERATIONS = 200
_TOLERANCE = 1e-12


@torch.no_grad()
def positional_share(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    per_sequence: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Share of the variance of a head's logits that a function of the offset i − j alone explains.

    A softmax ignores a constant that is added to all logits of a row. So each row may have a constant of its
    own, and the share is that part of what rows leave unexplained which one function f of the offset explains:

    .. math::
        1 - \min_{c, f} \sum_{ij} (\omega_{ij} - c_i - f(i - j))^2 \Big/ \min_{c} \sum_{ij} (\omega_{ij} - c_i)^2

    over the visible pairs of valid rows, with the least squares solved jointly, so that rows that see different
    keys (causal masks, windows, padding) are treated exactly. It is 1 where the logits are a Toeplitz matrix plus
    row constants, near 0 where they follow content, and does not depend on the logits' scale. By chance alone
    it is about the number of offsets over the number of pairs, 2 / n for one sequence of n tokens, and less
    when one f is fitted to many sequences.

    The measure is derived here, after the distinction of positional from semantic attention of Cui et al. 2024
    (arXiv 2402.03902). A logit that grows linearly with the key's absolute place is a function of the offset as
    well, since the row's own place is one of its constants.

    Args:
        query: ``(batch, heads, n, d_head)`` as the attention function gets it, or an :class:`AttentionLogits`.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        per_sequence: fit f to each sequence and return ``(batch, heads)``, instead of one f for all sequences.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`. A bias is part of
            what is explained; a learnt sink has no position and is of no effect.

    Returns:
        Shares in [0, 1], ``(heads,)`` or ``(batch, heads)``, float32 or float64 as the logits; NaN where the
        logits of no row vary.

    Raises:
        ValueError: shapes that do not fit, or a mask of another form.

    Example:
        >>> place = torch.arange(8.0)
        >>> query = torch.stack([place.cos(), place.sin()], -1)[None, None]
        >>> round(positional_share(query, query, is_causal=True).item(), 4)  # ω = cos(i − j)
        1.0
    """
    boolean(per_sequence, "per_sequence")
    logits = as_logits(query, key, options)
    with full_precision(logits.device):
        result = logits.result_dtype
        counted = logits.counted()
        valid = counted.rows
        if logits.query_offset is None:
            valid = torch.zeros_like(valid)  # no offsets
        logits = logits.without_padding(counted).in_range()
        pairs = _collect(logits, valid)
        if not per_sequence:
            pairs = pairs.pooled()
        apply = _by_interval if pairs.is_interval else _by_chunk
        explained = _solve(pairs, lambda f: apply(pairs, f, logits, valid))
        share = (explained / pairs.total).clamp(0.0, 1.0)
    # Rounding alone leaves this much of logits that do not vary.
    noise = (8 * torch.finfo(result).eps) ** 2 * pairs.energy
    share = torch.where(pairs.total > noise, share, torch.nan).to(result)
    return share if per_sequence else share[0]


class _Pairs(NamedTuple):
    """Sums over the visible pairs of valid rows, in float64; offsets are counted from −(m − 1) to n − 1.

    The normal equations of f, once each row's constant is eliminated, are ``(diag(counts) − Σ_i u_i u_iᵀ / n_i) f
    = target`` where u_i marks the offsets that row i sees.
    """

    total: Tensor  # (groups, heads): squares of logits around their row's mean; a group is fitted together
    energy: Tensor  # (groups, heads): squares of logits
    target: Tensor  # (groups, heads, offsets): logits around their row's mean, summed by offset
    counts: Tensor  # (groups, heads|1, offsets): how many pairs have an offset
    number: Tensor  # (batch, heads|1, n): keys that a row sees; 0 for rows that do not count
    low: Tensor  # (batch, heads|1, n): the first of them
    high: Tensor  # (batch, heads|1, n): one behind the last of them
    is_interval: bool  # every row sees all keys between its first and its last

    def pooled(self) -> _Pairs:
        """All sequences as one group."""
        total, energy, target, counts = (tensor.sum(0, keepdim=True) for tensor in self[:4])
        return self._replace(total=total, energy=energy, target=target, counts=counts)


def _collect(logits: AttentionLogits, valid: Tensor) -> _Pairs:
    batch, heads, n, m = logits.shape
    like: dict[str, Any] = {"dtype": torch.float64, "device": logits.device}
    total, energy = torch.zeros(2, batch, heads, **like)
    target = torch.zeros(batch, heads, max(n + m - 1, 0), **like)
    rows: list[tuple[Tensor, ...]] = []
    for part in logits.chunks(n):
        chunk = logits.chunk(part, logits.buffer(part.stop - part.start))
        shown = _shown(chunk, valid[:, part])
        number = shown.sum(-1)
        x = chunk.logits.double() * shown
        x_mean = x.sum(-1) / number.clamp_min(1)
        energy += x.square().sum((-2, -1))
        x = (x - x_mean[..., None]) * shown
        total += x.square().sum((-2, -1))
        width = shown.shape[-1]
        reach = slice(part.start + m - width, part.stop + m - 1)
        target[..., reach] += _diagonal_sums(x)
        places = torch.arange(width, device=shown.device)
        low = torch.where(shown > 0, places, width).amin(-1)
        high = torch.where(shown > 0, places + 1, 0).amax(-1)
        counted = pad(_diagonal_sums(shown), (reach.start, target.shape[-1] - reach.stop))
        rows.append((number, torch.minimum(low, high), high, counted))
    if not rows:
        empty = torch.zeros(batch, 1, 0, **like)
        return _Pairs(total, energy, target, target, empty, empty.long(), empty.long(), True)
    columns = list(zip(*rows, strict=True))
    number, low, high = (torch.cat(column, -1) for column in columns[:3])
    is_interval = bool((high - low == number).all())
    return _Pairs(total, energy, target, sum(columns[3]), number, low, high, is_interval)


def _shown(chunk: Chunk, keep: Tensor) -> Tensor:
    """1 for visible pairs of rows that count, else 0, ``(batch, heads|1, rows, keys)`` in float64."""
    width = chunk.logits.shape[-1]
    keep = keep[:, None, :, None].double()
    if chunk.shown is None:
        return keep.expand(-1, -1, -1, width)
    shown = chunk.shown.double()
    if chunk.edge:
        shown = pad(shown, (chunk.edge, 0), value=1.0)
    return shown * keep


def _diagonal_sums(x: Tensor) -> Tensor:
    """Sums of ``(..., rows, keys)`` over pairs of one row − key, from −(keys − 1) to rows − 1."""
    rows, keys = x.shape[-2:]
    # Each row is one longer than the rows it becomes part of, so that it begins one place further right.
    skewed = pad(x.flip(-1), (0, rows)).flatten(-2)[..., : rows * (keys + rows - 1)]
    return skewed.unflatten(-1, (rows, keys + rows - 1)).sum(-2)


def _solve(pairs: _Pairs, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of squares that f explains, ``(groups, heads)``, by preconditioned conjugate gradients.

    The system is singular (a constant f is each row's constant) and consistent, which conjugate gradients do not
    mind; what is explained grows with every iteration.
    """
    target = pairs.target
    inverse = pairs.counts.clamp_min(1).reciprocal()
    solution = torch.zeros_like(target)
    residual = target.clone()
    scaled = inverse * residual
    direction = scaled.clone()
    power = first = (residual * scaled).sum(-1)
    for _ in range(_ITERATIONS):
        if bool((power <= _TOLERANCE * first).all()):
            break
        image = apply(direction)
        curvature = (direction * image).sum(-1)
        step = torch.where(curvature > 0, power / curvature, 0.0)[..., None]
        solution += step * direction
        residual -= step * image
        scaled = inverse * residual
        before, power = power, (residual * scaled).sum(-1)
        direction = scaled + torch.where(before > 0, power / before, 0.0)[..., None] * direction
    return (target * solution).sum(-1)


def _by_interval(pairs: _Pairs, f: Tensor, logits: AttentionLogits, valid: Tensor) -> Tensor:
    """The normal equations' matrix times f by sums over intervals of offsets: linear in n."""
    batch, heads, n, m = logits.shape
    groups = f.shape[0]

    def by_group(x: Tensor) -> Tensor:
        """``(batch, heads|1, n)`` as ``(groups, heads, rows)``."""
        x = x.expand(-1, heads, -1)
        return x if groups == batch else x.transpose(0, 1).reshape(1, heads, batch * n)

    place = torch.arange(m, m + n, device=f.device)
    start, end = by_group(place - pairs.high), by_group(place - pairs.low)
    sums = pad(f.cumsum(-1), (1, 0))
    mean = (sums.gather(-1, end) - sums.gather(-1, start)) / by_group(pairs.number).clamp_min(1)
    edges = torch.zeros_like(sums).scatter_add_(-1, start, mean).scatter_add_(-1, end, -mean)
    return pairs.counts * f - edges.cumsum(-1)[..., :-1]


def _by_chunk(pairs: _Pairs, f: Tensor, logits: AttentionLogits, valid: Tensor) -> Tensor:
    """The same for rows that see keys with gaps: visibility is computed again, some rows at a time."""
    n, m = logits.shape[2:]
    out = pairs.counts * f
    for part in logits.chunks(n):
        visible = logits.visible(part, logits.positions(part), slice(0, m))
        assert visible is not None  # there is a mask with gaps
        shown = (visible & valid[:, None, part, None]).double().flip(-1)
        reach = slice(part.start, part.stop + m - 1)
        mean = (f[..., reach].unfold(-1, m, 1) * shown).sum(-1) / pairs.number[..., part].clamp_min(1)
        seen = _diagonal_sums((mean[..., None] * shown).flip(-1))
        out[..., reach] -= seen if len(seen) == len(out) else seen.sum(0, keepdim=True)
    return out
