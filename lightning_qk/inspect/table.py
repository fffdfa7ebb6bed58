"""Readings as tables for a terminal."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table
from torch import Tensor

from lightning_qk._printable import printable
from lightning_qk.inspect.read import Reading
from lightning_qk.record.verdicts import SATURATED, UNIFORM, format_value, head_regimes, layer_regime


class Column(NamedTuple):
    """One column of numbers.

    Attributes:
        title: its head.
        statistic: what is shown.
        peak: of a layer's heads the largest is shown, not the mean.
        is_wide: left out where the terminal is narrow.
    """

    title: str
    statistic: str
    peak: bool = False
    is_wide: bool = False


_SPECTRUM = (
    Column("eig mean", "eig_mean"),
    Column("eig var", "eig_var"),
    Column("sym var", "sym_var", is_wide=True),
    Column("asymmetry", "asymmetry"),
    Column("concentr.", "concentration", is_wide=True),
    Column("max |eig|", "spectral_radius", peak=True),
    Column("max sing.", "singular_max", peak=True),
)
_ATTENTION = (
    Column("entropy", "entropy_normalized"),
    Column("max|logit|", "max_abs_logit", peak=True),
    Column("sink", "sink_first", is_wide=True),
    Column("linear share", "linear_share", is_wide=True),
)
_WIDE = 118


def print_reading(reading: Reading, console: Console, *, per_head: bool = False) -> None:
    """Print one line a layer, or a head, and below it what else there is to say."""
    columns = _shown(reading, console)
    table = _table(
        _title(reading), ["layer", *(["head"] if per_head else ["heads"])], columns, "predicted regime"
    )
    regimes = regimes_of(reading)
    for place, label in enumerate(reading.labels):
        if not per_head:
            cells = [_cell(_of_layer(reading, column, place)) for column in columns]
            table.add_row(
                escape(label), str(reading.heads[place]), *cells, _styled(layer_regime(regimes[place]))
            )
            continue
        for head, regime in enumerate(regimes[place]):
            parts = [reading.split(_flat(reading, column.statistic))[place][head] for column in columns]
            table.add_row(escape(label), str(head), *(_cell(float(part)) for part in parts), _styled(regime))
    console.print(table)
    counts = Counter(regime for layer in regimes for regime in layer)
    console.print(f"Heads by predicted regime: {_counted(counts)}", markup=False, highlight=False)
    console.print(f"Spectra {printable(reading.verification)}", markup=False, highlight=False)
    print_notes(reading.notes, console)


def print_notes(notes: Iterable[str], console: Console) -> None:
    """Print what a reader has to know."""
    for note in notes:
        console.print(f"Note: {printable(note)}", markup=False, highlight=False, soft_wrap=True)


def print_evolution(readings: Sequence[Reading], console: Console) -> None:
    """Print one line a checkpoint, means over all heads."""
    columns = _shown(readings[-1], console)
    title = f"{len(readings)} checkpoints, means over all heads"
    table = _table(title, ["step"], columns, "predicted regime of heads")
    for reading in readings:
        counts = Counter(regime for layer in regimes_of(reading) for regime in layer)
        cells = [_cell(_reduced(_flat(reading, column.statistic), column.peak)) for column in columns]
        table.add_row("-" if reading.step is None else str(reading.step), *cells, _counted(counts))
    console.print(table)


def print_comparison(first: Reading, other: Reading, console: Console, *, per_head: bool = False) -> None:
    """Print what one model has more of than another, layer by layer."""
    columns = _shown(first, console)
    title = f"{other.title} minus {first.title}"
    table = _table(title, ["layer", *(["head"] if per_head else [])], columns, "predicted regime")
    before, after = regimes_of(first), regimes_of(other)
    for place, label in enumerate(first.labels):
        if not per_head:
            cells = [
                _signed(_of_layer(other, column, place) - _of_layer(first, column, place))
                for column in columns
            ]
            table.add_row(
                escape(label), *cells, _change(layer_regime(before[place]), layer_regime(after[place]))
            )
            continue
        for head in range(first.heads[place]):
            cells = []
            for column in columns:
                old, new = (
                    float(reading.split(_flat(reading, column.statistic))[place][head])
                    for reading in (first, other)
                )
                cells.append(_signed(new - old))
            table.add_row(escape(label), str(head), *cells, _change(before[place][head], after[place][head]))
    console.print(table)
    print_notes(other.notes, console)


def regimes_of(reading: Reading) -> list[list[str]]:
    """The predicted regime of every head, layer by layer."""
    parts = zip(
        reading.split(reading.values["propagation"]),
        reading.split(reading.values["localization"]),
        strict=True,
    )
    return [head_regimes(propagation, localization) for propagation, localization in parts]


def _shown(reading: Reading, console: Console) -> list[Column]:
    """Columns that have a value somewhere, fewer where the console is narrow."""
    return [
        column
        for column in (*_SPECTRUM, *_ATTENTION)
        if (column.statistic in reading.values or column.statistic in reading.attention)
        and (console.width >= _WIDE or not column.is_wide)
        and (column.statistic != "singular_max" or not all(reading.self_attention))
    ]


def _flat(reading: Reading, statistic: str) -> Tensor:
    found = reading.values.get(statistic, reading.attention.get(statistic))
    return torch.full((sum(reading.heads),), torch.nan) if found is None else found


def _of_layer(reading: Reading, column: Column, layer: int) -> float:
    part = reading.split(_flat(reading, column.statistic))[layer]
    if reading.has_value(column.statistic, layer) and not part.isfinite().all():
        return math.nan if part.isnan().any() else float(part[part.isinf()][0])
    return _reduced(part, column.peak)


def _reduced(flat: Tensor, peak: bool) -> float:
    known = flat[~flat.isnan()].double()
    if not known.numel():
        return math.nan
    return float(known.max() if peak else known.mean())


def escape(text: str) -> str:
    """Text out of a file as rich and the terminal show it letter by letter."""
    return escape_markup(printable(text))


def _title(reading: Reading) -> str:
    step = "" if reading.step is None else f" at step {reading.step}"
    return f"{reading.title}{step}: {reading.facts['Model']}"


def _table(title: str, first: Sequence[str], columns: Sequence[Column], last: str) -> Table:
    table = Table(title=escape(title), title_justify="left", pad_edge=False)
    for place, name in enumerate(first):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True, overflow="ellipsis")
    table.add_column(last, justify="left", overflow="fold")
    return table


def _cell(value: float) -> str:
    return format_value(value)


def _signed(value: float) -> str:
    text = format_value(value)
    return f"+{text}" if value > 0 else text


def _styled(regime: str) -> str:
    style = {SATURATED: "red", UNIFORM: "yellow"}.get(regime, "")
    return f"[{style}]{escape(regime)}[/{style}]" if style else escape(regime)


def _change(before: str, after: str) -> str:
    return _styled(after) if before == after else f"{escape(before)} → {_styled(after)}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
