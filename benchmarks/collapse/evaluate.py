"""Show recorded runs to the guard's detectors, and judge the warnings by what became of the runs."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from runs import Run
from truth import MARGIN, Reference, Truth, final

from lightning_qk.callbacks.guard._watch import ATTENTION, COSINE, SPECTRUM, UPDATES
from lightning_qk.guard.detector import CollapseDetector, Sensitivity, Verdict
from lightning_qk.guard.reading import Place, Reading


def readings(record: Mapping[str, Any]) -> Iterator[Reading]:
    """What the guard would have read of a run, at the cadence of the record."""
    attention, spectrum = record["attention"], record["spectrum"]
    places = {
        "attn": _places(attention),
        "qk": _places(spectrum),
        "hidden": [Place(layer) for layer in attention["layers"]],
    }
    columns = {f"attn/{name}": by_step(record, name)[1] for name in ATTENTION}
    columns |= {f"qk/{name}": by_step(record, name)[1] for name in (*SPECTRUM, *UPDATES)}
    columns[COSINE] = torch.tensor(record["cosine"]["values"])
    last = 0
    for index, step in enumerate(record["cosine"]["steps"]):
        values = {name: column[index] for name, column in columns.items()}
        yield Reading(step, record["loss"][last:step], values, places)
        last = step


def by_step(record: Mapping[str, Any], statistic: str) -> tuple[list[int], torch.Tensor, list[int]]:
    """Steps of the record's readings, from 1, a statistic's values at each, and heads of each layer."""
    group = next(record[name] for name in ("attention", "spectrum") if statistic in record[name]["values"])
    steps = record["cosine"]["steps"]
    # Monitors count steps from 0, and that of weights also remembers the start.
    at = {step + 1: values for step, values in zip(group["steps"], group["values"][statistic], strict=True)}
    nothing = [math.nan] * sum(group["heads"])
    return steps, torch.tensor([at.get(step, nothing) for step in steps]), group["heads"]


def _places(group: Mapping[str, Any]) -> list[Place]:
    pairs = zip(group["layers"], group["heads"], strict=True)
    return [Place(layer, head) for layer, heads in pairs for head in range(heads)]


def first_alarm(record: Mapping[str, Any], sensitivity: Sensitivity | None = None) -> Verdict | None:
    """The first alarm of a run."""
    detector = CollapseDetector(sensitivity)
    return next((v for reading in readings(record) if (v := detector.observe(reading)).fired), None)


def told(run: Run, truth: Truth, alarm: Verdict | None) -> dict[str, Any]:
    """One run of the table."""
    step = None if alarm is None else alarm.step
    early = truth.failure is not None and step is not None and step < truth.failure
    return {
        "name": run.name,
        "seed": run.seed,
        "reports": run.reports,
        "outcome": truth.outcome,
        "final": truth.final,
        "failure": truth.failure,
        "warned": step,
        "early": early,
        "lead": (truth.failure - step) / truth.failure if early else None,
        "reason": "" if alarm is None else alarm.reason,
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a half."""
    failing = [row for row in rows if row["failure"] is not None]
    healthy = [row for row in rows if row["failure"] is None]
    # A run that was not warned of in time has no lead.
    leads = [row["lead"] or 0.0 for row in failing]
    return {
        "failing": len(failing),
        "warned_before": sum(row["early"] for row in failing),
        "share_warned_before": sum(row["early"] for row in failing) / max(1, len(failing)),
        "median_lead": statistics.median(leads) if leads else None,
        "healthy": len(healthy),
        "false_alarms": sum(row["warned"] is not None for row in healthy),
    }


def rescued(losses: Sequence[float], healthy: Reference) -> bool:
    """Whether the final loss is within the margin of the healthy runs'."""
    return final(losses) <= MARGIN * healthy.final
