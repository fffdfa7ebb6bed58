"""A verdict on every head, the worst first: where to look."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qk.functional.regimes import SATURATED, UNIFORM, head_regimes
from lightning_qk.record.health import (
    COLLAPSED_ENTROPY,
    DIVERGED_LOGIT,
    QK_CLIP_LOGIT,
    SINK_ATTENTION,
    UNIFORM_ENTROPY,
    format_value,
    newest_of,
)
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.states import NO_VALUE, NOT_FINITE

# Ours: logits above a tenth of where Kimi K2 clips, half as large again as they were two thirds through the run.
GROWING_LOGIT = 10.0
GROWN_BY = 1.5

# Worst first.
HEAD_VERDICTS = ("non-finite", "saturated", "growing", "sharp", "uniform", "sink", "no data", "ok")


@dataclass(frozen=True)
class HeadHealth:
    """The newest state of one head.

    Attributes:
        label: its layer.
        head: its index in the layer.
        verdict: one of :data:`HEAD_VERDICTS`, the worst that holds.
        reason: why; empty for ``"ok"``.
        badness: how far beyond the verdict's threshold, to sort by; larger is worse.
    """

    label: str
    head: int
    verdict: str
    reason: str
    badness: float


def head_health(record: RunRecord) -> list[HeadHealth]:
    """Judge every head by its newest statistics, the worst first.

    Measured attention decides where there is any, and else what the weights predict. A verdict says where to look
    and proves nothing: one sharp head, or some sinks, are common in healthy models. Thresholds and their sources
    stand at the top of this module and of :mod:`lightning_qk.record.health`.

    Returns:
        One entry a head of every layer that was recorded.
    """
    labels: dict[str, int] = {}
    for history in (record.spectrum, record.attention):
        if history is not None and history.steps:
            labels.update(zip(history.layers, history.heads, strict=True))
    found = []
    for label, heads in labels.items():
        layer = _Layer(label, record)
        found += [_judge(layer, head) for head in range(heads)]
    return sorted(found, key=lambda row: (HEAD_VERDICTS.index(row.verdict), -row.badness))


# What to look at where nothing is wrong: statistic, whether the smallest counts, and how it is said.
_EXTREMES = (
    ("attention", "max_abs_logit", False, "the largest |logit| of all heads, {}"),
    ("attention", "entropy_normalized", True, "the sharpest of all heads: normalized entropy {}"),
    ("attention", "sink_first", False, "gives most to the first key of all heads, {}"),
    ("spectrum", "spectral_radius", False, "the largest |eigenvalue| of all heads, {}"),
    ("spectrum", "sym_var", False, "the largest spectral variance of all heads, {}"),
)


def extreme_heads(record: RunRecord) -> list[HeadHealth]:
    """Heads that are first in something, which is no fault: a place to start where no verdict stands out.

    Returns:
        One entry a head, with verdict ``"ok"`` and what it is first in.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for name, statistic, smallest, words in _EXTREMES:
        history: History | None = getattr(record, name)
        if history is None or not history.steps or statistic not in history.values:
            continue
        values = history.values[statistic][-1]
        if sum(history.heads) < 2 or not bool(values.isfinite().any()):
            continue
        worst = math.inf if smallest else -math.inf
        known = torch.where(values.isfinite(), values, torch.full_like(values, worst))
        place = int(known.argmin() if smallest else known.argmax())
        places = [
            (label, head)
            for label, heads in zip(history.layers, history.heads, strict=True)
            for head in range(heads)
        ]
        found.setdefault(places[place], []).append(words.format(format_value(float(values[place]))))
    return [HeadHealth(label, head, "ok", "; ".join(words), 0.0) for (label, head), words in found.items()]


def _series(history: History | None, label: str) -> dict[str, Tensor]:
    """Statistic → values over the steps, ``(points, heads)``, of one layer."""
    if history is None or not history.steps or label not in history.layers:
        return {}
    start = sum(history.heads[: history.layers.index(label)])
    stop = start + history.heads[history.layers.index(label)]
    return {name: torch.stack([v[start:stop] for v in column]) for name, column in history.values.items()}


class _Layer:
    """What is known of a layer, found out once for all of its heads."""

    def __init__(self, label: str, record: RunRecord) -> None:
        self.label = label
        self.newest = {name: newest_of(getattr(record, name), label) for name in ("spectrum", "attention")}
        self.series = {name: _series(getattr(record, name), label) for name in self.newest}
        self.missing = self.newest["attention"].missing or self.newest["spectrum"].missing


def _judge(layer: _Layer, head: int) -> HeadHealth:
    known: dict[str, Tensor] = {}
    now: dict[str, float] = {}
    broken = ""
    is_told: dict[str, bool] = {}
    for name, newest in layer.newest.items():
        values = {key: value for key, value in newest.values.items() if head < value.numel()}
        known |= {key: layer.series[name][key][:, head] for key in values}
        now |= {key: float(value[head]) for key, value in values.items()}
        states = newest.states
        is_told[name] = states is not None or newest.is_cross
        if states is not None and head < states.numel() and int(states[head]) == NOT_FINITE:
            broken = broken or f"its {'weights' if name == 'spectrum' else 'logits'} hold NaN"
    broken = _infinite(now) or broken or _non_finite(now, is_told)
    if broken:
        return HeadHealth(layer.label, head, "non-finite", broken, 0.0)
    if all(math.isnan(value) for value in now.values()):
        states = layer.newest["spectrum"].states
        is_healthy = states is not None and bool((states == NO_VALUE).all())
        if is_healthy and not layer.newest["attention"].missing:
            return HeadHealth(layer.label, head, "ok", "", 0.0)
        return HeadHealth(layer.label, head, "no data", layer.missing or "nothing is known of it", 0.0)
    is_measured = bool(layer.newest["attention"].values)
    return HeadHealth(layer.label, head, *_verdict(now, known, is_measured=is_measured))


def _verdict(
    now: dict[str, float], series: dict[str, Tensor], *, is_measured: bool
) -> tuple[str, str, float]:
    logit = now.get("max_abs_logit", math.nan)
    if logit > QK_CLIP_LOGIT:
        where = (
            "1e4, where every run of Wortsman et al. diverged"
            if logit > DIVERGED_LOGIT
            else "100, where Kimi K2 clips"
        )
        return "saturated", f"its largest |logit| is {format_value(logit)}, above {where}", logit
    if logit > GROWING_LOGIT and len(series["max_abs_logit"]) >= 6:
        column = series["max_abs_logit"]
        before = float(column[2 * len(column) // 3 - 1])
        if logit >= GROWN_BY * before:
            return (
                "growing",
                f"its largest |logit| grew from {format_value(before)} to {format_value(logit)} over the last "
                "third of the kept steps",
                logit / before,
            )
    entropy = now.get("entropy_normalized", math.nan)
    if entropy < COLLAPSED_ENTROPY:
        return "sharp", f"normalized entropy {entropy:.3f}: nearly one key a query", 1 - entropy
    if entropy > UNIFORM_ENTROPY:
        return "uniform", f"normalized entropy {entropy:.3f}: it looks everywhere alike", entropy
    if not is_measured:
        regime = _predicted(now)
        if regime == SATURATED:
            share = now["propagation"]
            return (
                "saturated",
                f"its weights predict that signal passes with probability {share:.3f}; attention was not measured",
                1 - share,
            )
        if regime == UNIFORM:
            return (
                "uniform",
                "its weights predict that early and late tokens pass alike; attention was not measured",
                -abs(now["localization"]),
            )
    sink = now.get("sink_first", math.nan)
    if sink > SINK_ATTENTION:
        return "sink", f"the first key receives {sink:.2f} of its attention", sink
    return "ok", "", 0.0


def _predicted(now: dict[str, float]) -> str:
    pair = (torch.tensor([now.get(name, math.nan)]) for name in ("propagation", "localization"))
    return head_regimes(*pair)[0]


def _infinite(now: dict[str, float]) -> str:
    return next((f"its {name} is infinite" for name, value in now.items() if math.isinf(value)), "")


def _non_finite(now: dict[str, float], is_told: dict[str, bool]) -> str:
    """By the numbers alone, where a record of an earlier version does not tell."""
    if not is_told["spectrum"] and math.isnan(now.get("frobenius_sq", 0.0)):
        return "its weights hold NaN"
    measured = any(
        not math.isnan(now.get(name, math.nan)) for name in ("entropy", "entropy_normalized", "sink_first")
    )
    if not is_told["attention"] and measured and math.isnan(now.get("max_abs_logit", 0.0)):
        return "its logits hold NaN"
    return ""
