"""What attention sinks do to a head's output: their values' share of it, and attention that is waived."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qk.functional._rows import Selection, eligible_keys, probabilities
from lightning_qk.functional.arguments import as_logits
from lightning_qk.functional.attention import MeanSums
from lightning_qk.functional.checks import boolean, floating, number, one_device
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions
from lightning_qk.functional.precision import at_least_float32, full_precision, norms

if TYPE_CHECKING:
    from typing_extensions import Unpack

SINK_STATISTICS = (
    "sink_number",
    "sink_share",
    "sink_output",
    "waiver_rate",
    "waiver_mass",
    "waiver_position",
)
"""What :func:`sink_statistics` gives."""

# A value is small when its norm is below this share of the median.
_SMALL = 0.5
# A direction this near to the span of others, as the sine of an angle, lies in it: rounding of equal values.
_ALIKE = 1e-4


def sink_statistics(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    rows: int | None = None,
    threshold: float = 0.2,
    per_sequence: bool = False,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> dict[str, Tensor]:
    r"""Attention sinks of each head and what they do to its output, in memory linear in the sequence length.

    A key is a sink where the rows that see it give it more than ``threshold`` on average; keys seen by fewer than
    a quarter as many rows as the most-seen key are left out, as of sink_rate. A key is a *waiver* where the norm
    of its value is below half the median over the sequence's keys: attention that goes there is waived, since
    it adds next to nothing to the output.

    ================= ========================================================================================
    sink_number       how many keys of a sequence are sinks
    sink_share        share of the rows that see a key and give it more than ``threshold``; of the key, among
                      those that count, where it is largest
    sink_output       share of the head's output in the span of the sinks' values, ``‖O P‖² / ‖O‖²``, where the
                      rows of O are ``Σ_j p_ij v_j``; 0 without sinks
    waiver_rate       share of the keys that are waivers
    waiver_mass       attention that goes to waivers, mean over rows; equal to waiver_rate where attention does not
                      look at the values' norms
    waiver_position   share of the variance of the waiver indicator, over keys and sequences, that the position
                      explains: 1 where every sequence has its waivers at the same places, 0 where the places
                      of one say nothing about another's, so that features decide
    ================= ========================================================================================

    The number of sinks and their values' share of the output is catch, tag, release after Zhang et al. 2025 (arXiv
    2502.00919) [S], whose form is derived here [R]. Isotropic outputs would lie in the span with a share of
    sink_number / d_value, which is the number to compare with. sink_share is after Wu et al. 2025 (arXiv
    2502.01951), who count ``A_ij > 0.2`` [V]; that the largest over the keys is taken is ours [R]. The waiver is
    after arXiv 2407.01601 [S], its form derived [R].

    waiver_position is derived [R]: with the indicator's deviation x from its mean over all keys of all sequences,
    the mean of ``x_bj x_b'j`` over pairs of sequences at the same position, over the mean of ``x_bj²``. It is the
    share of an effect of the position in an analysis of variance, without the bias of few sequences: by chance it
    is about 0, and may be below. It compares the sequences of one call, so that it is NaN for a single one, and
    where no key or every key is a waiver. Positions count from the first key that is seen, so that padding on the
    left does not shift them. What is always at one place, such as a first token that is the same in every
    sequence, is both position and feature, and counts as position.

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`AttentionLogits` and ``value=``.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        value: shape ``(batch, value_heads, m, d_value)``; ``value_heads`` divides ``heads``.
        rows: how many query rows to sample in each sequence; None for all. Which keys are sinks is decided by
            the sampled rows then.
        threshold: attention above which a key is a sink, in (0, 1).
        per_sequence: return ``(batch, heads)`` instead of ``(heads,)``.
        generator: where sampled rows are drawn from; None is torch's global generator.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`. A learnt sink is part
            of the softmax's denominator; it has no value, and is none of the keys counted here.

    Returns:
        A dict of float tensors, ``(heads,)`` or ``(batch, heads)``. waiver_mass is a mean over rows, waiver_rate
        one over keys, the others but waiver_position are means over sequences. NaN where nothing counts.

    Raises:
        ValueError: shapes that do not fit, a mask of another form, ``rows`` below 1, or a threshold outside of
            (0, 1).
    """
    boolean(per_sequence, "per_sequence")
    sums = sink_sums(query, key, value, rows=rows, threshold=threshold, generator=generator, **options)
    return dict(zip(SINK_STATISTICS, sums.means(per_sequence=per_sequence), strict=True))


@torch.no_grad()
def sink_sums(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    rows: int | None = None,
    threshold: float = 0.2,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> MeanSums:
    """The additive form of :func:`sink_statistics`, for accumulation; same arguments."""
    logits = as_logits(query, key, options)
    threshold = number(threshold, "threshold")
    if not 0 < threshold < 1:
        raise ValueError(f"expected a threshold between 0 and 1, got {threshold}: 0.2 is usual")
    batch, heads, _, m = logits.shape
    value = floating(value, "value")
    one_device(query=torch.empty(0, device=logits.device), value=value)
    if (
        value.dim() != 4
        or value.shape[0] != batch
        or value.shape[2] != m
        or not value.shape[1]
        or heads % value.shape[1]
    ):
        raise ValueError(
            f"expected a value (batch, value_heads, m, d_value) = ({batch}, value_heads, {m}, d_value) with "
            f"value_heads dividing {heads}, got {tuple(value.shape)}: pass it as the attention function gets it"
        )
    with full_precision(logits.device):
        selection = Selection(logits, rows=rows, generator=generator)
        seen = selection.seen
        if selection.may_be_padded:
            value = torch.where(seen[:, None, :, None], value, 0.0)
        value = at_least_float32(value).contiguous()
        received = _Received(selection, value, threshold)
        has_rows = received.rows > 0

        counts = eligible_keys(received.seen)
        is_sink = counts & (received.mass > threshold * received.seen)
        above = torch.where(counts, received.above / received.seen.clamp_min(1), 0.0)
        output = torch.where(selection.used[:, None, :, None], received.output, 0.0)
        energy = _energy(output)
        share = torch.where(energy > 0, _explained(output, value, is_sink) / energy, 0.0)

        small = _is_small(value, seen).repeat_interleave(heads // value.shape[1], 1)
        stands_for = selection.weights()
        within, variance = _position_effect(small.double(), seen & selection.valid.any(1, keepdim=True))
        totals = [
            (is_sink.sum(-1), has_rows),
            (above.amax(-1) if m else has_rows, has_rows),
            (share, has_rows & (energy > 0)),
            (small.sum(-1) * has_rows, seen.sum(-1, keepdim=True) * has_rows),
            ((received.mass * small).sum(-1) * stands_for, received.rows * stands_for),
            (within, variance),
        ]
        total, weight = (
            torch.stack([part.double() for part in column]) for column in zip(*totals, strict=True)
        )
    return MeanSums(total, weight)


class _Received:
    """One pass over the rows: the attention that each key receives, and the output of each row.

    The outputs are as large as the queries, so that no second pass is needed once the sinks are known.

    Attributes:
        mass: attention that each key receives from the rows that count, ``(batch, heads, m)``.
        above: from how many of them it receives more than the threshold, same shape.
        seen: how many of them see it, same shape.
        rows: how many rows that count see a key, ``(batch, heads)``.
        output: of each row that is looked at, ``(batch, heads, rows, d_value)``.
    """

    def __init__(self, selection: Selection, value: Tensor, threshold: float) -> None:
        logits = selection.logits.in_range()
        batch, heads, _, m = logits.shape
        options: dict[str, Any] = {"dtype": logits.dtype, "device": logits.device}
        value = value.to(logits.dtype)
        value_heads, _, d_value = value.shape[1:]
        self.mass = torch.zeros(batch, heads, m, **options)
        self.above, self.seen = torch.zeros_like(self.mass), torch.zeros_like(self.mass)
        self.rows = torch.zeros(batch, heads, **options)
        self.output = torch.zeros(batch, heads, selection.count, d_value, **options)
        chunks = list(logits.chunks(selection.count))
        longest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        buffer = torch.empty(batch * heads * longest * m, **options)
        for rows in chunks:
            chunk = logits.chunk(selection.part(rows), buffer)
            is_row = selection.used[:, None, rows] & (chunk.keys > 0)
            self.rows += is_row.sum(-1)
            p = probabilities(chunk)
            count, width = p.shape[-2:]
            keep = selection.used[:, None, None, rows].to(p.dtype)
            self.mass[..., :width] += (keep @ p).squeeze(-2)
            # Query heads of one group become rows of one product.
            grouped = p.view(batch * value_heads, heads // value_heads * count, width)
            mixed = grouped @ value[:, :, :width].reshape(batch * value_heads, width, d_value)
            self.output[:, :, rows] = mixed.view(batch, heads, count, d_value)
            torch.gt(p, threshold, out=p)
            self.above[..., :width] += (keep @ p).squeeze(-2)
            edge = width if chunk.shown is None else chunk.edge
            self.seen[..., :edge] += keep.sum(-1)
            if chunk.shown is not None:
                self.seen[..., edge:width] += (keep @ chunk.shown).squeeze(-2)


def _explained(output: Tensor, value: Tensor, is_sink: Tensor) -> Tensor:
    """``‖O P‖²`` for the span of the values that are marked, ``(batch, heads)`` in float64."""
    batch, heads, _, d_value = output.shape
    most = int(is_sink.sum(-1).amax()) if is_sink.numel() else 0
    if most == 0:
        return torch.zeros(batch, heads, dtype=torch.float64, device=output.device)
    marked, place = is_sink.to(torch.uint8).topk(most, dim=-1)
    head = torch.arange(heads, device=value.device) // (heads // value.shape[1])
    sequence = torch.arange(batch, device=value.device)
    vectors = value[sequence[:, None, None], head[:, None], place].double()
    # Only directions matter, however short a sink's value is: it is short more often than not.
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    vectors = vectors / length.clamp_min(torch.finfo(value.dtype).tiny) * marked[..., None]
    # The smaller of the two Gram matrices; precise enough in float64 to tell directions that differ.
    if most < d_value:
        spread, mixed = torch.linalg.eigh(vectors @ vectors.mT)
        basis = vectors.mT @ mixed * spread.clamp_min(_ALIKE**2).rsqrt()[..., None, :]
    else:
        spread, basis = torch.linalg.eigh(vectors.mT @ vectors)
    basis = basis * (spread > _ALIKE**2)[..., None, :]
    return _energy(output @ basis.to(output.dtype))


def _energy(rows: Tensor) -> Tensor:
    """Sum of squares over rows, ``(batch, heads)`` in float64: a learnt sink may leave very little."""
    return torch.linalg.vector_norm(rows, dim=(-2, -1), dtype=torch.float64).square()


def _is_small(value: Tensor, seen: Tensor) -> Tensor:
    """Keys whose value is short against the median of those that are seen, ``(batch, value_heads, m)``."""
    length = norms(value)
    known = torch.where(seen[:, None], length, torch.nan)
    if not value.shape[2]:
        return torch.zeros_like(length, dtype=torch.bool)
    return known < _SMALL * known.nanmedian(-1, keepdim=True).values


def _position_effect(indicator: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance between sequences at the same position, and variance, of each sequence's share in both.

    Both ``(batch, heads)``, of an indicator ``(batch, heads, m)``; 0 where there is nothing to compare.
    """
    batch, _, m = indicator.shape
    keys = seen.sum()
    x = indicator * seen[:, None]
    x = (x - x.sum((0, 2), keepdim=True) / keys.clamp_min(1)) * seen[:, None]
    # Padding on the left goes to the end, where it is 0.
    first = seen.to(torch.uint8).argmax(1, keepdim=True) if m else seen.new_zeros(batch, 1, dtype=torch.long)
    turn = (torch.arange(m, device=x.device) + first) % max(m, 1)
    x = x.gather(-1, turn[:, None].expand_as(x))
    together = seen.gather(-1, turn).double().sum(0)
    pairs = (together * (together - 1)).sum()
    covariance = (x * (x.sum(0) - x)).sum(-1) / pairs.clamp_min(1)
    variance = torch.where(pairs > 0, x.square().sum(-1) / keys.clamp_min(1), 0.0)
    return covariance, variance
