"""Outcomes of all types as a page of Markdown and as a table in the terminal."""

import platform
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

VERIFIED = "verified"
IDLE = ("not run", "no softmax")
WEIGHTS_BAR, STATISTICS_BAR = 0.97, 0.85
"""Least shares of the types with softmax attention whose weights and statistics have to be verified."""


class Row(NamedTuple):
    """One model type.

    Attributes:
        type: its name.
        group: "attention", "no softmax" (it ran and no softmax over q · k was seen) or "not built".
        sites: attention layers that were found or seen.
        ran: of these, the ones that computed a softmax in some toy forward.
        read: of the layers that ran, those whose weights were read.
        weights: of these, those that were verified.
        statistics: of the layers that ran, those whose statistics were verified.
        routes: how the weights were read (see ``HeadProjections.route``): route → number of layers.
        reasons: what is not verified, and why: (class, what, why) → number of layers.
        idle: classes of layers that did not run.
        why: of a type that was not built, or did not run.
    """

    type: str
    group: str
    sites: int = 0
    ran: int = 0
    read: int = 0
    weights: int = 0
    statistics: int = 0
    routes: Mapping[str, int] = {}
    reasons: Mapping[tuple[str, str, str], int] = {}
    idle: Sequence[str] = ()
    why: str = ""

    @property
    def weights_verified(self) -> bool:
        """Whether some layer ran and all that ran are verified."""
        return self.ran > 0 and self.weights == self.ran

    @property
    def statistics_verified(self) -> bool:
        """Whether some layer ran and all that ran are verified."""
        return self.ran > 0 and self.statistics == self.ran


def row_of(model_type: str, result: Mapping[str, Any] | None, problem: str | None) -> Row:
    """Sum up one type."""
    if result is None:
        return Row(model_type, "attention", why=f"the check did not end: {problem}")
    if result["not_built"] is not None:
        return Row(model_type, "not built", why=result["not_built"])
    sites = result["sites"]
    ran = [site for site in sites if site["weights"] not in IDLE]
    idle = [site["class"] for site in sites if site["weights"] == "not run"]
    if not ran and not idle:
        if result["not_run"] is not None:
            return Row(model_type, "not run", why=result["not_run"])
        return Row(model_type, "no softmax", sites=len(sites))
    reasons = Counter(
        (site["class"], what, site[what])
        for site in ran
        for what in ("weights", "statistics")
        if site[what] != VERIFIED
    )
    return Row(
        type=model_type,
        group="attention",
        sites=len(ran) + len(idle),
        ran=len(ran),
        read=sum(site["read"] for site in ran),
        weights=sum(site["weights"] == VERIFIED for site in ran),
        statistics=sum(site["statistics"] == VERIFIED for site in ran),
        routes=Counter(site["route"] for site in ran if site["read"]),
        reasons=reasons,
        idle=sorted(set(idle)),
        why="" if ran else f"no forward ran: {result['not_run'] or 'its attention layers were not reached'}",
    )


class Totals(NamedTuple):
    """Sums over all types.

    Attributes:
        types: all of them.
        attention: with softmax attention, as far as it could be run.
        weights, statistics: of these, the ones that are verified.
        layers, layers_ran, layers_weights, layers_statistics: the same, counted by layers.
        no_softmax, not_built, not_run: the others.
    """

    types: int
    attention: int
    weights: int
    statistics: int
    layers: int
    layers_ran: int
    layers_weights: int
    layers_statistics: int
    no_softmax: int
    not_built: int
    not_run: int

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Totals":
        """Add up."""
        rows = list(rows)
        attention = [row for row in rows if row.group == "attention"]
        groups = Counter(row.group for row in rows)
        return cls(
            types=len(rows),
            attention=len(attention),
            weights=sum(row.weights_verified for row in attention),
            statistics=sum(row.statistics_verified for row in attention),
            layers=sum(row.sites for row in attention),
            layers_ran=sum(row.ran for row in attention),
            layers_weights=sum(row.weights for row in attention),
            layers_statistics=sum(row.statistics for row in attention),
            no_softmax=groups["no softmax"],
            not_built=groups["not built"],
            not_run=groups["not run"],
        )

    def meets_bars(self) -> bool:
        """Whether enough types are verified."""
        return (
            self.weights >= WEIGHTS_BAR * self.attention
            and self.statistics >= STATISTICS_BAR * self.attention
        )


_METHOD = """\
Every model type of the installed transformers is built at toy size with random weights and run. What is
read from its weights is compared with the queries and keys that its attention received: rotary undone, and
up to one positive factor a token where a norm stands between. The captured statistics are compared with
those of dense softmax in double precision on the model's own masks, for each of eager and sdpa that it
supports. The tolerance is 1e-4. A type counts as verified when every attention layer that ran is. "Read by"
says how the query and key weights were found: in the table of known layouts, or inferred by running the layer
alone; "as a matrix" where a projection stores no weight to read and is run as a linear map.
"""


def markdown(rows: Sequence[Row], versions: str) -> str:
    """The page ``docs/coverage.md``."""
    totals = Totals.of(rows)
    attention = [row for row in rows if row.group == "attention"]
    whole = [row for row in attention if row.weights_verified and row.statistics_verified and not row.idle]
    partial = [row for row in attention if row not in whole]
    lines = [
        "# Coverage",
        "",
        "Made by `make coverage`; do not edit. " + versions,
        "",
        textwrap.fill(_METHOD, 110),
        "",
        "| | types | share | layers |",
        "|---|---|---|---|",
        f"| all | {totals.types} | | |",
        f"| with softmax attention | {totals.attention} | | {totals.layers} ({totals.layers_ran} ran) |",
        f"| weights verified | {totals.weights} | {_share(totals.weights, totals.attention)} | "
        f"{totals.layers_weights} |",
        f"| statistics verified | {totals.statistics} | {_share(totals.statistics, totals.attention)} | "
        f"{totals.layers_statistics} |",
        *(
            f"| weights read by: {route} | {sum(route in row.routes for row in attention)} | | {count} |"
            for route, count in sorted(sum((Counter(row.routes) for row in attention), Counter()).items())
        ),
        f"| without softmax attention | {totals.no_softmax} | | |",
        f"| not built | {totals.not_built} | | |",
        *([f"| built, not run, no attention found | {totals.not_run} | | |"] if totals.not_run else []),
        "",
        "## Not verified, or not wholly",
        "",
        "Layers are those that computed a softmax in the toy forward, of those found.",
        "",
        "| type | layers | weights read / verified | read by | statistics verified | why not |",
        "|---|---|---|---|---|---|",
        *(_markdown_row(row) for row in partial),
        "",
        "## Verified",
        "",
        "| type | layers | weights read / verified | read by | statistics verified |",
        "|---|---|---|---|---|",
        *(_markdown_row(row, reasons=False) for row in whole),
        "",
        "## Without softmax attention",
        "",
        "They ran, and no softmax over products of queries and keys was seen.",
        "",
        ", ".join(f"`{row.type}`" for row in rows if row.group == "no softmax") or "None.",
        "",
        "## Not built",
        "",
        *_by_reason([row for row in rows if row.group == "not built"]),
    ]
    not_run = [row for row in rows if row.group == "not run"]
    if not_run:
        lines += [
            "",
            "## Built, not run, and without a layer that looks like attention",
            "",
            *_by_reason(not_run),
        ]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """What the figures depend on, in a line without a date."""
    import torch
    import transformers

    return (
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}, CPU."
    )


def reasons_text(row: Row) -> str:
    """Reasons why a type is not (wholly) verified, in a line."""
    parts = [row.why] if row.why else []
    for (kind, what, why), count in row.reasons.items():
        times = f"{count} × " if count > 1 else ""
        parts.append(f"{what}: {times}{kind}: {why}")
    if row.idle:
        parts.append(f"not run in the toy forward: {', '.join(row.idle)}")
    return "; ".join(parts)


def print_summary(rows: Sequence[Row], *, named: bool) -> None:
    """Print every type that was named, else those that are not verified."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    shown = rows if named else [row for row in rows if row.group == "attention" and reasons_text(row)]
    table = Table("type", "layers", "weights", "statistics", "why not", header_style="bold")
    for row in shown:
        if row.group == "attention":
            cells = [f"{row.ran} of {row.sites}", _mark(row.weights, row.ran), _mark(row.statistics, row.ran)]
        else:
            cells = [str(row.sites or ""), "", ""]
        why = reasons_text(row) or ("" if row.group == "attention" else "it has no softmax attention")
        table.add_row(escape(row.type), *cells, escape(why))
    if shown:
        console.print(table)
    totals = Totals.of(rows)
    console.print(
        f"{totals.types} model types: {totals.attention} with softmax attention, {totals.no_softmax} without, "
        f"{totals.not_built} not built, {totals.not_run} not run.\n"
        f"Weights verified: {totals.weights} of {totals.attention} ({_share(totals.weights, totals.attention)}); "
        f"statistics verified: {totals.statistics} of {totals.attention} "
        f"({_share(totals.statistics, totals.attention)}).",
        highlight=False,
        soft_wrap=True,
    )


def _mark(part: int, whole: int) -> str:
    colour = "green" if part == whole and whole else "red"
    return f"[{colour}]{part} of {whole}[/]"


def _share(part: int, whole: int) -> str:
    # Never rounded up to a bar.
    return f"{int(1000 * part / whole) / 10:.1f} %" if whole else "–"


def _markdown_row(row: Row, *, reasons: bool = True) -> str:
    layers = str(row.ran) if row.ran == row.sites else f"{row.ran} of {row.sites}"
    cells = [f"`{row.type}`", layers, f"{row.read} / {row.weights}", _routes(row), str(row.statistics)]
    if reasons:
        cells.append(reasons_text(row).replace("|", "\\|").replace("\n", " "))
    return f"| {' | '.join(cells)} |"


def _routes(row: Row) -> str:
    if len(row.routes) == 1:
        return next(iter(row.routes))
    return "; ".join(f"{count} × {route}" for route, count in sorted(row.routes.items()))


def _by_reason(rows: Sequence[Row]) -> list[str]:
    grouped: dict[str, list[str]] = {}
    for row in rows:
        grouped.setdefault(row.why, []).append(row.type)
    if not grouped:
        return ["None."]
    return [f"- {', '.join(f'`{name}`' for name in names)}: {why}" for why, names in sorted(grouped.items())]
