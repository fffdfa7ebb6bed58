"""What is known of a layer for a verdict: newest numbers, growth, faults, and whether its weights are random."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_qk.guard.detectors import Sensitivity, logits_ahead
from lightning_qk.guard.reading import Window
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.newest import Newest, Numbers, Rows
from lightning_qk.record.states import NOT_FINITE

CHANCE = 5.0
"""Traces of W_QK of random weights are within so many of their standard deviations, pooled over a layer's heads.
Ours: below 4.1 at the start of the runs of ``benchmarks/collapse``, 5 to 100 at the end of most."""
ALIKE = 4.0
"""Norms of random heads spread by less than so many times what chance lets them. Ours: below 2.2 at the start of
the same runs, 4 to 22 at the end of most."""
MOVED = 0.2
"""Norms of heads that have changed by so much since the first kept step were learnt. Ours: below 0.19 in the first
12 steps of those runs that train well, above it at the end of all."""
SPREAD_AS_PREDICTED = 1.1
"""Logits of random heads spread by no more than so many times s ‖W_QK‖, which is what independent tokens of
variance 1 give; trained tokens spread them further. Ours: 0.44 to 0.97 at the start of the same runs, but for one,
and above it at their end."""


def growing_heads(history: History | None) -> dict[str, dict[int, tuple[float, float]]]:
    """Layer → head → its logits of some kept steps ago and now, where the guard would see a limit passed soon."""
    limits = Sensitivity()
    series = [] if history is None else history.values.get("max_abs_logit", [])[-limits.window :]
    if history is None or len(series) < limits.window:
        return {}
    window = Window(limits.window)
    for row in series:
        window.append(row.double().clamp_min(1e-12).log())
    ahead, before, now = logits_ahead(window, limits).numpy(), series[0].numpy(), series[-1].numpy()
    found: dict[str, dict[int, tuple[float, float]]] = {}
    end = 0
    for label, heads in zip(history.layers, history.heads, strict=True):
        begin, end = end, end + heads
        for place in np.flatnonzero(ahead[begin:end] >= 1) + begin:
            found.setdefault(label, {})[int(place) - begin] = float(before[place]), float(now[place])
    return found


class KnownLayer:
    """What is known of a layer, read once for itself and all of its heads.

    Args:
        label: the layer.
        record: the run.
        rows: its histories.
        growing: its heads in :func:`growing_heads`.
    """

    def __init__(
        self,
        label: str,
        record: RunRecord,
        rows: Mapping[str, Rows],
        growing: dict[int, tuple[float, float]],
    ) -> None:
        self.label = label
        self.spectrum = Newest(rows.get("spectrum"), label)
        self.attention = Newest(rows.get("attention"), label)
        self.heads = self.attention.heads or self.spectrum.heads
        values = {
            **Newest(rows.get("position"), label).values,
            **self.spectrum.values,
            **self.attention.values,
        }
        self.numbers = {name: value.tolist() for name, value in values.items()}
        self._shape = record.shapes.get(label)
        self.cosine, self.became_alike = _cosine(rows.get("hidden"), label)
        self.broken = self._broken()
        self.growing = growing
        self.is_random = self._is_random()

    def of(self, statistic: str, head: int) -> float:
        """Newest value of a head; NaN where unknown."""
        values = self.numbers.get(statistic, ())
        return values[head] if head < len(values) else math.nan

    def all(self, statistic: str) -> list[float]:
        """Known values of all heads."""
        return [value for value in self.numbers.get(statistic, ()) if not math.isnan(value)]

    def mean(self, statistic: str) -> float:
        """Mean over the heads."""
        known = self.all(statistic)
        return sum(known) / len(known) if known else math.nan

    def worst(self, statistic: str, *, least: bool = False) -> tuple[int, float]:
        """Index and value of the largest, or the least."""
        values = self.numbers[statistic]
        known = [head for head, value in enumerate(values) if not math.isnan(value)]
        head = (min if least else max)(known, key=values.__getitem__)
        return head, values[head]

    def _is_random(self) -> bool | None:
        """Whether the layer's weights do not differ from random ones that nothing was learnt into.

        Of weights drawn independently, ``ξ² d / F`` and ``η d / F`` have mean 1 and deviation √2, and norms F of
        heads a relative deviation of about ``2 / √(d d_head)`` (derived). Learning moves all three. Besides,
        logits spread no further than such weights let them, where that was measured. None where moments or
        widths are not known.
        """
        names = ("trace", "trace_sq", "frobenius_sq")
        if self._shape is None or any(name not in self.spectrum.values for name in names):
            return None
        xi, eta, norm = (self.spectrum.values[name] for name in names)
        width, count = self._shape.d_model, len(norm)
        first = self.spectrum.first_norm
        with np.errstate(all="ignore"):
            if first is not None and bool((np.abs(norm / first - 1) > MOVED).any()):
                return False
        if not bool((norm > 0).all()) or not all(bool(np.isfinite(one).all()) for one in (xi, eta, norm)):
            return None
        scores = [float((width * value / norm - 1).sum()) / math.sqrt(2 * count) for value in (xi**2, eta)]
        if max(map(abs, scores)) > CHANCE:
            return False
        spread = float(norm.std() / norm.mean()) if count > 1 else 0.0
        if spread > ALIKE * 2 / math.sqrt(width * self._shape.d_head):
            return False
        predicted = self._shape.scaling * np.sqrt(norm)
        measured = self.attention.values.get("logit_std")
        if measured is None or not math.isfinite(self._shape.scaling):
            return True
        ratio = (measured / predicted)[np.isfinite(measured)]
        return not len(ratio) or float(ratio.mean()) <= SPREAD_AS_PREDICTED

    def _broken(self) -> dict[int, tuple[str, str]]:
        """Head → what of it is not finite, and how.

        NaN alone means that a head has no value. States say which; where an older record has none, it is a
        fault where a statistic is unknown of some heads of a layer, or beside others that are known.
        """
        found: dict[int, tuple[str, str]] = {}

        def note(mask: np.ndarray[Any, np.dtype[np.bool_]], subject: str, how: str) -> None:
            for head in np.flatnonzero(mask).tolist():
                found.setdefault(head, (subject, how))

        both = ((self.spectrum, "weights"), (self.attention, "logits"))
        for newest, _ in both:
            for name, value in newest.values.items():
                note(np.isinf(value), name, "is infinite")
        for newest, subject in both:
            if newest.states is not None:
                note(newest.states == NOT_FINITE, subject, "hold NaN")
        norm, logits = self.spectrum.values.get("frobenius_sq"), self.attention.values.get("max_abs_logit")
        if norm is not None and not self.spectrum.explains_nan:
            note(np.isnan(norm), "weights", "hold NaN")
        if logits is not None and not self.attention.explains_nan:
            known = ~np.isnan(np.stack(list(self.attention.values.values()))).all(0)
            note(np.isnan(logits) & (known | (~np.isnan(logits)).any()), "logits", "hold NaN")
        return found


def _cosine(rows: Rows | None, label: str) -> tuple[float, bool]:
    """Least mean cosine of the tokens that leave a block, over as many newest readings as the guard looks at.

    Early in training tokens are alike for a while in healthy runs too. NaN where fewer were measured. Also whether
    tokens were less alike at the first reading than the guard allows.
    """
    if rows is None or label not in rows.history.layers or "cosine" not in rows.history.values:
        return math.nan, False
    history, window = rows.history, Sensitivity.window
    own, known = rows.place(label), []
    for point in range(len(history) - 1, -1, -1):
        value = _mean(rows.row("cosine", point)[own])
        known += [value] * math.isfinite(value)
        if len(known) == window:
            first = (_mean(rows.row("cosine", one)[own]) for one in range(len(history)))
            began = next(filter(math.isfinite, first))
            return min(known), began < Sensitivity.cosine
    return math.nan, False


def _mean(row: Numbers) -> float:
    return float(row.mean(dtype=np.float64)) if np.isfinite(row).all() else math.nan
