"""The table of the layers' health in a terminal."""

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from lightning_qk._printable import listed, print_lines, printable
from lightning_qk.record.advice import ADVICE, guard_alarms
from lightning_qk.record.history import STATE, RunRecord
from lightning_qk.record.verdicts import (
    FLAGGED,
    UNJUDGED,
    VERDICTS,
    LayerHealth,
    format_value,
    head_health,
    layer_health,
)

if TYPE_CHECKING:
    from rich.console import Console

_MAX_ROWS, _MAX_REASONS, _MAX_HARMLESS, _MAX_ALARMS = 20, 12, 2, 4
_STYLES = {"ok": "green", "no data": "dim", "not judged": "dim", **dict.fromkeys(FLAGGED, "red")}


def print_health(record: RunRecord, console: "Console | None" = None) -> None:
    """Print how many layers have which verdict, a table of the worst, the reasons, and what to do.

    The table has at most 20 layers, in the order of the model: the worst, and among those that are equally well,
    some from the first to the last. Where the console is narrow, columns that matter less are left out, and titles
    take two lines; numbers and verdicts are never cut, and a name that is longer than what is left goes on in the
    next line.

    Args:
        record: the run.
        console: where to print. Default: standard output.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = layer_health(record)
    if not rows:
        return
    console = console or Console()
    print_lines(console, [f"Attention health{_at_steps(record)}: {_judged(rows)}"], style="bold")
    worst_first = _worst_first(rows, record)
    chosen = _worth_a_row(rows, worst_first)
    shown_rows = [row for row in rows if row.label in chosen]
    texts = {
        title: [
            printable(value) if isinstance(value := getattr(row, name), str) else format_value(value)
            for row in shown_rows
        ]
        for title, name in _COLUMNS.items()
    }
    table = Table(pad_edge=False)
    shown = _columns_that_fit(texts, console.width)
    for title, header in shown.items():
        left = title in ("layer", "verdict")
        table.add_column(
            header, justify="left" if left else "right", no_wrap=title != "layer", overflow="fold"
        )
    for index, row in enumerate(shown_rows):
        style = _STYLES.get(row.verdict, "default")
        cells = [escape(texts[title][index]) for title in shown]
        table.add_row(*cells[:-1], f"[{style}]{cells[-1]}[/{style}]")
    console.print(table)
    left_out = [row for row in rows if row.label not in chosen]
    if left_out:
        print_lines(console, [f"{len(left_out)} layers more, {_counted(left_out)}"])
    legend = [_LEGEND[title] for title in shown if title in _LEGEND]
    print_lines(console, _lines(legend, console.width), style="dim")
    lines = _reasons(worst_first)
    verdicts = dict.fromkeys(row.verdict for row in worst_first)
    lines += [f"What to do ({verdict}): {ADVICE[verdict]}" for verdict in verdicts if verdict in ADVICE]
    alarms = guard_alarms(record)
    lines += [
        f"{alarm.label or 'the run'}: alarm at step {alarm.step}, {alarm.sentence}"
        for alarm in alarms[:_MAX_ALARMS]
    ]
    if len(alarms) > _MAX_ALARMS:
        lines.append(f"and {len(alarms) - _MAX_ALARMS} alarms more")
    print_lines(console, lines)


# Title → what it shows; the layer is first and the verdict last.
_COLUMNS = {
    "layer": "label",
    "eig mean": "eig_mean",
    "sym var": "sym_var",
    "asym": "asymmetry",
    "entropy": "entropy_normalized",
    "sink": "sink_first",
    "max|logit|": "max_abs_logit",
    "linear share": "linear_share",
    "verdict": "verdict",
}
_LEGEND = {
    "eig mean": "eig mean: unscaled logits",
    "sym var": "sym var: unscaled logits²",
    "asym": "asym: 0 is symmetric, 1 antisymmetric",
    "entropy": "entropy: 0 is one key, 1 all alike",
    "sink": "sink: share of the first key",
    "max|logit|": "max|logit|: nats",
    "linear share": "linear share: of pairs",
}
"""Units, and what shares are of: two lines of 80 columns below the table."""
# What is left out where a console is narrow: first all of these, then one after the other of those.
_ONLY_WIDE = ("eig mean", "asym")
_NEXT_OUT = ("linear share", "sink", "sym var")


def _judged(rows: Sequence[LayerHealth]) -> str:
    """How many layers are at fault, and how many have which verdict."""
    at_fault = sum(row.verdict in FLAGGED for row in rows)
    if at_fault and len(rows) > 1:
        return f"{at_fault} of {len(rows)} layers at fault: {_counted(rows)}"
    kinds = {row.verdict for row in rows}
    if len(kinds) > 1 and not kinds & set(UNJUDGED):
        return f"none of {len(rows)} layers at fault: {_counted(rows)}"
    return f"{len(rows)} layer{'s' if len(rows) > 1 else ''}, {_counted(rows)}"


def _counted(rows: Sequence[LayerHealth]) -> str:
    """How many layers have which verdict, the worst first."""
    counts = Counter(row.verdict for row in rows)
    if len(counts) == 1:
        return f"{'all ' if len(rows) > 1 else ''}{rows[0].verdict}"
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def _reasons(rows: Sequence[LayerHealth]) -> list[str]:
    """Why layers have their verdicts: of faults a dozen, of what is none a few."""
    lines = []
    for verdict, group in groupby(rows, key=lambda row: row.verdict):
        labels: dict[str, list[str]] = {}
        for row in group:
            reason = row.reason or ("" if verdict == "ok" else VERDICTS[verdict])
            if reason:
                labels.setdefault(reason, []).append(row.label)
        told = list(labels.items())[: _MAX_REASONS if verdict in FLAGGED else _MAX_HARMLESS]
        lines += [f"{listed(sorted(own), 3)}: {verdict}, {reason}" for reason, own in told]
        more = sum(map(len, labels.values())) - sum(len(own) for _, own in told)
        if more:
            lines.append(f"and {more} more {verdict}")
    return lines


def _worst_first(rows: Sequence[LayerHealth], record: RunRecord) -> list[LayerHealth]:
    """Layers by verdict, and those at fault by their worst head."""
    heads: dict[str, int] = {}
    for place, head in enumerate(head_health(record)):
        heads.setdefault(head.label, place)
    verdicts = list(VERDICTS)

    def key(row: LayerHealth) -> tuple[int, int]:
        return verdicts.index(row.verdict), heads.get(row.label, 0) if row.verdict in FLAGGED else 0

    return sorted(rows, key=key)


def _worth_a_row(rows: Sequence[LayerHealth], worst_first: Sequence[LayerHealth]) -> set[str]:
    """Labels of the worst layers, and where not all others have room, of some over the whole depth."""
    labels = [row.label for row in worst_first if row.verdict in FLAGGED][:_MAX_ROWS]
    others = [row.label for row in rows if row.verdict not in FLAGGED]
    room = _MAX_ROWS - len(labels)
    if 1 < room < len(others):
        others = [others[index * (len(others) - 1) // (room - 1)] for index in range(room)]
    return {*labels, *others[:room]}


def _lines(parts: list[str], width: int) -> list[str]:
    """Parts one after the other, in lines that end between two of them where that can be."""
    whole = "; ".join(part.replace(" ", "\0") for part in parts)
    return [line.replace("\0", " ") for line in textwrap.wrap(whole, width, break_on_hyphens=False)]


def _columns_that_fit(texts: dict[str, list[str]], width: int) -> dict[str, str]:
    """Columns that fit into a width, each with its title, which may have two lines.

    Args:
        texts: title → text of the column.
        width: of the console, in cells.
    """
    from rich.cells import cell_len

    narrow = [title for title in texts if title not in _ONLY_WIDE]
    fewer = [[title for title in narrow if title not in _NEXT_OUT[:out]] for out in range(len(_NEXT_OUT) + 1)]
    one_line = [{title: title for title in titles} for titles in (list(texts), narrow)]
    two_lines = [
        {title: title.replace(" ", "\n").replace("max|", "max\n|") for title in titles} for titles in fewer
    ]
    for shown in (*one_line, *two_lines):
        cells = [(*header.split("\n"), *texts[title]) for title, header in shown.items()]
        # A column has a border and a space on both sides, but for the edges of the table.
        if sum(max(map(cell_len, column)) + 3 for column in cells) - 1 <= width:
            return shown
    return two_lines[-1]


def _at_steps(record: RunRecord) -> str:
    steps = [
        history.steps[-1] for history in (record.spectrum, record.attention) if history and history.steps
    ]
    if not steps:
        return ""
    if len(set(steps)) == 1:
        # A run that ended before its first measurement has that of the weights it began with.
        return f" at step {steps[0]}{_of_all(record, steps[0])}" if steps[0] >= 0 else " before training"
    return f" at step {steps[0]} (attention: {steps[1]})"


def _of_all(record: RunRecord, step: int) -> str:
    """How many steps there were, where the last ones were not measured."""
    done = re.search(r" at step ([\d,]+)", record.info.get(STATE, ""))
    return f" of {done[1]}" if done and int(done[1].replace(",", "")) > step + 1 else ""
