"""Where along the sequence signal passes: the measured linear share by relative position of the key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qk.functional._rows import Selection
from lightning_qk.functional.checks import integer
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, as_logits
from lightning_qk.functional.precision import full_precision
from lightning_qk.functional.sums import MeanSums

if TYPE_CHECKING:
    from typing_extensions import Unpack

PROFILE_BINS = 10
"""Into how many equal parts of [0, 1] relative positions fall where nothing else is said."""

# In a row with few keys the window is wide and a part holds hardly one: such rows say nothing about position.
MIN_KEYS = 16


def linear_share_profile(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    bins: int = PROFILE_BINS,
    rows: int | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Share of (query, key) pairs in the window of the piecewise linear softmax, by relative position of the key.

    The measured counterpart of :func:`~lightning_qk.functional.signal_propagation_probability` as a curve: of the
    ``n_i`` keys that row i sees, the j-th is at ``θ = (j − ½) / n_i``, and the pair counts where
    ``0 < 1/n_i + (ω_ij − mean_j ω_ij)/n_i < 1``. Its mean over θ is ``linear_share`` of
    :func:`~lightning_qk.functional.attention_statistics` over the rows that see 16 keys or more; rows that see
    fewer are left out. After Bao et al. 2024; this form is derived.

    Args:
        query: after rotary encoding and norms, as the attention function gets it, shape
            ``(batch, heads, n, d_head)``; or an :class:`~lightning_qk.functional.AttentionLogits` by itself.
        key: shape ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        bins: into how many equal parts θ falls.
        rows: how many query rows to sample in each sequence; None for all.
        generator: where sampled rows are drawn from; None is torch's global generator.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`. Learnt sinks are no
            keys and have no part in this.

    Returns:
        Shares in [0, 1], shape ``(heads, bins)``, the earliest keys first; NaN where no row counts.

    Raises:
        ValueError: shapes that do not fit, a mask of another form, or ``rows`` or ``bins`` below 1.

    Example:
        >>> query, key = 1e-3 * torch.randn(2, 1, 4, 32, 8)  # tiny logits: every pair is inside
        >>> linear_share_profile(query, key, bins=2)[0]
        tensor([1., 1.])
    """
    sums = profile_sums(query, key, bins=bins, rows=rows, generator=generator, **options)
    return sums.means(per_sequence=False).mT


@torch.no_grad()
def profile_sums(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    bins: int = PROFILE_BINS,
    rows: int | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[AttentionOptions],
) -> MeanSums:
    """The additive form of :func:`linear_share_profile`, ``(bins, batch, heads)``; same arguments."""
    logits = as_logits(query, key, options)
    bins = integer(bins, "bins")
    if bins < 1:
        raise ValueError(f"expected bins of at least 1, got {bins}: pass how many parts positions fall into")
    batch, heads = logits.shape[:2]
    with full_precision(logits.device):
        selection = Selection(logits, rows=rows, generator=generator)
        source = selection.logits.in_range()
        total = torch.zeros(batch, heads, bins, dtype=source.dtype, device=source.device)
        weight = torch.zeros_like(total)
        for part in source.chunks(selection.count):
            chunk = source.chunk(selection.part(part), source.buffer(part.stop - part.start))
            x, count = chunk.logits, part.stop - part.start
            visible = torch.ones(1, 1, count, chunk.edge if chunk.shown is not None else x.shape[-1]).to(x)
            if chunk.shown is not None:
                visible = torch.cat([visible.expand(*chunk.shown.shape[:3], -1), chunk.shown], -1)
            number = visible.sum(-1, keepdim=True)
            keep = selection.used[:, None, part, None] & (number >= MIN_KEYS)
            visible = visible * keep
            number = number.clamp_min(1)
            window = x - (x * visible).sum(-1, keepdim=True) / number
            inside = ((window > -1) & (window < number - 1)) * visible
            # The place of a key among those that its row sees.
            place = ((visible.cumsum(-1) - 0.5) / number * bins).long().clamp(0, bins - 1)
            shape = (batch, heads, *x.shape[2:])
            place, visible = place.expand(shape), visible.expand(shape)
            empty = torch.zeros(*shape[:3], bins, dtype=x.dtype, device=x.device)
            total += empty.scatter_add(-1, place, inside.expand(shape)).sum(2)
            weight += empty.scatter_add(-1, place, visible).sum(2)
        scale = selection.weights().to(source.dtype)[..., None]
        return MeanSums(*((part * scale).movedim(-1, 0).to(logits.result_dtype) for part in (total, weight)))
