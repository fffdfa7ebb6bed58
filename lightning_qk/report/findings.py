"""The first screen of the report: the state of the run, what stands out and what to do."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lightning_qk.record.advice import ADVICE, ALARM_ADVICE, guard_alarms
from lightning_qk.record.history import STATE, RunRecord
from lightning_qk.record.verdicts import FLAGGED, VERDICTS, HeadHealth, extreme_heads

UNJUDGED = ("not judged", "no data")
_OPEN = 5
"""A group of faults with up to so many heads is shown open."""
_MAX_ROWS = 200
"""Of a group, so many rows are in its table."""


class Finding(NamedTuple):
    """Heads with one verdict.

    Attributes:
        verdict: one of :data:`~lightning_qk.record.verdicts.VERDICTS`.
        title: how many, and where.
        why: the reason of the first of them.
        advice: what to do.
        rows: the heads, the worst first.
        more: how many are left out of the rows.
        is_fault: whether the verdict is one.
        is_open: whether they are shown without a click.
    """

    verdict: str
    title: str
    why: str
    advice: str
    rows: list[HeadHealth]
    more: int
    is_fault: bool
    is_open: bool


def first_screen(record: RunRecord, heads: list[HeadHealth]) -> dict[str, Any]:
    """What the first screen says.

    Args:
        record: the run.
        heads: verdicts, the worst first.

    Returns:
        The template's names → values.
    """
    state = record.info.get(STATE, "")
    groups = _groups(heads)
    flagged = sum(len(one.rows) + one.more for one in groups if one.verdict in FLAGGED)
    alarms = guard_alarms(record)
    return {
        "state": state,
        "state_kind": _kind(state),
        "headline": _headline(heads, flagged, len(alarms)),
        "is_bad": bool(flagged),
        "alarms": alarms,
        "alarm_advice": ALARM_ADVICE,
        "groups": groups,
        "extremes": extreme_heads(record) if any(row.verdict not in UNJUDGED for row in heads) else [],
        "legend": [(name, count, VERDICTS[name]) for name, count in _counts(heads).items()],
        "loss": _main_curve(record.scalars),
    }


def _kind(state: str) -> str:
    return (
        {"running": "live", "finished": "good"}.get(state.split(":")[0].split(" ")[0], "bad") if state else ""
    )


def _main_curve(scalars: Mapping[str, tuple[list[int], list[float]]]) -> int | None:
    """Which curve of the run alarms are drawn on: the loss, else the guard's score; None without them."""
    names = [name for name, (steps, _) in scalars.items() if steps]
    return next((names.index(name) for name in ("train/loss", "guard/score") if name in names), None)


def _counts(heads: Iterable[HeadHealth]) -> dict[str, int]:
    counts = Counter(row.verdict for row in heads)
    return {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}


def _headline(heads: list[HeadHealth], flagged: int, alarms: int) -> str:
    judged = sum(row.verdict not in UNJUDGED for row in heads)
    if not heads:
        return "No head was recorded, so that there is nothing to judge."
    if not judged:
        return (
            f"No head of {len(heads)} is judged: attention was not measured, and weights alone show no fault."
        )
    alarmed = {0: "", 1: ", and the guard gave an alarm"}.get(alarms, f", and the guard gave {alarms} alarms")
    if flagged:
        return f"{flagged} of {judged} heads {'is' if flagged == 1 else 'are'} at fault now{alarmed}."
    if alarms:
        gave = "an alarm" if alarms == 1 else f"{alarms} alarms"
        return f"No head of {judged} is at fault now; the guard gave {gave}."
    return f"Nothing is at fault: no head of {judged} is flagged by the newest measurement."


def _groups(heads: list[HeadHealth]) -> list[Finding]:
    """One finding a verdict, in the order of the verdicts; heads that are ok are none."""
    layers: dict[str, int] = Counter(row.label for row in heads)
    found = []
    for verdict in VERDICTS:
        rows = [row for row in heads if row.verdict == verdict]
        if verdict == "ok" or not rows:
            continue
        is_fault = verdict in FLAGGED
        why = rows[0].reason
        if len(rows) > 1 and why:
            why = f"{rows[0].label}, head {rows[0].head}: {why}"
        found.append(
            Finding(
                verdict,
                _title(rows, layers),
                why,
                ADVICE[verdict],
                rows[:_MAX_ROWS],
                max(len(rows) - _MAX_ROWS, 0),
                is_fault,
                is_fault and len(rows) <= _OPEN,
            )
        )
    return found


def _title(rows: list[HeadHealth], layers: Mapping[str, int]) -> str:
    """Such as ``"36 heads in 12 layers"``, with the layers named where they are few."""
    own = Counter(row.label for row in rows)
    if len(rows) == 1:
        return f"head {rows[0].head} of {rows[0].label}"
    if len(rows) == sum(layers.values()):
        return f"all {len(rows)} heads"
    if len(own) <= 3:
        if len(own) == 1:
            label, count = next(iter(own.items()))
            return f"{'all ' if count == layers[label] else ''}{count} heads of {label}"
        # Each with its number: "all of a, b" would be read as all of both.
        parts = [
            f"{'all ' if count == layers[label] else ''}{count} of {label}" for label, count in own.items()
        ]
        return f"{len(rows)} heads: {', '.join(parts)}"
    return f"{len(rows)} heads in {len(own)} of {len(layers)} layers"
