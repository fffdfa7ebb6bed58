"""What the report's page gets of a record: the arrays that it draws, cut to what fits."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.propagation import signal_propagation_probability
from lightning_qk.functional.spectrum import circle_law_radius, circle_law_share
from lightning_qk.record.advice import guard_alarms
from lightning_qk.record.history import History, LayerShape, RunRecord
from lightning_qk.record.statistics import describe, drawn_statistics
from lightning_qk.record.verdicts import HeadHealth
from lightning_qk.report.colors import color_scale
from lightning_qk.report.packing import Pack

# The curve of predicted propagation has as many points as that of the measured one, between which it is smooth.
THETA = (torch.arange(20) + 0.5) / 20
# At so many distances from zero the share of a random head's eigenvalues is given.
LAW = torch.linspace(0, 1, 41)


class Cut(NamedTuple):
    """How much of a record is carried.

    Attributes:
        points: steps of each history, at most.
        secondary: whether the secondary statistics are in.
        snapshots: steps with eigenvalues, at most.
        layers: layers with eigenvalues, at most.
    """

    points: int
    secondary: bool
    snapshots: int
    layers: int


# From the most that is drawn to the least; the first that fits is taken.
CUTS = (
    Cut(60, True, 3, 200),
    Cut(60, False, 3, 200),
    Cut(60, False, 2, 64),
    Cut(40, False, 1, 48),
    Cut(24, False, 1, 24),
    Cut(12, False, 1, 12),
    Cut(4, False, 1, 6),
    Cut(2, False, 1, 1),
)


class Payload(NamedTuple):
    """What the page carries.

    Attributes:
        text: the data, as :class:`~lightning_qk.report.packing.Pack` writes them.
        notes: what was left out for the page's size, in sentences.
    """

    text: str
    notes: list[str]


def make_payload(record: RunRecord, heads: list[HeadHealth], budget: int) -> Payload:
    """The largest cut of a record that fits into a budget.

    Args:
        record: the run.
        heads: verdicts, from :func:`~lightning_qk.record.head_health.head_health`.
        budget: how many characters, at most. The smallest cut is taken whatever its length.
    """
    for cut in CUTS:
        text, left_out = _packed(record, heads, cut)
        if len(text) <= budget:
            break
    return Payload(text, left_out)


def _packed(record: RunRecord, heads: list[HeadHealth], cut: Cut) -> tuple[str, list[str]]:
    pack, left_out = Pack(), []
    content: dict[str, Any] = {
        "histories": {
            name: _history(history, name, cut, pack)
            for name, history in record.histories.items()
            if history.steps
        },
        "alarms": [[alarm.step, alarm.sentence] for alarm in guard_alarms(record)],
        "points": {str(step): name for step, name in record.points.items()},
        "verdicts": {
            f"{row.label}/{row.head}": [row.verdict, row.reason] for row in heads if row.verdict != "ok"
        },
        "eigenvalues": _eigenvalues(record, cut, pack),
        "propagation": _propagation(record, pack),
        "scalars": [
            {"name": name, "steps": steps, "values": pack.add(torch.tensor(values, dtype=torch.float64))}
            for name, (steps, values) in record.scalars.items()
            if steps
        ],
    }
    kept = [h for h in record.histories.values() if len(h) > cut.points]
    if kept:
        longest = max(len(history) for history in kept)
        left_out.append(f"Of {longest} kept steps {cut.points} are drawn, evenly chosen.")
    drawn = {label for one in content["eigenvalues"] for label in one["layers"]}
    if len(drawn) < len(record.eigenvalues):
        left_out.append(
            f"Eigenvalues of {len(drawn)} of {len(record.eigenvalues)} layers are drawn, evenly chosen."
        )
    return pack.text(content), left_out


def evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` indices, evenly spread, the last among them and the first where two are allowed."""
    if count <= limit:
        return list(range(count))
    if limit == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def shown_statistics(name: str, history: History, *, secondary: bool = True) -> list[str]:
    """Statistics of a history that the page draws, of those that have a finite value at any step."""
    has = [
        s for s in history.statistics if any(bool(v.isfinite().any()) for v in reversed(history.values[s]))
    ]
    return drawn_statistics(name, has, with_room=secondary)


def _history(history: History, name: str, cut: Cut, pack: Pack) -> dict[str, Any]:
    index = evenly(len(history), cut.points)
    statistics = []
    for statistic in shown_statistics(name, history, secondary=cut.secondary):
        style = describe(statistic, name)
        series = history.series(statistic)[index]
        scale = color_scale(series, style)
        statistics.append(
            {
                "name": statistic,
                "title": style.title,
                "unit": style.unit,
                "share": style.share,
                "signed": style.signed,
                "peak": style.peak,
                "scale": scale.kind,
                "limits": [scale.low, scale.high],
                "meaning": style.meaning,
                "worry": style.worry,
                # Heads before steps, so that a head's history is contiguous.
                "values": pack.add(series.T),
            }
        )
    return {
        "layers": list(history.layers),
        "heads": list(history.heads),
        "steps": [history.steps[i] for i in index],
        "statistics": statistics,
    }


def _shape(record: RunRecord, label: str) -> LayerShape | None:
    """Widths of a layer; where a record lacks them, found from the spectrum's moments if possible."""
    if label in record.shapes:
        return record.shapes[label]
    history = record.spectrum
    if history is None or label not in history.layers or not history.steps or label not in record.eigenvalues:
        return None
    if not {"trace", "eig_mean"} <= set(history.values):
        return None
    layer = history.layers.index(label)
    trace, mean = (history.split(history.values[name][-1].double())[layer] for name in ("trace", "eig_mean"))
    # The mean is trace / n. n is d_model, or the width of the head, which is the number of eigenvalues.
    ratio = float((trace / mean)[mean != 0].nanmedian())
    d_head = record.eigenvalues[label].shape[-1]
    if not math.isfinite(ratio) or round(ratio) <= d_head:
        return None
    return LayerShape(d_head, round(ratio), math.nan)


def _eigenvalues(record: RunRecord, cut: Cut, pack: Pack) -> list[dict[str, Any]]:
    """Upper halves of the spectra at a few steps, and the disc of a random head of the same shape and norm."""
    found: dict[int, dict[str, Tensor]] = {}
    kept = record.snapshots.get("eigenvalues")
    if kept is not None:
        found.update(zip(kept.steps, kept.values, strict=True))
    if record.eigenvalues:
        newest = record.eigenvalues_step
        found[max(found, default=0) if newest is None else newest] = record.eigenvalues
    steps = sorted(found)
    out = []
    for step in (steps[i] for i in evenly(len(steps), cut.snapshots)):
        layers = [label for label, values in found[step].items() if values.numel()]
        layers = [layers[i] for i in evenly(len(layers), cut.layers)]
        entry: dict[str, Any] = {"step": step, "layers": layers, "parts": []}
        for label in layers:
            values = found[step][label]
            shape = _shape(record, label)
            radius = _radius(record, label, step, shape, len(values))
            law = None if shape is None else [circle_law_share(LAW, shape.d_head, shape.d_model)]
            entry["parts"].append(
                {
                    **_upper_half(values, pack),
                    "radius": pack.add(radius),
                    "law": None if law is None else pack.add(law[0]),
                }
            )
        out.append(entry)
    return out


def _upper_half(values: Tensor, pack: Pack) -> dict[str, Any]:
    """Eigenvalues of real matrices come in conjugate pairs: one of each, and how many of each head."""
    finite = values.isfinite()
    counts_match = ((values.imag > 0) & finite).sum(-1) == ((values.imag < 0) & finite).sum(-1)
    mirrored = bool(counts_match.all())
    keep = finite & (values.imag >= 0) if mirrored else finite
    return {
        "counts": keep.sum(-1).tolist(),
        "mirrored": mirrored,
        "real": pack.add(values.real[keep]),
        "imag": pack.add(values.imag[keep]),
    }


def _radius(record: RunRecord, label: str, step: int, shape: LayerShape | None, heads: int) -> Tensor:
    """Radius of each head's disc; NaN where norm or width are not known."""
    unknown = torch.full((heads,), math.nan)
    history = record.spectrum
    if (
        shape is None
        or history is None
        or label not in history.layers
        or "frobenius_sq" not in history.values
    ):
        return unknown
    if not history.steps:
        return unknown
    index = min(range(len(history.steps)), key=lambda place: abs(history.steps[place] - step))  # the nearest
    norm = history.split(history.values["frobenius_sq"][index])[history.layers.index(label)]
    return circle_law_radius(norm, shape.d_model) if len(norm) == heads else unknown


def _propagation(record: RunRecord, pack: Pack) -> dict[str, Any]:
    """Curves over the key's relative position: predicted from moments, and measured."""
    measured = record.snapshots.get("linear_profile")
    out: dict[str, Any] = {"predicted": list(_predicted(record, pack)), "measured": []}
    out["theta"] = [round(value, 4) for value in THETA.tolist()]
    if measured is not None:
        for step, values in zip(measured.steps, measured.values, strict=True):
            parts = {label: value for label, value in values.items() if bool(value.isfinite().any())}
            if not parts:
                continue
            bins = next(iter(parts.values())).shape[-1]
            out["measured"].append(
                {
                    "step": step,
                    "theta": [round((i + 0.5) / bins, 4) for i in range(bins)],
                    "layers": {label: pack.add(value) for label, value in parts.items()},
                }
            )
    return out


def _predicted(record: RunRecord, pack: Pack) -> Iterator[dict[str, Any]]:
    history = record.spectrum
    moments = ("trace", "trace_sq", "frobenius_sq")
    if history is None or not history.steps or not set(moments) <= set(history.values):
        return
    layers = [
        label
        for label in history.layers
        if label in record.shapes and math.isfinite(record.shapes[label].scaling)
    ]
    if not layers:
        return
    for index in evenly(len(history), 3):
        curves = {}
        for label in layers:
            place, scale = history.layers.index(label), record.shapes[label].scaling
            trace, trace_sq, norm = (history.split(history.values[name][index])[place] for name in moments)
            if not bool(trace.isfinite().any()):
                continue
            curve = signal_propagation_probability(
                THETA[:, None], scale * trace, scale**2 * trace_sq, scale**2 * norm
            )
            curves[label] = pack.add(curve.mT)
        if curves:
            yield {"step": history.steps[index], "layers": curves}
