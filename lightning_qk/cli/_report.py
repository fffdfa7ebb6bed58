"""``lightning-qk report``: a run's HTML report again, from the record that the monitors leave."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_qk._printable import one_line, printable
from lightning_qk.cli._arguments import Failure, OneLineParser
from lightning_qk.inspect.documents import BadInput


def parser(prog: str) -> OneLineParser:
    """The options of the command."""
    own = OneLineParser(
        prog=prog,
        description="Print the health of every attention layer of a run, and make its HTML report again, "
        "from the record that the monitors leave in the run's log folder.",
        epilog=f"example: {prog} runs/quickstart/csv/version_0/lightning_qk_record.safetensors",
    )
    own.add_argument(
        "record",
        metavar="RECORD",
        type=Path,
        help="lightning_qk_record.safetensors in the run's log folder, or the folder",
    )
    own.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="page to write; default: lightning_qk_report.html beside it",
    )
    own.add_argument(
        "--parquet",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=Path(),
        help="also write every head's history; without a FILE: lightning_qk_history.parquet beside it",
    )
    return own


def run(args: list[str], prog: str) -> int:
    """Run the command.

    Returns:
        The exit status: 0.

    Raises:
        BadInput: a wrong command line, or no record; status 1 where a file cannot be read or written.
    """
    options = parser(prog).parse(args)
    options.record = _in_folder(options.record)
    _check_record(options.record)
    page = options.output or options.record.with_name("lightning_qk_report.html")
    table = options.parquet
    if table is not None and not table.name:
        table = options.record.with_name("lightning_qk_history.parquet")
    from lightning_qk.inspect.export import check_targets

    check_targets([page, table])
    from lightning_qk.record.health import print_health
    from lightning_qk.record.history import RunRecord
    from lightning_qk.record.parquet import write_history
    from lightning_qk.report.report import write_report

    try:
        with _naming("record that may be read", options.record, "check its permissions"):
            record = RunRecord.load(options.record)
    except ValueError as error:
        raise BadInput(str(error)) from error
    try:
        with _naming("file that may be written", page, "name another with --output"):
            write_report(record, page)
        print_health(record)
        print(printable(page))
        if table is not None:
            with _naming("file that may be written", table, "name another with --parquet"):
                write_history(record, table)
            print(printable(table))
    except BadInput:
        raise
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        # A record whose parts are what a monitor writes and do not go together.
        raise BadInput(
            f"expected a record that a monitor wrote, got {options.record}, of which no page can be made "
            f"({type(error).__name__}: {one_line(error)}): pass another, or report this with what "
            "--traceback shows"
        ) from error
    return 0


def _in_folder(path: Path) -> Path:
    """The newest record of a folder, as ``watch`` takes it; what has none is refused later."""
    with suppress(OSError, ValueError):
        records = path.rglob("lightning_qk_record.safetensors") if path.is_dir() else ()
        return max(records, key=lambda one: one.stat().st_mtime_ns, default=path)
    return path


def _check_record(path: Path) -> None:
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # such as a name that is too long
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"expected a record that a monitor wrote, got {path} ({reason}); correct it"
        ) from error
    if not is_file:
        got = "a folder without one:" if is_folder else "no such file:"
        raise BadInput(
            f"expected a record that a monitor wrote, got {got} {path}; name a run's "
            "lightning_qk_record.safetensors, or its folder"
        )


@contextmanager
def _naming(what: str, path: Path, mend: str) -> Iterator[None]:
    """Turns an error of the system into one sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise Failure(f"expected a {what}, got {path} ({error.strerror or error}): {mend}") from error
