"""Colours of layer × head pictures: one scale for report and loggers, which no outlier takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.record.statistics import Statistic

_INNER = (0.1, 0.9)
"""Quantiles of the inner heads: limits are at most as far outside of them as they are apart."""
_DECADES = 100.0


class ColorScale(NamedTuple):
    """What a number is drawn as.

    Attributes:
        kind: ``"share"`` and ``"linear"``; ``"signed"``, whose middle is zero; ``"log"``, for positive numbers.
        low: the number with the first colour. What is below it has the same colour, and is marked.
        high: likewise the last.
    """

    kind: str
    low: float
    high: float


def color_scale(values: Tensor, style: Statistic) -> ColorScale:
    """The colours of a statistic.

    Shares lie between 0 and 1, signed statistics around zero, and positive ones that span more than two decades on
    a logarithmic scale. Limits are robust over the heads of each step, and the widest of all steps: with the
    10 % and 90 % quantiles a and b, they are no farther out than a - (b - a) and b + (b - a). Derived: of normal
    numbers one in 8000 lies outside, while a head that is off a hundredfold leaves the others their colours.

    Args:
        values: of all heads at some steps, ``(steps, heads)``; what is not finite is left out.
        style: the statistic.
    """
    values = values.double().reshape(-1, values.shape[-1])
    finite = values[values.isfinite()]
    if not finite.numel():
        return ColorScale("share" if style.share else "linear", 0.0, 1.0)
    least, most = float(finite.min()), float(finite.max())
    if style.share:
        return ColorScale("share", min(0.0, least), max(1.0, most))
    if style.signed and least < 0:
        low, high = _limits(values)
        reach = max(-low, high)
        return ColorScale("signed", -reach, reach)
    kind = "log" if least > 0 and most > _DECADES * least else "linear"
    low, high = _limits(values.log10() if kind == "log" else values)
    if kind == "log":
        low, high = 10**low, 10**high
    if low == high:
        wide = 0.5 * abs(low or 1.0)
        low, high = (low / 2, high * 2) if kind == "log" else (low - wide, high + wide)
    return ColorScale(kind, low, high)


def _limits(values: Tensor) -> tuple[float, float]:
    """The widest of the robust limits of all steps, of ``(steps, heads)``."""
    known = torch.where(values.isfinite(), values, torch.nan)
    known = known[known.isfinite().any(-1)]
    below, above = known.nanquantile(torch.tensor(_INNER, dtype=known.dtype), dim=-1)
    filled = known.isnan()
    least = torch.where(filled, torch.inf, known).amin(-1)
    most = torch.where(filled, -torch.inf, known).amax(-1)
    spread = above - below
    low, high = torch.maximum(least, below - spread).min(), torch.minimum(most, above + spread).max()
    if low == high:  # nearly all heads are alike at every step: the others are all there is to see
        low, high = least.min(), most.max()
    return float(low), float(high)
