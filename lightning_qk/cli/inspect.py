"""``lightning-qk inspect``: what is in a checkpoint's query and key weights."""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qk._printable import one_line, printable
from lightning_qk.cli._arguments import OneLineParser, add_opening, flag
from lightning_qk.inspect.documents import BadInput

if TYPE_CHECKING:
    from lightning_qk.inspect.export import Condition
    from lightning_qk.inspect.healthy import Reference
    from lightning_qk.inspect.read import Reading
    from lightning_qk.inspect.sources import Checkpoint

_DESCRIPTION = """\
Read the query and key weights of one or more checkpoints, layer by layer, and
print the spectrum of each attention layer. No model is built and nothing is run
(but for --text), so that large checkpoints are read in little memory.

A checkpoint is one of:
  a folder that save_pretrained wrote, of one file or of shards
  the name of a model on the Hugging Face hub, with @REVISION or without
  a file of Lightning's (.ckpt), or another state_dict of torch's
  a folder with a PEFT adapter (LoRA), read with its base
  a folder of checkpoints, shown over their steps
"""
_EPILOG = """\
keys of --fail-on: qk/STATISTIC/mean, /min and /max over all heads, those of
  eigenvalues without the softmax scale; qk/layer_03/STATISTIC, the mean of a
  layer; qk/layer_03/head_05/STATISTIC; attn/... with --text. --json lists them.
  Of a folder of checkpoints the newest counts. A condition on a number that is
  not known, since weights are NaN, holds.

exit status: 0 fine; 1 a --fail-on condition holds; 2 wrong options or a
  checkpoint that cannot be read; 130 interrupted.

examples:
  lightning-qk inspect gpt2
  lightning-qk inspect runs/base runs/tuned --compare
  lightning-qk inspect runs/version_0/checkpoints --html evolution.html
  lightning-qk inspect last.ckpt --moments-only --fail-on 'qk/eig_var/max>3' --json report.json
  lightning-qk inspect runs/tuned --text stdlib --against smollm2
"""


def run(args: Sequence[str], prog: str) -> int:
    """Run the command.

    Returns:
        The exit status: 0, 1 where a condition of ``--fail-on`` holds, or 130 where it was interrupted.

    Raises:
        BadInput: wrong options, or a checkpoint or target that is not what was expected.
    """
    # Layers come and go in large blocks of memory. In huge pages, where Linux has them for the asking, a block
    # costs a fraction of the page faults; torch looks at this once, when it is imported.
    if "torch" not in sys.modules:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    options = _options(args, prog)
    try:
        return _run(options, prog)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; nothing is written", file=sys.stderr)
        return 130


def _options(args: Sequence[str], prog: str) -> argparse.Namespace:
    options = parser(prog).parse(args)
    series = len(options.checkpoints) == 1
    if options.html is not None and not series and not options.compare:
        raise BadInput(
            "expected one checkpoint, or one folder of them, with --html, got several: add --compare to see "
            "them side by side"
        )
    if [str(options.json), str(options.csv)].count("-") > 1:
        raise BadInput("expected standard output for one of --json and --csv, got it for both: name a file")
    if min(options.length, options.batches) < 1 or options.length < 2:
        raise BadInput(
            f"expected --length of at least 2 and --batches of at least 1, got {options.length} and "
            f"{options.batches}"
        )
    return options


def parser(prog: str) -> OneLineParser:
    """The options of the command."""
    own = OneLineParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    own.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder, file or name on the hub")
    shown = own.add_argument_group("what is shown")
    flag(shown, "--per-head", "one line a head instead of one a layer")
    flag(
        shown,
        "--compare",
        "what each further checkpoint has more of than the first, layer by layer; of one folder of "
        "checkpoints, the newest than the oldest",
    )
    shown.add_argument(
        "--against",
        metavar="NAME",
        help="where each layer, or head, lies among those of a healthy model: minilm (an encoder) or smollm2 (a "
        "language model); with --text stdlib of attention too",
    )
    flag(shown, "--moments-only", "leave out eigenvalues and singular values, which take the longest")
    flag(shown, "--no-fold-norm", "leave the norm that feeds a layer out of its weights")
    flag(shown, "--fold-norm", argparse.SUPPRESS)  # the default since 0.3; lines that ask for it still run
    flag(shown, "--summed", "directionality, and symmetry of each layer's heads summed, also of wide layers")
    shown.add_argument(
        "--support",
        choices=("model", "head"),
        default="model",
        help="average over all eigenvalues of W_QK, or over the d_head that can be non-zero (default: model)",
    )
    written = own.add_argument_group("what is written")
    written.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="all numbers, as JSON, with --per-head also the eigenvalues; - for standard output",
    )
    written.add_argument(
        "--csv", type=Path, metavar="FILE", help="one line a head, as CSV; - for standard output"
    )
    written.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="a report, one self-contained page; with --compare of all of them",
    )
    written.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with 1 where it holds, such as 'qk/eig_var/max>3'; >, >=, <, <=; may be given again",
    )
    text = own.add_argument_group("attention on text (builds the model, in float32, and runs it)")
    text.add_argument("--text", metavar="FILE", help="text to run on; 'stdlib' for that of Python's library")
    text.add_argument(
        "--tokenizer", metavar="NAME", help="folder, name on the hub or 'bytes'; default: its own"
    )
    text.add_argument(
        "--length", type=int, default=128, metavar="N", help="tokens in a sequence (default: 128)"
    )
    text.add_argument(
        "--batches", type=int, default=4, metavar="N", help="batches of 4 sequences (default: 4)"
    )
    opened = own.add_argument_group("how it is opened")
    add_opening(opened)
    flag(opened, "--series", "read the checkpoints in a folder that also holds a model itself")
    return own


def _run(options: argparse.Namespace, prog: str) -> int:
    # Before slow imports, so that a misspelling is reported at once.
    from lightning_qk.inspect.export import (
        as_csv,
        as_json,
        check_targets,
        difference,
        parse_condition,
        write_html,
        write_text,
    )
    from lightning_qk.inspect.healthy import reference

    conditions = [parse_condition(text) for text in options.fail_on]
    known = None if options.against is None else reference(options.against)
    check_targets([options.json, options.csv, options.html])
    with quiet():
        sources = _read_all(options)
        pairs = _pairs(sources) if options.compare else []
        broken = _broken(conditions, sources)
        if options.html is not None:
            write_html(options.html, sources)
    if options.json is not None:
        write_text(
            options.json,
            as_json(sources, [difference(*pair) for pair in pairs], eigenvalues=options.per_head),
        )
    if options.csv is not None:
        write_text(options.csv, as_csv(sources))
    if "-" not in (str(options.json), str(options.csv)):
        _print(sources, pairs, known, per_head=options.per_head)
    for line in broken:
        print(printable(f"{prog}: {line}"), file=sys.stderr)
    return 1 if broken else 0


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings of libraries about models that are trained or run."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _read_all(options: argparse.Namespace) -> "list[list[Reading]]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lightning_qk.inspect import Options, open_source

    how = Options(
        options.trust, options.revision, options.base, options.config, options.series, options.prefix
    )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        sources = []
        for target in options.checkpoints:
            with naming(target):
                with _task(progress, f"opening {target}"):
                    checkpoints = open_source(target, how)
                sources.append(
                    [_read(one, options, progress, newest=one is checkpoints[-1]) for one in checkpoints]
                )
    return sources


@contextmanager
def _task(progress: Any, text: str) -> "Iterator[Callable[[int, int], None]]":
    """A bar while the block runs, which is given how much of how much is done."""
    from lightning_qk.inspect.table import escape

    task = progress.add_task(escape(text), total=None)
    yield lambda count, total: progress.update(task, completed=count, total=total)
    progress.remove_task(task)


@contextmanager
def naming(target: str) -> Iterator[None]:
    """Turns unforeseen errors of a damaged or hostile checkpoint into one sentence that names it."""
    try:
        yield
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(
            f"expected to read {target} without an error of the system, got {one_line(error)}"
        ) from error
    except MemoryError as error:
        raise BadInput(
            f"expected a checkpoint that fits into memory, got {target}: free some, or pass another"
        ) from error
    except Exception as error:
        raise BadInput(
            f"expected a checkpoint that can be read, got {target} ({type(error).__name__}: "
            f"{one_line(error)}): save it again, or report this with what --traceback shows"
        ) from error


def _read(checkpoint: "Checkpoint", options: argparse.Namespace, progress: Any, *, newest: bool) -> "Reading":
    from lightning_qk.inspect.read import read_checkpoint

    with _task(progress, f"layers of {checkpoint.title}") as update:
        reading, model, weights = read_checkpoint(
            checkpoint,
            support=options.support,
            fold_norm=not options.no_fold_norm,
            eigenvalues=not options.moments_only,
            summed=options.summed,
            trust=options.trust,
            progress=update,
        )
    if options.text is not None and newest:
        from lightning_qk.inspect.text import measure

        with _task(progress, f"text through {checkpoint.title}") as update:
            measure(
                model,
                weights,
                checkpoint,
                reading,
                source=options.text,
                tokenizer=options.tokenizer,
                length=options.length,
                batches=options.batches,
                progress=update,
            )
    return reading


def _pairs(sources: "list[list[Reading]]") -> "list[tuple[Reading, Reading]]":
    """Pairs of readings to compare."""
    from lightning_qk.inspect.read import check_same_layers

    readings = sources[0] if len(sources) == 1 else [source[-1] for source in sources]
    if len(readings) < 2:
        raise BadInput("expected two checkpoints or more with --compare, got one: name another")
    first = readings[0]
    others = readings[-1:] if len(sources) == 1 else readings[1:]
    for other in others:
        check_same_layers(first, other)
    return [(first, other) for other in others]


def _broken(conditions: "list[Condition]", sources: "list[list[Reading]]") -> list[str]:
    """The conditions that hold, as sentences."""
    from lightning_qk.inspect.export import check_condition, logged_values
    from lightning_qk.record.statistics import describe
    from lightning_qk.record.verdicts import format_value

    lines: list[str] = []
    for readings in sources if conditions else []:
        values = logged_values(readings[-1])
        for condition in conditions:
            value = check_condition(condition, values)
            if value is not None:
                shown = "unknown" if value != value else format_value(value)
                # The table has logits where keys are as runs log them.
                group, *_, name = re.sub("/(mean|min|max)$", "", condition.key).split("/")
                unit = describe(name, group).unit
                shown += f" {unit}" if unit.startswith("unscaled") else ""
                lines.append(f"{condition.text} holds of {readings[-1].title}: {condition.key} is {shown}")
    return lines


def _print(
    sources: "list[list[Reading]]",
    pairs: "list[tuple[Reading, Reading]]",
    known: "Reference | None",
    *,
    per_head: bool,
) -> None:
    from rich.console import Console

    from lightning_qk.inspect.table import print_against, print_comparison, print_evolution, print_reading

    console = Console()
    for readings in sources if not pairs else [sources[0][:1]]:
        if len(readings) > 1:
            print_evolution(readings, console)
        print_reading(readings[-1], console, per_head=per_head)
    for first, other in pairs:
        print_comparison(first, other, console, per_head=per_head)
    if known is not None:
        for readings in sources:
            print_against(readings[-1], known, console, per_head=per_head)
