"""Hold the entropy of attention in a band."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_qk.functional.entropy import attention_entropy
from lightning_qk.functional.logits import AttentionLogits, ProductLogits
from lightning_qk.interventions.auxiliary import Measure, Penalty

Per = Literal["head", "row"]


class Band(NamedTuple):
    """What a band finds in one call; scalars.

    Attributes:
        penalty: mean distance from the band, differentiable.
        entropy: mean normalized entropy.
        outside: share of heads (or rows) outside of the band.
    """

    penalty: Tensor
    entropy: Tensor
    outside: Tensor


def check_band(low: float, high: float, per: str) -> None:
    """Refuse a band that is none.

    Raises:
        ValueError: bounds that are not ordered in [0, 1], or something else than heads and rows.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"expected a band 0 <= low <= high <= 1 of normalized entropy, got {low} to {high}")
    if per not in get_args(Per):
        raise ValueError(f"expected per to be 'head' or 'row', got {per!r}")


def entropy_band(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    low: float = 0.0,
    high: float = 1.0,
    *,
    per: Per = "head",
    **options: Any,
) -> Band:
    """How far normalized entropy is outside of a band: ``max(0, low − H) + max(0, H − high)``, averaged.

    Streamed: see :func:`~lightning_qk.functional.attention_entropy`. After the idea of entropy regularization
    with a tolerance, arXiv 2501.03489; the hinge on a fixed band is our own form [R].

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`~lightning_qk.functional.AttentionLogits` by itself.
        key: ``(batch, kv_heads, m, d_head)``.
        low: lower bound, in [0, 1].
        high: upper bound, in [0, 1].
        per: ``"head"``: H is a head's mean over all rows of the batch; ``"row"``: every row by itself.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`.

    Returns:
        Scalars; zero and NaN where no row counts.

    Raises:
        ValueError: see :func:`check_band`.
    """
    check_band(low, high, per)
    reduction: Literal["batch", "none"] = "batch" if per == "head" else "none"
    entropy = attention_entropy(query, key, normalized=True, reduction=reduction, **options)
    # A head or row without a value is kept out of the graph, as a constant inside the band.
    is_there = ~entropy.detach().isnan()
    there = torch.where(is_there, entropy, low)
    distance = (low - there).clamp_min(0) + (there - high).clamp_min(0)
    count = is_there.sum()
    outside = ((distance > 0) & is_there).sum() / count
    return Band(distance.sum() / count.clamp_min(1), entropy.detach().nanmean(), outside)


def band_measure(low: float, high: float, per: Per = "head") -> Measure:
    """The penalty of :func:`entropy_band` for :class:`~lightning_qk.interventions.auxiliary.AttentionPenalty`."""
    check_band(low, high, per)

    def measure(name: str, logits: ProductLogits) -> Penalty:
        band = entropy_band(logits, low=low, high=high, per=per)
        return Penalty(band.penalty, {"penalty": band.penalty, **band._asdict()})

    return measure
