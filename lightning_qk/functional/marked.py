"""How much attention goes to keys that somebody marked: tokens known to be irrelevant, say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qk.functional._rows import Selection, probabilities
from lightning_qk.functional.checks import boolean, dense
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, as_logits
from lightning_qk.functional.precision import full_precision
from lightning_qk.functional.sums import MeanSums

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        query: after rotary encoding and norms, as the attention function gets it, shape
            ``(batch, heads, n, d_head)``; or an :class:`~lightning_qk.functional.AttentionLogits` by itself,
            with ``marked=``.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        marked: the keys in question, boolean, ``(batch, m)`` or ``(m,)``.
        rows: how many query rows to sample in each sequence; None for all.
        per_sequence: return ``(batch, heads)``, means over the rows of each sequence, instead of ``(heads,)``.
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
