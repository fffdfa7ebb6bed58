"""Readings as tables for a terminal."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table
from torch import Tensor

from lightning_qk._printable import print_lines, printable
from lightning_qk.inspect.healthy import Reference
from lightning_qk.inspect.read import NOT_VERIFIED, Reading, record_of
from lightning_qk.record.verdicts import FLAGGED, HeadHealth, format_value, head_health, layer_health


class Column(NamedTuple):
    """One column of numbers.

    Attributes:
        title: its head, with a line break where it has two lines.
        statistic: what is shown.
        peak: of a layer's heads the largest is shown, not the mean.
        digits: after the point, of a number that is never large; None for three significant ones.
        rank: the columns of the largest rank go first where the console is narrow.
        legend: what its values mean, or their unit.
    """

    title: str
    statistic: str
    peak: bool = False
    digits: int | None = None
    rank: int = 0
    legend: str = ""


_WEIGHTS = (
    Column("eig mean", "logit_eig_mean"),
    Column("eig var", "logit_eig_var"),
    Column("symm.", "symmetry", digits=2, legend="symm.: 1 symmetric, -1 antisymmetric"),
    Column("sum's\nsymm.", "symmetry_summed", digits=2, legend="sum's: of a layer's heads summed"),
    Column("direct.", "directionality", digits=2, rank=3),
    Column("sum's\ndirect.", "directionality_summed", digits=2, rank=4),
    Column("positiv.", "positivity", digits=2, legend="positiv.: 1 where all eigenvalues are positive"),
    Column("ρ/circle", "circle_ratio", digits=2, rank=1, legend="ρ/circle: 1 is the size of random weights"),
    Column("stable\nrank", "stable_rank", digits=1, legend="rank: directions"),
    Column("effective\nrank", "effective_rank_energy", digits=1, rank=2),
    Column("particip.\nrank", "participation_rank", digits=1, rank=5),
    Column("max\nsing.", "singular_max", peak=True, rank=6),
)
_MAX_REASONS = 8
_ATTENTION = (
    Column("entropy", "entropy_normalized", digits=3, legend="entropy: 0 is one key, 1 all alike"),
    Column("predicted", "predicted/entropy_normalized", digits=3),
    Column("first key", "sink_first", digits=3, legend="first key: its share"),
    Column("predicted", "predicted/sink_first", digits=3, rank=2),
    Column("linear\nshare", "linear_share", digits=3, rank=4, legend="linear share: of pairs"),
    Column("predicted", "predicted/linear_share", digits=3, rank=5),
    Column("logit\nstd", "logit_std", digits=2, rank=3),
    Column("predicted", "predicted/logit_std", digits=2, rank=6),
    Column("max\n|logit|", "max_abs_logit", peak=True, legend="|logit|: nats"),
    Column("sink\nheads", "sink_heads", digits=2, rank=1),
)


def print_reading(reading: Reading, console: Console, *, per_head: bool = False) -> None:
    """Print one line a layer, or a head, and below it what else there is to say."""
    legend = _print_values(reading, _WEIGHTS, console, per_head, _title(reading))
    _print_legend(legend, console)
    print_lines(console, weights_sentences(reading))
    if reading.attention:
        record = record_of([reading])
        rows = head_health(record)
        found = {f"{row.label}/{row.head}": row.verdict for row in rows}
        found |= {row.label: row.verdict for row in layer_health(record)}
        legend = _print_values(reading, _ATTENTION, console, per_head, "Attention on text", verdicts=found)
        _print_legend(legend, console)
        print_lines(console, [*text_sentences(reading), *verdict_sentences(rows)])
    more = (
        "; lightning-qk verify compares them with a forward" if reading.verification == NOT_VERIFIED else ""
    )
    print_lines(console, [f"Spectra {reading.verification}{more}"])
    print_notes(reading.notes, console)


def weights_sentences(reading: Reading) -> list[str]:
    """What units the numbers of weights have, and what weights can say."""
    lines = [
        "Eigenvalues are those of W_QK times the softmax scale, in logits of tokens of variance 1. Norms in front "
        f"of layers: {reading.facts.get('Norms in front', 'unknown')}.",
    ]
    if not reading.attention:
        if any(row.verdict == "fresh" for row in layer_health(record_of([reading]))):
            lines.append("Its weights do not differ from random ones: a fresh model.")
        lines.append("Weights alone show no fault: --text measures attention and judges it.")
    return lines


def text_sentences(reading: Reading) -> list[str]:
    """What attention was measured on, what it was predicted from, and the share of sinks."""
    lines = [f"Measured on {reading.facts['Text']}."]
    if reading.predicted:
        lines.append(
            f"Predicted from the moments of {reading.facts['Moments']}, for tokens drawn independently."
        )
    if "sink_heads" in reading.layer_values:
        share = _weighted(reading, "sink_heads")
        lines.append(
            f"Sink₁, the share of heads whose first key takes over 0.3 (Gu et al.): {share:.2f}; sink_rate is of "
            "keys."
        )
    return lines


def verdict_sentences(rows: Sequence[HeadHealth]) -> list[str]:
    """How many heads are flagged and how many described, and why the worst are."""
    counts = Counter(row.verdict for row in rows)
    flagged = [row for row in rows if row.verdict in FLAGGED]
    described = ", ".join(f"{count} {name}" for name, count in counts.items() if name not in FLAGGED)
    lines = [f"Heads flagged: {len(flagged)} of {len(rows)}. Described: {described or 'none'}."]
    lines += [f"{row.label}, head {row.head}: {row.verdict}, {row.reason}" for row in flagged[:_MAX_REASONS]]
    if len(flagged) > _MAX_REASONS:
        lines.append(f"and {len(flagged) - _MAX_REASONS} heads more")
    return lines


def _weighted(reading: Reading, statistic: str) -> float:
    """Mean over all heads of a number a layer."""
    pairs = [
        (float(value), heads)
        for value, heads in zip(reading.layer_values[statistic], reading.heads, strict=True)
        if not math.isnan(float(value))
    ]
    return sum(value * heads for value, heads in pairs) / max(sum(heads for _, heads in pairs), 1)


def print_notes(notes: Iterable[str], console: Console) -> None:
    """Print what a reader has to know."""
    print_lines(console, (f"Note: {note}" for note in notes), soft_wrap=True)


def _print_values(
    reading: Reading,
    columns: Sequence[Column],
    console: Console,
    per_head: bool,
    title: str,
    *,
    verdicts: Mapping[str, str] | None = None,
) -> list[str]:
    places = _places(reading, per_head)
    last = None if verdicts is None else [verdicts.get(name, "-") for name, _ in places]
    values = [(column, [_value(reading, column, *at) for _, at in places]) for column in columns]
    return _print_table(title, [name for name, _ in places], values, console, _cell, verdicts=last)


def _places(reading: Reading, per_head: bool) -> list[tuple[str, tuple[int, int | None]]]:
    """Name of each line, and the layer and head that it is of."""
    if per_head:
        return [
            (f"{label}/{head}", (place, head))
            for place, label in enumerate(reading.labels)
            for head in range(reading.heads[place])
        ]
    return [(label, (place, None)) for place, label in enumerate(reading.labels)]


def _print_table(
    title: str,
    names: Sequence[str],
    columns: Sequence[tuple[Column, list[float]]],
    console: Console,
    cell: Callable[[float, int | None], str],
    *,
    verdicts: Sequence[str] | None = None,
    first: str = "layer",
) -> list[str]:
    """Print what is known and fits: columns of the largest rank are left out first, and no number is cut.

    Returns:
        The legends of the columns that are there.
    """
    shown = [
        (column, [cell(value, column.digits) for value in values])
        for column, values in columns
        if not all(map(math.isnan, values))
    ]

    def width() -> int:
        total = max(map(cell_len, (first, *names)), default=0)
        for column, cells in shown:
            total += 3 + max(map(cell_len, (*column.title.split("\n"), *cells)))
        if verdicts is not None:
            total += 3 + max(map(cell_len, ("verdict", *verdicts)), default=0)
        return total + 2

    while width() > console.width and any(column.rank for column, _ in shown):
        shown.remove(max(shown, key=lambda one: one[0].rank))
    table = Table(title=escape(title), title_justify="left", pad_edge=False)
    table.add_column(first, justify="left", overflow="fold")
    for column, _ in shown:
        table.add_column(column.title, justify="right", no_wrap=True)
    if verdicts is not None:
        table.add_column("verdict", justify="left", no_wrap=True)
    for index, name in enumerate(names):
        cells = [cells[index] for _, cells in shown]
        last = [] if verdicts is None else [_styled(verdicts[index])]
        table.add_row(escape(name), *cells, *last)
    console.print(table)
    return [column.legend for column, _ in shown if column.legend]


def _print_legend(legend: Sequence[str], console: Console) -> None:
    if legend:
        print_lines(console, ["; ".join(legend) + "."], style="dim")


def print_evolution(readings: Sequence[Reading], console: Console) -> None:
    """Print one line a checkpoint, means over all heads."""
    columns = (*_WEIGHTS, *_ATTENTION) if readings[-1].attention else _WEIGHTS
    _print_table(
        f"{len(readings)} checkpoints, means over all heads",
        ["-" if reading.step is None else str(reading.step) for reading in readings],
        [
            (column, [_reduced(_flat(reading, column.statistic), column.peak) for reading in readings])
            for column in columns
        ],
        console,
        _cell,
        first="step",
    )


def print_comparison(first: Reading, other: Reading, console: Console, *, per_head: bool = False) -> None:
    """Print what one model has more of than another, layer by layer."""
    columns = (*_WEIGHTS, *_ATTENTION) if first.attention and other.attention else _WEIGHTS
    places = _places(first, per_head)
    _print_table(
        f"{other.title} minus {first.title}",
        [name for name, _ in places],
        [
            (column, [_value(other, column, *at) - _value(first, column, *at) for _, at in places])
            for column in columns
        ],
        console,
        _signed,
    )
    print_notes(other.notes, console)


def print_against(reading: Reading, known: Reference, console: Console, *, per_head: bool = False) -> None:
    """Print where a model's layers, or heads, lie among those of a healthy one."""
    places = _places(reading, per_head)
    title = known.facts.get("Title", known.name)
    unit = "heads" if per_head else "layers"

    def share(column: Column, at: tuple[int, int | None]) -> float:
        value = _value(reading, column, *at)
        return known.share_below(column.statistic, value, of_layers=not per_head, peak=column.peak)

    heading = f"{reading.title} against {title}: share of its {unit} that lie lower"
    tables = [(heading, _WEIGHTS), ("The same of attention on text", _ATTENTION)]
    for text, columns in tables if reading.attention else tables[:1]:
        _print_table(
            text,
            [name for name, _ in places],
            [(column._replace(digits=2), [share(column, at) for _, at in places]) for column in columns],
            console,
            _cell,
        )
    lines = [f"0 and 1 are below and above all {unit} of {title}; that is another model, and no fault."]
    if reading.attention:
        lines.append(f"Its attention was measured on {known.facts.get('Text', 'another text')}.")
    print_lines(console, lines)


def _flat(reading: Reading, statistic: str) -> Tensor:
    if statistic.startswith("predicted/"):
        found = reading.predicted.get(statistic.removeprefix("predicted/"))
    else:
        tables = (reading.values, reading.attention, reading.layer_values)
        found = next((values[statistic] for values in tables if statistic in values), None)
    if found is not None:
        return found
    return torch.full((sum(reading.heads),), torch.nan)


def _value(reading: Reading, column: Column, layer: int, head: int | None) -> float:
    """Value of a head, or of a layer: the mean of its heads or the largest."""
    flat = _flat(reading, column.statistic)
    if column.statistic in reading.layer_values:
        return float(flat[layer]) if head is None else math.nan
    part = reading.split(flat)[layer]
    if head is not None:
        return float(part[head])
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


def _cell(value: float, digits: int | None) -> str:
    if digits is None or not math.isfinite(value) or abs(value) >= 1e4:
        return format_value(value)
    return f"{value:.{digits}f}"


def _signed(value: float, digits: int | None) -> str:
    text = _cell(value, digits)
    return f"+{text}" if value > 0 else text


def _styled(verdict: str) -> str:
    return f"[red]{escape(verdict)}[/red]" if verdict in FLAGGED else escape(verdict)
