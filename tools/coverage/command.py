"""``python -m tools.coverage``: build every model type, compare what is read and captured, and write the table."""

import difflib
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning_qk._printable import printable
from lightning_qk.cli._arguments import OneLineParser
from lightning_qk.inspect.documents import BadInput
from tools.coverage.tables import Row, Totals, markdown, print_summary, row_of, versions
from tools.coverage.workers import Outcome, run_each


def run(args: Sequence[str], prog: str) -> int:
    """Run the command.

    Returns:
        The exit status: 0 where the bars are met or types were named, 1 where they are missed, 2 for a wrong line.
    """
    try:
        return _run(args, prog)
    except BadInput as error:
        print(printable(f"{prog}: error: {error}"), file=sys.stderr)
        return error.status


def _run(args: Sequence[str], prog: str) -> int:
    options = _parser(prog).parse(args)
    # After the help, which stays quick.
    from lightning_qk.inspect.export import check_targets, write_text

    if options.jobs < 1 or not 0 < options.timeout < float("inf") or not 256 <= options.memory < 2**40:
        raise BadInput(
            f"expected at least 1 job, a positive timeout and at least 256 MiB, got --jobs {options.jobs} "
            f"--timeout {options.timeout:g} --memory {options.memory}; correct them"
        )
    check_targets([options.output, options.json])
    # Before slow imports, so that a misspelling is reported at once.
    from tools.coverage.catalogue import model_types

    known = model_types()
    for name in options.types:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else "transformers' AutoConfig lists those it knows"
            raise BadInput(f"expected model types of the installed transformers, got {name!r}; {hint}")
    outcomes = _measure(options.types or known, options.jobs, options.timeout, options.memory)
    outcomes.sort(key=lambda outcome: outcome.name)
    rows = [row_of(outcome.name, outcome.value, outcome.problem) for outcome in outcomes]
    print_summary(rows, named=bool(options.types))
    if options.json is not None:
        write_text(options.json, _as_json(rows, outcomes))
    if options.output is not None:
        write_text(options.output, markdown(rows, versions()))
        print(printable(options.output))
    return 0 if options.types or Totals.of(rows).meets_bars() else 1


def _parser(prog: str) -> OneLineParser:
    parser = OneLineParser(
        prog=prog,
        description="Build every model type of the installed transformers at toy size, read its weights, "
        "capture its attention, compare both with its own forward, and print and write what was verified.",
        epilog=f"example: {prog} llama bert t5; exit status: 0 where types were named or the bars are met, "
        "else 1; 2 for a wrong line",
    )
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; default: all of them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown file to write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write, with every layer")
    parser.add_argument(
        "--jobs", type=int, metavar="N", default=1, help="types to check at a time (default: 1)"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="S", default=120.0, help="seconds for a type (default: 120)"
    )
    parser.add_argument(
        "--memory", type=int, metavar="MIB", default=6144, help="MiB of memory for a type (default: 6144)"
    )
    return parser


def _measure(types: Sequence[str], jobs: int, timeout: float, memory: int) -> list[Outcome]:
    """Check the types, each in its own process, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    preload()
    from tools.coverage.check import check_type

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes = []
    # Without a thread of its own: the processes are forks.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("model types", total=len(types))
        for outcome in run_each(check_type, types, jobs=jobs, timeout=timeout, memory=memory):
            outcomes.append(outcome)
            progress.update(task, advance=1, description=outcome.name, refresh=True)
    return outcomes


def preload() -> None:
    """Import what every type needs, once, before processes are forked."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from transformers import BertModel, CLIPModel, LlamaModel  # noqa: F401

    import tools.coverage.check  # noqa: F401


def _as_json(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> str:
    totals = Totals.of(rows)
    return json.dumps(
        {
            "versions": versions(),
            "totals": totals._asdict(),
            "types": {
                row.type: {
                    "group": row.group,
                    "why": row.why,
                    "seconds": round(outcome.seconds, 1),
                    "peak": round(outcome.peak),
                    "weights_verified": row.weights_verified,
                    "statistics_verified": row.statistics_verified,
                    **(outcome.value or {"problem": outcome.problem}),
                }
                for row, outcome in zip(rows, outcomes, strict=True)
            },
        },
        indent=1,
    )
