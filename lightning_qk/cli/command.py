"""The command ``lightning-qk``.

Lightning and transformers take seconds to import, so that they are imported by the commands that need them.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence

from lightning_qk._printable import printable
from lightning_qk.cli._arguments import OneLineParser, did_you_mean

_PROG = "lightning-qk"


def _fit_and_kin(args: list[str]) -> int:
    """Run one of the trainer's commands through LightningCLI."""
    if args[1:2] in (["-h"], ["--help"]):
        from lightning_qk.cli._configs import job_help

        print(job_help(args[0], _PROG))
        return 0
    from lightning_qk.cli._job_arguments import job_arguments

    args = ["--help" if arg == "--help-all" else arg for arg in job_arguments(args)]
    from argparse import ArgumentError

    from lightning_qk.cli._lightning_cli import run

    try:
        run(args, _PROG)
    except ArgumentError as error:
        from lightning_qk.cli._arguments import explain

        return _fail(explain(error, args[0], _PROG), 2)
    return 0


def _report(args: list[str]) -> int:
    """Make the report again from a run's record."""
    options = report_parser().parse(args[1:])
    from lightning_qk.inspect.documents import BadInput, one_line
    from lightning_qk.inspect.export import check_targets

    try:
        is_file = options.record.is_file()
    except (OSError, ValueError) as error:  # such as a name that is too long
        reason = getattr(error, "strerror", None) or error
        return _fail(
            f"expected a record that a monitor wrote, got {options.record} ({reason}); correct it", 2
        )
    if not is_file:
        what = "the folder" if options.record.is_dir() else "no such file:"
        return _fail(
            f"expected a record that a monitor wrote, got {what} {options.record}; name a run's "
            "lightning_qk_record.safetensors",
            2,
        )
    target = options.output or options.record.with_name("lightning_qk_report.html")
    table = options.parquet
    if table is not None and not table.name:
        table = options.record.with_name("lightning_qk_history.parquet")
    check_targets([target, *([] if table is None else [table])])
    from lightning_qk.record.health import print_health
    from lightning_qk.record.history import RunRecord
    from lightning_qk.report.report import write_report

    try:
        record = RunRecord.load(options.record)
    except ValueError as error:
        return _fail(_mend(error), 2)
    except OSError as error:
        reason = error.strerror or error
        return _fail(
            f"expected a record that may be read, got {options.record} ({reason}): check its permissions", 1
        )
    writing = (target, "--output")
    try:
        path = write_report(record, target)
        print_health(record)
        print(printable(path))
        if table is not None:
            from lightning_qk.record.parquet import write_history

            writing = (table, "--parquet")
            print(printable(write_history(record, table)))
    except OSError as error:
        place, option = writing
        reason = error.strerror or error
        return _fail(
            f"expected a file that may be written, got {place} ({reason}): name another with {option}", 1
        )
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        # A record whose parts are what a monitor writes and do not go together.
        raise BadInput(
            f"expected a record that a monitor wrote, got {options.record}, of which no page can be made "
            f"({type(error).__name__}: {one_line(error)}): pass another, or report this with what "
            "--traceback shows"
        ) from error
    return 0


def report_parser() -> OneLineParser:
    """The options of ``lightning-qk report``."""
    from pathlib import Path

    parser = OneLineParser(
        prog=f"{_PROG} report",
        description="Print the health of every attention layer of a run, and make its HTML report again, "
        "from the record that the monitors leave in the run's log folder.",
        epilog=f"example: {_PROG} report runs/quickstart/csv/version_0/lightning_qk_record.safetensors",
    )
    parser.add_argument(
        "record", metavar="RECORD", type=Path, help="lightning_qk_record.safetensors in the run's log folder"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="page to write; default: lightning_qk_report.html beside it",
    )
    parser.add_argument(
        "--parquet",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=Path(),
        help="also write every head's history; without a FILE: lightning_qk_history.parquet beside it",
    )
    return parser


def _watch(args: list[str]) -> int:
    """Serve a run's report."""
    from lightning_qk.cli.watch import run

    return run(args[1:], f"{_PROG} watch")


def _verify(args: list[str]) -> int:
    """Compare what is read of a model with what its forward computes."""
    from lightning_qk.cli._verify import run

    return run(args[1:], f"{_PROG} verify")


def _inspect(args: list[str]) -> int:
    """Read checkpoints."""
    # Layers come and go in large blocks of memory. In huge pages, where Linux has them for the asking, a block
    # costs a fraction of the page faults; torch looks at this once, when it is imported.
    if "torch" not in sys.modules:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from lightning_qk.cli.inspect import run

    return run(args[1:], f"{_PROG} inspect")


def _cost(args: list[str]) -> int:
    """Say what the callbacks would add to a job."""
    from lightning_qk.cli.cost import run

    return run(args[1:], f"{_PROG} cost")


def _configs(args: list[str]) -> int:
    """List the configs of the package, or print one."""
    options = configs_parser().parse(args[1:])
    from lightning_qk.cli import _configs as configs

    if options.name is None:
        known = configs.names()
        width = max(map(len, known))
        print(f"in {configs.folder()}:")
        for name in known:
            print(f"  {name:<{width}}  {configs.describe(name)}")
        return 0
    name = options.name.removesuffix(".yaml")
    if name not in configs.names():
        hint = did_you_mean(name, configs.names())
        return _fail(f"expected a config out of {', '.join(configs.names())}, got {name!r}{hint}", 2)
    print((configs.folder() / f"{name}.yaml").read_text(encoding="utf-8"), end="")
    return 0


def configs_parser() -> OneLineParser:
    """The options of ``lightning-qk configs``."""
    parser = OneLineParser(
        prog=f"{_PROG} configs",
        description="List the configs that come with the package, or print one, to edit a copy of it.",
        epilog=f"example: {_PROG} configs quickstart > job.yaml; {_PROG} fit --config job.yaml",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="config to print; without it all are listed")
    return parser


def _completion(args: list[str]) -> int:
    """Print a shell's completions."""
    from lightning_qk.cli._completion import run

    return run(args[1:], _PROG, descriptions(), {"report": report_parser(), "configs": configs_parser()})


def _wandb_workspace(args: list[str]) -> int:
    """Make a W&B workspace."""
    from lightning_qk.cli.workspace import run

    return run(args[1:], f"{_PROG} wandb-workspace")


# One line makes a command: its name, what the help says with an example, and a function of the arguments (the name
# first).
_COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "fit": ("train and validate a model: lightning-qk fit --config quickstart", _fit_and_kin),
    "validate": (
        "evaluate on the validation data: lightning-qk validate --config job.yaml --ckpt_path last.ckpt",
        _fit_and_kin,
    ),
    "test": (
        "evaluate on the test data: lightning-qk test --config job.yaml --ckpt_path last.ckpt",
        _fit_and_kin,
    ),
    "predict": (
        "run a model over the test data: lightning-qk predict --config job.yaml --ckpt_path last.ckpt",
        _fit_and_kin,
    ),
    "inspect": ("show what is in a checkpoint's query and key weights: lightning-qk inspect gpt2", _inspect),
    "verify": (
        "compare what is read of a model with what its forward computes: lightning-qk verify gpt2",
        _verify,
    ),
    "report": (
        "make a run's HTML report again: lightning-qk report runs/job/lightning_qk_record.safetensors",
        _report,
    ),
    "watch": (
        "show a run's report in a browser while the run goes on: lightning-qk watch runs/job",
        _watch,
    ),
    "cost": (
        "say what the callbacks would add to a job's steps: lightning-qk cost --model config.json --ranks 8",
        _cost,
    ),
    "configs": ("list or print the ready configs: lightning-qk configs quickstart > job.yaml", _configs),
    "completion": ("print completions for bash, zsh or fish: lightning-qk completion bash", _completion),
    "wandb-workspace": (
        "make a W&B workspace of attention's health: lightning-qk wandb-workspace my-team/my-project",
        _wandb_workspace,
    ),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Errors that the user can correct take one line. ``--traceback``, or ``LIGHTNING_QK_TRACEBACK=1`` in the
    environment, shows where it comes from.

    Args:
        args: the command line without the program's name; None takes it from ``sys.argv``.

    Returns:
        The exit status: 0, 1 for a run that failed, 2 for a wrong command line, config or checkpoint; see each
        command's help for others.
    """
    given = list(sys.argv[1:] if args is None else args)
    traceback = "--traceback" in given or os.environ.get("LIGHTNING_QK_TRACEBACK", "") not in ("", "0")
    given = [arg for arg in given if arg != "--traceback"]
    if given[:1] == ["help"]:
        given = [*given[1:2], "--help"]
    if given[:1] in (["-h"], ["--help"]):
        print(_help())
        return 0
    if given[:1] == ["--version"]:
        from lightning_qk._version import __version__

        print(f"{_PROG} {__version__}")
        return 0
    name = given[0] if given else None
    if name not in _COMMANDS:
        what = (
            f"got {name!r}{did_you_mean(name, [*_COMMANDS, '--help', '--version'])}" if name else "got none"
        )
        return _fail(f"expected a command out of {', '.join(_COMMANDS)}, {what}; see {_PROG} --help", 2)
    try:
        return _COMMANDS[name][1](given)
    except KeyboardInterrupt:
        if traceback:
            raise
        print(f"{_PROG}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if traceback or not _can_be_mended(error):
            raise
        status = getattr(error, "status", 1)
        return _fail(_mend(error) + (" (--traceback shows where)" if status == 1 else ""), status)


def descriptions() -> dict[str, str]:
    """The commands and what they do, without the examples."""
    return {name: text.partition(f": {_PROG} ")[0] for name, (text, _) in _COMMANDS.items()}


def _help() -> str:
    width = max(map(len, _COMMANDS))
    lines = []
    for name, (text, _) in _COMMANDS.items():
        what, _, example = text.partition(f": {_PROG} ")
        lines.append(f"  {name:<{width}} {what}")
        if example:
            lines.append(f"  {'':<{width}}   {_PROG} {example}")
    return "\n".join(
        [
            f"usage: {_PROG} COMMAND [OPTIONS]",
            "",
            "Watch, diagnose and steer what attention does while a transformer trains.",
            "",
            "commands, each with an example:",
            *lines,
            "",
            "options:",
            "  --help      show this, or the options of a command: " + f"{_PROG} COMMAND --help",
            "  --version   show the version",
            "  --traceback show where an error comes from",
        ]
    )


def _fail(message: str, status: int) -> int:
    print(printable(f"{_PROG}: error: {message}"), file=sys.stderr)
    return status


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _can_be_mended(error: Exception) -> bool:
    """Whether an error is about the user's input rather than a fault in a program."""
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, ValueError | FileNotFoundError | ModuleNotFoundError)
        or (isinstance(error, OSError) and error.filename is not None)
        or "MisconfigurationException" in names
        or "wandb" in modules
    )


def _mend(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"expected a place that may be read and written, got {error.filename} ({error.strerror})"
    # Where a class of a config refuses its arguments, jsonargparse lists that among other reasons.
    reason = _OUR_REASON.search(str(error))
    text = _one_line(reason["reason"] if reason else str(error))
    if "api key" in text.lower() or "wandb login" in text.lower():
        return (
            f"expected a W&B login for WandbLogger, got none ({text}): run `wandb login`, or give the logger "
            "offline: true"
        )
    return text


# Our own messages about arguments.
_OUR_REASON = re.compile(r"^\s*-? ?(?P<reason>expected [^\n]+)$", re.MULTILINE)
