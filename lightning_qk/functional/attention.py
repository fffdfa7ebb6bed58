r"""Where attention goes: statistics of softmax rows, by chunks, never a whole n × n map.

One query row at a time sees its visible keys; a statistic is a number per row, and what is returned is its
mean over the valid rows. Rows may be sampled: uniformly and without replacement within each sequence, so that
means are unbiased, with standard errors of a stratified sample.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional._kernel import Collected, Wanted, kernel_rows
from lightning_qk.functional._row_statistics import EXTREMES, ROW_STATISTICS, collect_rows
from lightning_qk.functional._rows import Selection, eligible_keys, key_norm_sums, probabilities, query_norms
from lightning_qk.functional.arguments import as_logits
from lightning_qk.functional.checks import KindError, boolean, dense
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits
from lightning_qk.functional.precision import full_precision

if TYPE_CHECKING:
    from typing_extensions import Unpack

MEAN_STATISTICS = (*ROW_STATISTICS, "query_norm", "sink_rate", "key_norm")
"""Statistics that are means, with a standard error when rows are sampled."""

POSITION_STATISTICS = ("distance", "distance_spread", "diagonal")
"""Statistics that need the position of a row's query among the keys."""

STATISTICS = (*MEAN_STATISTICS, *EXTREMES)

SINK_ATTENTION = 0.3
"""Attention above which Gu et al. (arXiv 2410.10781) count a key as a sink."""


class AttentionSums(NamedTuple):
    """Additive form of the statistics: sums over sequences, micro-batches and ranks give their pooled means.

    Attributes:
        total: weighted sums, shape ``(len(MEAN_STATISTICS), batch, heads)``.
        weight: number of rows in each sum (of sequences for ``sink_rate``, of keys for
            ``key_norm``), same shape.
        variance: sampling variance of ``total``, same shape; 0 where every row was used.
        maximum: shape ``(len(EXTREMES), batch, heads)``; −inf for a sequence without valid rows.
    """

    total: Tensor
    weight: Tensor
    variance: Tensor
    maximum: Tensor


def attention_statistics(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    rows: int | None = None,
    only: Collection[str] | None = None,
    per_sequence: bool = False,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> dict[str, Tensor]:
    r"""Statistics of attention per head, in memory linear in the sequence length.

    With logits ``ω_ij = softcap(scaling q_i·k_j) + bias_ij``, probabilities ``p_ij`` of the softmax over the
    ``n_i`` keys visible to row i, before dropout:

    ===================== ====================================================================================
    entropy               ``−Σ_j p_ij log p_ij``, nats
    entropy_normalized    entropy over ``log n_i``; rows with one visible key are left out
    participation         ``1 / Σ_j p_ij²``, effective number of keys
    max_prob              ``max_j p_ij``
    max_logit             maximum of ω over all visible pairs
    max_abs_logit         maximum of abs(ω) over all visible pairs
    logit_std             standard deviation of ω over the row's visible keys
    distance              ``Σ_j p_ij |i − j|``, positions
    distance_spread       standard deviation of ``|i − j|`` under p, positions
    diagonal              ``p_ii``
    sink_first            probability of the first key that the row can see
    sink_learnt           probability of the learnt sink (only with ``sinks``)
    query_norm            Euclidean norm of the row's query, as the attention function gets it
    key_norm              mean Euclidean norm of the keys that some row sees; of all of them, sampled or not
    sink_rate             share of keys that receive more than 0.3 on average from the rows that see them;
                          keys seen by fewer than a quarter as many rows as the most-seen key are left out
    linear_share          share of the row's visible keys with ``0 < 1/n_i + (ω_ij − mean_j ω_ij)/n_i < 1``,
                          the window of the piecewise linear softmax
    ===================== ====================================================================================

    Sources: entropy, distance and participation are standard; max_logit and the norms are what Wortsman et al.
    2023 (arXiv 2309.14322: logits grow through the norms) and Kimi K2 (arXiv 2507.20534) watch [V]; sink_rate
    after Gu et al. 2024 (arXiv 2410.10781; threshold 0.3); linear_share is the measured counterpart of Bao et
    al. 2024's signal propagation probability (derived). A learnt sink is part of the softmax's denominator, of
    entropy (with ``n_i + 1`` outcomes) and of participation; it is no key, so that it has no distance and no
    max_prob.

    Args:
        query: ``(batch, heads, n, d_head)`` as the attention function gets it, or an :class:`AttentionLogits`.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        rows: how many query rows to sample in each sequence; None for all.
        only: names of the statistics to return; None for all. On a GPU linear_share and sink_rate take a sweep
            over ``q·kᵀ`` each that the others do not need.
        per_sequence: return ``(batch, heads)`` instead of ``(heads,)``.
        generator: where sampled rows are drawn from; None is torch's global generator.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`.

    Rows that see no key are left out.

    Returns:
        A dict of float tensors, ``(heads,)`` or ``(batch, heads)``: the statistics above and, with ``rows``,
        the standard error of each mean as ``<name>_se`` (that of sink_rate is approximate: a threshold on
        sampled means). Maxima over sampled rows are lower bounds and have no standard error. NaN where no
        row counts.

    Raises:
        ValueError: shapes that do not fit, a mask of another form, ``rows`` below 1, or other names in ``only``.

    Example:
        >>> query, key = torch.zeros(1, 1, 4, 8), torch.randn(1, 1, 4, 8)  # all logits are 0
        >>> found = attention_statistics(query, key, is_causal=True)
        >>> found["entropy_normalized"].tolist(), found["max_logit"].tolist()
        ([1.0], [0.0])
    """
    boolean(per_sequence, "per_sequence")
    logits = as_logits(query, key, options)
    sums = attention_sums(logits, rows=rows, only=only, generator=generator)
    found = means(
        sums, per_sequence=per_sequence, standard_errors=rows is not None, has_sinks=logits.sinks is not None
    )
    if only is None:
        return found
    return {name: value for name, value in found.items() if name.removesuffix("_se") in only}


def logit_statistics(
    logits: Tensor,
    *,
    rows: int | None = None,
    query_mask: Tensor | None = None,
    query_offset: int | None = 0,
    self_attention: bool | None = None,
    relative: bool = False,
    sinks: Tensor | None = None,
    per_sequence: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The statistics of :func:`attention_statistics`, from the logits that a softmax gets.

    For attention whose logits are more than a scaled ``q · k``: whatever is added to them, masks included, is part
    of them. Without queries and keys, query_norm and key_norm are NaN.

    Args:
        logits: ``(batch, heads, n, m)``, as for :meth:`AttentionLogits.given`, like ``query_mask``,
            ``query_offset``, ``self_attention``, ``relative`` and ``sinks``.
        rows: as in :func:`attention_statistics`, like ``per_sequence`` and ``generator``.
        query_mask: rows to count, boolean ``(batch, n)``.
        query_offset: position of the first query; None: distance, distance_spread and diagonal are NaN.
        self_attention: queries and keys are the same tokens; None: when ``n == m``.
        sinks: learnt extra logits, broadcastable to ``(batch, heads, n)``.
        relative: rows are known up to a constant: max_logit and max_abs_logit are NaN.
        per_sequence: return ``(batch, heads)`` instead of ``(heads,)``.
        generator: where sampled rows are drawn from.

    Returns:
        As :func:`attention_statistics`, in float32 at least.

    Raises:
        ValueError: as both.
    """
    given = AttentionLogits.given(
        logits,
        query_mask=query_mask,
        query_offset=query_offset,
        self_attention=self_attention,
        relative=relative,
        sinks=sinks,
    )
    return attention_statistics(given, rows=rows, per_sequence=per_sequence, generator=generator)


def means(
    sums: AttentionSums, *, per_sequence: bool, standard_errors: bool, has_sinks: bool
) -> dict[str, Tensor]:
    """Means of one call, ``(heads,)`` or ``(batch, heads)``; that of the learnt sink where there is one."""
    if not per_sequence:
        empty = sums.maximum.new_full((len(EXTREMES), 1, sums.maximum.shape[2]), -math.inf)
        maximum = torch.cat([sums.maximum, empty], 1).amax(1)
        sums = AttentionSums(sums.total.sum(1), sums.weight.sum(1), sums.variance.sum(1), maximum)
    out = finish(sums, standard_errors=standard_errors)
    if not has_sinks:
        out = {name: value for name, value in out.items() if not name.startswith("sink_learnt")}
    return out


def finish(sums: AttentionSums, *, standard_errors: bool) -> dict[str, Tensor]:
    """Turn sums into means, with ``<name>_se`` where asked; NaN where nothing was counted."""
    mean = sums.total / sums.weight
    out = dict(zip(MEAN_STATISTICS, mean, strict=True))
    maximum = sums.maximum.masked_fill(sums.maximum == -math.inf, math.nan)
    out.update(zip(EXTREMES, maximum, strict=True))
    if standard_errors:
        error = sums.variance.sqrt() / sums.weight
        out.update((f"{name}_se", value) for name, value in zip(MEAN_STATISTICS, error, strict=True))
    return out


@torch.no_grad()
def attention_sums(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    rows: int | None = None,
    only: Collection[str] | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionSums:
    """The additive form of :func:`attention_statistics`, for accumulation; same arguments."""
    logits = as_logits(query, key, options)
    wanted = _wanted(only)
    with full_precision(logits.device):
        selection = Selection(logits, rows=rows, generator=generator)
        logits, used, index = selection.logits, selection.used, selection.index
        collected = kernel_rows(logits, used, index, wanted)
        if collected is None:
            collected = collect_rows(logits, used, index)
        if logits.query_offset is None:
            for name in POSITION_STATISTICS:
                collected.counted[ROW_STATISTICS.index(name)] = False
        if not wanted.linear_share:
            collected.counted[ROW_STATISTICS.index("linear_share")] = False
        if logits.relative:
            collected.maximum.fill_(-math.inf)
        if not isinstance(logits, ProductLogits):
            return _pool(collected, wanted, selection.valid, used)
        return _pool(
            collected,
            wanted,
            selection.valid,
            used,
            query_norms(logits.query, index),
            key_norm_sums(logits.key, selection.seen, logits.shape[1]),
        )


def _wanted(only: Collection[str] | None) -> Wanted:
    """What of the statistics that take a sweep of their own is asked for."""
    is_several = isinstance(only, Collection) and not isinstance(only, str | bytes)
    names = STATISTICS if only is None else tuple(only) if is_several else (only,)
    unknown = [repr(name) for name in names if name not in STATISTICS]
    if unknown:
        raise KindError(
            f"expected only= to be a collection of names among {', '.join(STATISTICS)}, got {', '.join(unknown)}: "
            "choose among these"
        )
    return Wanted(*(name in names for name in Wanted._fields))


def _pool(
    rows: Collected,
    wanted: Wanted,
    valid: Tensor,
    used: Tensor,
    query_norm: Tensor | None = None,
    key_norm: tuple[Tensor, Tensor] | None = None,
) -> AttentionSums:
    """Sums over the rows, each weighted by population / sampled rows of its sequence.

    ``valid``: rows that count, ``(batch, n)``; ``used``: the same of the selected rows. ``query_norm``, ``(batch,
    heads, rows)``, and ``key_norm``, sum and number ``(batch, heads)``, are None without queries and keys.
    """
    values, counted, maximum, received, received_sq, seen = rows
    dtype, device = values.dtype, values.device
    # Rows that see a key count.
    norm = torch.zeros_like(values[0]) if query_norm is None else query_norm.to(dtype)
    values = torch.cat([values, norm[None]])
    counted = torch.cat([counted, counted[:1] & (query_norm is not None)])
    population = valid.sum(1).to(dtype)
    sampled = used.sum(1).to(dtype)
    scale = (population / sampled.clamp_min(1))[:, None]
    values = torch.where(counted, values, torch.zeros((), dtype=dtype, device=device))
    here = counted.to(dtype)
    row_total, row_weight = values.sum(-1), here.sum(-1)
    centre = row_total / row_weight.clamp_min(1)
    squares = (here * (values - centre[..., None]).square()).sum(-1)
    # Variance of an estimated total: N² (1 − R/N) s² / R. One sampled row has no variance.
    spread = squares / (sampled - 1)[:, None]
    finite_population = population.square() * (1 - sampled / population.clamp_min(1)) / sampled.clamp_min(1)
    variance = torch.where((sampled < population)[:, None], finite_population[:, None] * spread, 0.0)

    rate = rate_variance = has_keys = torch.zeros_like(row_total[0])
    has_rows = (sampled > 0)[:, None].expand_as(rate).to(dtype)
    if wanted.sink_rate:
        rate, rate_variance = _sink_rate(received, received_sq, seen, (sampled < population)[:, None])
        has_keys = has_rows
    # All keys are used, so that their mean has no sampling variance.
    key_total, key_number = (torch.zeros_like(rate),) * 2 if key_norm is None else key_norm
    return AttentionSums(
        total=torch.stack([*(row_total * scale), rate * has_keys, key_total.to(dtype) * has_rows]),
        weight=torch.stack([*(row_weight * scale), has_keys, key_number.to(dtype) * has_rows]),
        variance=torch.stack([*variance, rate_variance * has_keys, torch.zeros_like(rate)]),
        maximum=maximum,
    )


def _sink_rate(
    received: Tensor, received_sq: Tensor, seen: Tensor, is_sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """Share of keys that receive more than the threshold on average, and its approximate variance.

    With sampled rows each key's mean is uncertain; taking the keys as independent, the count of those above
    the threshold has variance Σ π (1 − π) with π the normal probability of being above it. Derived.
    """
    eligible = eligible_keys(seen)
    mean = received / seen.clamp_min(1)
    number = eligible.sum(-1).clamp_min(1)
    rate = ((mean > SINK_ATTENTION) & eligible).sum(-1) / number
    variance = (received_sq / seen.clamp_min(1) - mean.square()).clamp_min(1e-12) / seen.clamp_min(2)
    above = torch.special.ndtr((mean - SINK_ATTENTION) / variance.sqrt())
    doubt = (above * (1 - above) * eligible).sum(-1) / number.square()
    return rate.to(mean.dtype), torch.where(is_sampled, doubt, torch.zeros_like(doubt)).to(mean.dtype)


class MeanSums(NamedTuple):
    """Totals and what they are divided by: added over sequences, calls and ranks, they give pooled means.

    Attributes:
        total: shape ``(statistics, batch, heads)``.
        weight: same shape; 0 where nothing was counted.
    """

    total: Tensor
    weight: Tensor

    def means(self, *, per_sequence: bool) -> Tensor:
        """Shape ``(statistics, batch, heads)``, or ``(statistics, heads)`` over the sequences; NaN of nothing."""
        if per_sequence:
            return self.total / self.weight
        return self.total.sum(1) / self.weight.sum(1)


@torch.no_grad()
def attention_on_keys(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    marked: Tensor | None = None,
    *,
    rows: int | None = None,
    per_sequence: bool = False,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> dict[str, Tensor]:
    r"""Attention that goes to marked keys, mean over query rows; never a whole n × n map.

    With marks on tokens known to be irrelevant it is the irrelevant mass after arXiv 2007.04862 [S; form R]: a
    head that ignores noise has a mass far below that of uniform attention, which is given beside it. Rows of
    marked tokens count like all others unless ``query_mask`` leaves them out.

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`AttentionLogits` and ``marked=``.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        marked: the keys in question, boolean, ``(batch, m)`` or ``(m,)``.
        rows: how many query rows to sample in each sequence; None for all.
        per_sequence: return ``(batch, heads)`` instead of ``(heads,)``.
        generator: where sampled rows are drawn from; None is torch's global generator.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`.

    Returns:
        ``mass``, the attention on marked keys, and ``uniform``, the share of the visible keys that are marked:
        what attention that is uniform over the keys would give. Both ``(heads,)`` or ``(batch, heads)``, float32
        or float64 as the logits; NaN where no row counts.

    Raises:
        ValueError: shapes that do not fit, a mask of another form, marks that are not boolean, or ``rows`` below
            1.

    Example:
        >>> query, key = torch.randn(2, 1, 4, 10, 8).unbind()
        >>> noise = torch.arange(10) >= 6
        >>> attention_on_keys(query, key, noise)["uniform"]
        tensor([0.4000, 0.4000, 0.4000, 0.4000])
    """
    boolean(per_sequence, "per_sequence")
    logits = as_logits(query, key, options)
    batch, heads, _, m = logits.shape
    marked = dense(marked, "marked")
    if marked.dtype != torch.bool or tuple(marked.shape) not in ((m,), (batch, m)):
        raise ValueError(
            f"expected boolean marks of shape (batch, m) = {(batch, m)} or (m,), got {marked.dtype} of shape "
            f"{tuple(marked.shape)}: mark every key with True or False"
        )
    with full_precision(logits.device):
        selection = Selection(logits, rows=rows, generator=generator)
        source = selection.logits.in_range()
        marks = marked.to(source.device, source.dtype).expand(batch, m)[:, None, :, None]
        total = torch.zeros(2, batch, heads, dtype=source.dtype, device=source.device)
        weight = torch.zeros_like(total)
        for part in source.chunks(selection.count):
            chunk = source.chunk(selection.part(part), source.buffer(part.stop - part.start))
            here = marks[:, :, : chunk.logits.shape[-1]]
            edge = here.shape[2] if chunk.shown is None else chunk.edge
            number = here[:, :, :edge].sum(2)
            if chunk.shown is not None:
                number = number + (chunk.shown @ here[:, :, edge:]).squeeze(-1)
            keep = (selection.used[:, None, part] & (chunk.keys > 0)).to(source.dtype)
            uniform = number / chunk.keys.clamp_min(1)
            mass = (probabilities(chunk) @ here).squeeze(-1)
            total[0] += (mass * keep).sum(-1)
            total[1] += (uniform * keep).sum(-1)
            weight += keep.sum(-1)
        scale = selection.weights().to(source.dtype)
        means = MeanSums(total * scale, weight * scale).means(per_sequence=per_sequence)
    means = means.to(logits.result_dtype)
    return {"mass": means[0], "uniform": means[1]}
