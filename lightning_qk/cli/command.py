"""The command ``lightning-qk``.

Lightning and transformers take seconds to import, so that they are imported by the commands that need them.
"""

import os
import re
import sys
from collections.abc import Sequence

from lightning_qk._printable import did_you_mean, printable
from lightning_qk.cli._commands import COMMANDS, JOBS, PROG

_MISFIT = "Error(s) in loading state_dict"
"""How torch begins to say that a checkpoint is not of the model."""


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

        print(f"{PROG} {__version__}")
        return 0
    name = given[0] if given else None
    if name not in COMMANDS:
        what = f"got {name!r}{did_you_mean(name, [*COMMANDS, '--help', '--version'])}" if name else "got none"
        return _fail(f"expected a command out of {', '.join(COMMANDS)}, {what}; see {PROG} --help", 2)
    try:
        if name in JOBS:
            return _run_job(given)
        return int(COMMANDS[name].module.run(given[1:], f"{PROG} {name}"))
    except KeyboardInterrupt:
        if traceback:
            raise
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe has closed it
        sys.stderr.close()
        return 0
    except Exception as error:
        if traceback or not _can_be_mended(error):
            raise
        status = getattr(error, "status", 1)
        return _fail(_mend(error) + (" (--traceback shows where)" if status == 1 else ""), status)


def _run_job(args: list[str]) -> int:
    """Run one of the trainer's commands through LightningCLI."""
    if args[1:2] in (["-h"], ["--help"]):
        from lightning_qk.cli._configs import job_help

        print(job_help(args[0], PROG))
        return 0
    from lightning_qk.cli._job_arguments import job_arguments

    args = ["--help" if arg == "--help-all" else arg for arg in job_arguments(args)]
    from argparse import ArgumentError

    from lightning_qk.cli._lightning_cli import run

    try:
        run(args, PROG)
    except ArgumentError as error:
        from lightning_qk.cli._arguments import explain

        return _fail(explain(error, args[0], PROG), 2)
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        f"  {name:<{width}} {one.what}\n  {'':<{width}}   {PROG} {one.example}"
        for name, one in COMMANDS.items()
    ]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [OPTIONS]",
            "",
            "Watch, diagnose and steer what attention does while a transformer trains.",
            "",
            "commands, each with an example:",
            *lines,
            "",
            "options:",
            "  --help      show this, or the options of a command: " + f"{PROG} COMMAND --help",
            "  --version   show the version",
            "  --traceback show where an error comes from",
        ]
    )


def _fail(message: str, status: int) -> int:
    from lightning_qk.cli._quiet import in_lines

    print(in_lines(printable(f"{PROG}: error: {message}")), file=sys.stderr)
    return status


def _can_be_mended(error: Exception) -> bool:
    """Whether an error is about the user's input rather than a fault in a program."""
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, ValueError | FileNotFoundError | ModuleNotFoundError)
        or (isinstance(error, OSError) and error.filename is not None)
        or "MisconfigurationException" in names
        or "wandb" in modules
        or str(error).startswith(_MISFIT)
    )


def _mend(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"expected a place that may be read and written, got {error.filename} ({error.strerror})"
    if str(error).startswith(_MISFIT):
        first = " ".join("".join(str(error).splitlines()[1:2]).split(",")[0].split())
        return (
            f"expected a checkpoint whose weights are those of the job's model, got another's ({first}): pass the "
            "lightning_qk_config.yaml of the checkpoint's run with --config"
        )
    # Where a class of a config refuses its arguments, jsonargparse lists that among other reasons.
    reason = _OUR_REASON.search(str(error))
    text = " ".join((reason["reason"] if reason else str(error)).split())
    if "api key" in text.lower() or "wandb login" in text.lower():
        return (
            f"expected a W&B login for WandbLogger, got none ({text}): run `wandb login`, or give the logger "
            "offline: true"
        )
    return text


# Our own messages about arguments.
_OUR_REASON = re.compile(r"^\s*-? ?(?P<reason>expected [^\n]+)$", re.MULTILINE)
