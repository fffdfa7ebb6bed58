"""Signs of each kind of failure before the loss shows it; scores of 1 and more are alarms.

Sources, by the marks of the project's notes: attention logits that grow without bound (Wortsman et al.,
arXiv 2309.14322 [V]; Kimi K2 clips at 100, arXiv 2507.20534 [V]), entropy collapse (Zhai et al.,
arXiv 2303.06296 [V]), rank collapse (Wu et al., arXiv 2405.18781 [V]; Noci et al., arXiv 2206.03126). How they are
judged over time is our own form [R].
"""

import math
from abc import abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.guard.reading import Place, Reading, Window, median_and_error, sure

_TINY = 1e-12
_TREND = math.log(1.1)
"""Sure change over a window, in logarithms, that is a direction."""
_AWAY = math.log(1.15)
"""Change since the first readings that is one."""
_APART = math.log(2.0)
"""The same of how far tokens are apart."""


@dataclass(frozen=True)
class Sensitivity:
    """What counts as an alarm. The values were chosen on one half of ``benchmarks/collapse``.

    Attributes:
        window: readings that running statistics look back on.
        horizon: readings that trends are carried ahead.
        logit: absolute logit of a head that no training comes back from by itself.
        onset: share of ``logit`` from which on a head's growth is carried ahead; small logits grow fast in every
            run.
        entropy: normalized entropy, mean over the heads of a layer, below which attention has collapsed.
        cosine: mean cosine of tokens above which a layer's tokens are too much alike while the loss stands still.
        identical: one minus the mean cosine below which they are so in any case.
        stall: relative fall of the loss over a window below which the loss stands still.
        rise: relative rise of the loss over half a window that is an alarm.
        growth: factor by which the squared norms of a layer's ``W_QK`` may grow over a window while the loss
            stands still.
        lasting: readings in a row at which the loss has to stand still before that counts.
        patience: readings in a row that have to be alarming.
        update: how many times the update of a layer's ``W_QK`` between two readings, ``‖Δ₂‖_F``, may be what it
            was a window before; 0 looks at no updates. ``docs/attention-health.md`` has what that is worth.
    """

    window: int = 8
    horizon: float = 5.0
    logit: float = 110.0
    onset: float = 0.2
    entropy: float = 0.05
    cosine: float = 0.97
    identical: float = 5e-4
    stall: float = 0.02
    rise: float = 0.15
    growth: float = 30.0
    lasting: int = 4
    patience: int = 2
    update: float = 0.0

    def __post_init__(self) -> None:
        for name in ("horizon", "logit", "stall", "rise"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}: raise it")
        for name in ("onset", "entropy", "cosine", "identical"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected {name} between 0 and 1, got {getattr(self, name)}: correct it")
        if self.update != 0 and not self.update > 1:
            raise ValueError(
                f"expected update above 1, or 0 to look at no updates, got {self.update}: correct it"
            )
        if self.window < 4 or min(self.patience, self.lasting) < 1 or self.growth <= 1:
            raise ValueError(
                "expected a window of at least 4, patience and lasting of at least 1 and growth above 1, got "
                f"{self.window}, {self.patience}, {self.lasting} and {self.growth}: raise them"
            )

    @property
    def watches_updates(self) -> bool:
        """Whether updates of the weights are looked at."""
        return self.update > 0


class Finding(NamedTuple):
    """The score of one detector, and its reason.

    Attributes:
        score: 1 and more is an alarm.
        reason: why, with place and numbers, in words that a sentence can begin with.
        place: where; None for the whole run.
    """

    score: float
    reason: str
    place: Place | None = None


NOTHING = Finding(0.0, "")
_LEAST = 3
"""Readings before a level is judged: a single outlier is no evidence."""


class LossWatch:
    """Whether the training loss falls, stands still, rises, or is no number."""

    def __init__(self, sensitivity: Sensitivity) -> None:
        self.sensitivity = sensitivity
        self._blocks: deque[list[float]] = deque(maxlen=sensitivity.window)
        self._stalls: deque[float] = deque(maxlen=sensitivity.lasting)

    @property
    def stall(self) -> float:
        """1 where the loss has stood still for a while, 0 where it falls enough: least of the newest readings."""
        return min(self._stalls) if len(self._stalls) == self._stalls.maxlen else 0.0

    def observe(self, reading: Reading) -> Finding:
        """Add the losses of a reading."""
        losses = [float(loss) for loss in reading.losses]
        bad = next((loss for loss in losses if not math.isfinite(loss)), None)
        if bad is not None:
            return Finding(math.inf, f"the training loss is {bad}")
        if losses:
            self._blocks.append(losses)
        if len(self._blocks) < self.sensitivity.window:
            return NOTHING
        blocks = list(self._blocks)
        half = len(blocks) // 2
        before = [loss for block in blocks[:half] for loss in block]
        after = [loss for block in blocks[half:] for loss in block]
        (old, old_error), (new, new_error) = median_and_error(before), median_and_error(after)
        error = math.hypot(old_error, new_error)
        size = max(abs(old), _TINY)
        # Halves of a window lie half a window apart.
        fall = 2 * (old - new) / size
        self._stalls.append(min(1.0, max(0.0, 1 - fall / self.sensitivity.stall)))
        risen = (new - old - 2 * error) / size
        if risen <= 0:
            return NOTHING
        return Finding(
            risen / self.sensitivity.rise,
            f"the training loss has risen from {old:.4g} to {new:.4g} (medians of {len(before)} and "
            f"{len(after)} steps)",
        )

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._stalls.clear()

    def state_dict(self) -> dict[str, Any]:
        """The losses of the window."""
        return {"blocks": list(self._blocks), "stalls": list(self._stalls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore those of a checkpoint."""
        self._blocks = deque(state["blocks"], maxlen=self.sensitivity.window)
        self._stalls = deque(state.get("stalls", ()), maxlen=self.sensitivity.lasting)


class Detector:
    """Base of those that look at one statistic: a window of it, and its trend."""

    name: str
    """What its score is logged as."""
    statistic: str

    def __init__(self, sensitivity: Sensitivity) -> None:
        self.sensitivity = sensitivity
        self.window = Window(sensitivity.window)
        # Median of each place's first readings: what is far from it has changed.
        self._first: list[Tensor] = []

    def observe(self, reading: Reading, stall: float) -> Finding:
        """Add a reading.

        Args:
            reading: of this step.
            stall: 1 where the loss has stood still for a while, 0 where it falls.
        """
        values = reading.values.get(self.statistic)
        if values is None or not values.numel():
            return NOTHING
        row = self.transformed(values.double(), reading).reshape(-1)
        self.window.append(row)
        self._remember(row)
        return self.judge(reading, values, stall)

    def _remember(self, row: Tensor) -> None:
        if self._first and self._first[0].shape != row.shape:
            self._first.clear()
        if len(self._first) < _LEAST:
            self._first.append(row)
        else:
            # A place that had no reading until now.
            late = torch.stack(self._first).isnan().all(0)
            self._first = [torch.where(late, row, first) for first in self._first]

    def start(self) -> Tensor:
        """Median of the first readings of each place."""
        return torch.stack(self._first).nanmedian(0).values

    def clear(self) -> None:
        """Forget everything."""
        self.window.clear()
        self._first.clear()

    def state_dict(self) -> dict[str, Any]:
        """The window and the first readings."""
        return {**self.window.state_dict(), "first": list(self._first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore those of a checkpoint."""
        self.window.load_state_dict(state)
        self._first = list(state.get("first", ()))

    def has_gone(self, sign: int) -> Tensor:
        """Whether a place's logarithm has surely risen (1) or fallen (−1), over the window or since the start.

        A place that has been where it is from the first reading on is so by design: nothing happens to it.
        """
        slope, error = self.window.trend()
        trend = sign * sure(slope, error) * (len(self.window) - 1)
        return (trend >= _TREND) | (sign * (self.level() - self.start()) >= _AWAY)

    def course(self, index: int, sign: int, digits: int) -> str:
        """The change of a place's logarithm in words: over the window, or since the start."""
        column = self.window.rows()[:, index]
        known = column[column.isfinite()].exp()
        first, now = float(known[0]), float(known[-1])
        if sign * (now - first) > 0:
            return f"has gone from {first:.{digits}g} to {now:.{digits}g} in {self.span}"
        start = float(self.start()[index].exp())
        return f"has gone from {start:.{digits}g} in the first readings to {now:.{digits}g}"

    def transformed(self, values: Tensor, reading: Reading) -> Tensor:
        """The numbers that the window keeps."""
        return values

    @abstractmethod
    def judge(self, reading: Reading, values: Tensor, stall: float) -> Finding:
        """The finding of this window."""

    def _newest(self, index: int) -> Tensor:
        column = self.window.rows()[:, index]
        return column[column.isfinite()][-1]

    def _lasting(self, scores: Tensor, stall: float) -> tuple[float, int]:
        """Score and place of a level that lasts while the loss stands still, once the window is full."""
        score, index = _largest(scores)
        return min(score, 4.0) * stall if len(self.window) == self.window.size else 0.0, index

    @property
    def span(self) -> str:
        """How far the window reaches back, in words."""
        count = len(self.window) - 1
        return f"{count} reading" if count == 1 else f"{count} readings"

    def level(self) -> Tensor:
        """Median of the newest three rows: one number that is far out is no alarm."""
        return self.window.rows()[-3:].nanmedian(0).values


def logits_ahead(window: Window, sensitivity: Sensitivity) -> Tensor:
    """The largest logits that a window's trend leads to, over what is an alarm, one number a place.

    Args:
        window: logarithms of the largest logits.
        sensitivity: from where on growth is carried ahead, how far, and what is an alarm.
    """
    slope, error = window.trend()
    level, limit = window.rows()[-3:].nanmedian(0).values, sensitivity.logit
    growing = torch.where(level >= math.log(sensitivity.onset * limit), sure(slope, error).clamp_min(0), 0.0)
    return (level + sensitivity.horizon * growing).exp() / limit


class LogitGrowth(Detector):
    """Logits that grow beyond a size from which training recovers."""

    name = "logits"
    statistic = "attn/max_abs_logit"

    def transformed(self, values: Tensor, reading: Reading) -> Tensor:
        """Logarithms."""
        return values.clamp_min(_TINY).log()

    def judge(self, reading: Reading, values: Tensor, stall: float) -> Finding:
        """The finding of the newest numbers and their trend."""
        # NaN alone is a head without measured rows.
        if bool(values.isinf().any()):
            index = int(values.isinf().nonzero()[0])
            where = reading.place(self.statistic, index)
            return Finding(math.inf, f"the logits of {where} are not finite", where)
        if len(self.window) < _LEAST:
            return NOTHING
        ahead = logits_ahead(self.window, self.sensitivity)
        score, index = _largest(torch.where(self.has_gone(1), ahead, 0.0))
        place = "the largest logit of {}"
        still, at = self._lasting(ahead, stall)
        if score >= still:
            where = reading.place(self.statistic, index)
            course = f"{place.format(where)} {self.course(index, 1, 4)}" if score > 0 else ""
            return Finding(score, course, where)
        where = reading.place(self.statistic, at)
        stays = f"stays at {self._newest(at).exp():.4g} while the loss stands still"
        return Finding(still, f"{place.format(where)} {stays}", where)


class _OfLayers(Detector):
    """Base of those that look at means over the heads of each layer, in logarithms."""

    def transformed(self, values: Tensor, reading: Reading) -> Tensor:
        """Logarithms of the means."""
        return layer_means(values, reading, self.statistic)[0].clamp_min(_TINY).log()


class EntropyCollapse(_OfLayers):
    """Layers whose attention goes to single keys."""

    name = "entropy"
    statistic = "attn/entropy_normalized"

    def judge(self, reading: Reading, values: Tensor, stall: float) -> Finding:
        """The finding of the newest numbers and their trend."""
        if len(self.window) < _LEAST:
            return NOTHING
        slope, error = self.window.trend()
        falling = sure(slope, error).clamp_max(0)
        ahead = self.sensitivity.entropy / (self.level() + self.sensitivity.horizon * falling).exp()
        _, layers, heads = layer_means(values, reading, self.statistic)
        score, index = _largest(torch.where(self.has_gone(-1), ahead, 0.0))
        still, at = self._lasting(ahead, stall)
        if score >= still:
            course = self.course(index, -1, 3) if score > 0 else ""
            return Finding(
                score,
                f"the normalized entropy of {layers[index]} {course}, least in head {heads[index]}",
                Place(layers[index]),
            )
        return Finding(
            still,
            f"the normalized entropy of {layers[at]} stays at {self._newest(at).exp():.3g} while the loss stands "
            f"still, least in head {heads[at]}",
            Place(layers[at]),
        )


class RankCollapse(Detector):
    """Tokens that become alike.

    Early in training tokens are alike while the loss falls, so that an alarm also needs a loss that stands still;
    unless tokens were apart at first and have become identical. Tokens that were identical from the start, as a
    decoder's queries are, need a loss that stands still too.
    """

    name = "rank"
    statistic = "hidden/cosine"

    def judge(self, reading: Reading, values: Tensor, stall: float) -> Finding:
        """The finding of the newest numbers and their trend."""
        if len(self.window) < _LEAST:
            return NOTHING
        place = "the tokens before {} have a mean cosine of {:.6g}"
        now = (1 - self.level()).clamp_min(_TINY)
        nearer = ((1 - self.start()).clamp_min(_TINY) / now).log() >= _APART
        identical, index = _largest(torch.where(nearer, self.sensitivity.identical / now, 0.0))
        near = (1 - self.sensitivity.cosine) / (1 - self.window.median()).clamp_min(_TINY)
        alike, at = self._lasting(near, stall)
        if identical >= alike:
            name = reading.place(self.statistic, index)
            start = float(self.start()[index])
            course = f"{place.format(name, self._newest(index))}, after {start:.4g} at first"
            return Finding(identical, course, name)
        name = reading.place(self.statistic, at)
        return Finding(alike, f"{place.format(name, self._newest(at))} while the loss stands still", name)


class SpectralGrowth(_OfLayers):
    """Query and key weights that grow while the loss stands still."""

    name = "spectrum"
    statistic = "qk/frobenius_sq"

    def judge(self, reading: Reading, values: Tensor, stall: float) -> Finding:
        """The finding of the newest numbers and their trend."""
        if len(self.window) < self.sensitivity.window:
            return NOTHING
        slope, error = self.window.trend()
        grown = sure(slope, error).clamp_min(0) * (len(self.window) - 1)
        score, index = _largest(grown / math.log(self.sensitivity.growth) * stall)
        newest, layers, _ = layer_means(values, reading, self.statistic)
        return Finding(
            score,
            f"the squared norm of W_QK in {layers[index]} has grown {float(grown[index].exp()):.3g}-fold to "
            f"{float(newest[index]):.3g} in {self.span} while the loss stands still",
            Place(layers[index]),
        )


class UpdateGrowth(_OfLayers):
    """Updates of query and key weights that become much larger than they were, whatever the loss does."""

    name = "updates"
    statistic = "qk/update_delta2_norm"

    def judge(self, reading: Reading, values: Tensor, stall: float) -> Finding:
        """The finding of the newest numbers against the oldest of the window."""
        if len(self.window) < self.sensitivity.window:
            return NOTHING
        grown = self.level() - self.window.rows()[:_LEAST].nanmedian(0).values
        score, index = _largest(grown / math.log(self.sensitivity.update))
        newest, layers, _ = layer_means(values, reading, self.statistic)
        return Finding(
            max(score, 0.0),
            f"the update of W_QK in {layers[index]} between two readings has grown "
            f"{float(grown[index].exp()):.3g}-fold to a norm of {float(newest[index]):.3g} in {self.span}",
            Place(layers[index]),
        )


DETECTORS: tuple[type[Detector], ...] = (LogitGrowth, EntropyCollapse, RankCollapse, SpectralGrowth)


def layer_means(values: Tensor, reading: Reading, statistic: str) -> tuple[Tensor, list[str], list[int]]:
    """Mean over the heads of each layer, the layers' names, and in each the head of the least value."""
    places = reading.places[statistic.split("/", 1)[0]]
    by_layer: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        by_layer.setdefault(place.layer, []).append(index)
    rows = [values[indices].double() for indices in by_layer.values()]
    means = torch.stack([row.nanmean() for row in rows])
    least = [int(row.nan_to_num(nan=math.inf).argmin()) for row in rows]
    return means, list(by_layer), least


def _largest(scores: Tensor) -> tuple[float, int]:
    """Largest score and its index; NaN is no alarm."""
    known = scores.nan_to_num(nan=0.0, posinf=1e6)
    index = int(known.argmax())
    return float(known[index]), index
