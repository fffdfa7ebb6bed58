"""The command ``lightning-qk``.

Lightning and transformers take seconds to import, so that they are imported by the commands that need them.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_PROG = "lightning-qk"


def _fit_and_kin(args: list[str]) -> int:
    """Run one of the trainer's commands through LightningCLI."""
    from argparse import ArgumentError

    from lightning_qk._lightning_cli import run

    try:
        run(args, _PROG)
    except ArgumentError as error:
        return _fail(_explain(error, args[0]), 2)
    return 0


def _report(args: list[str]) -> int:
    """Make the report again from a run's record."""
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(
        prog=f"{_PROG} report", description="Make the HTML report of a run again from its record."
    )
    parser.add_argument("record", type=Path, help="lightning_qk_record.safetensors in the run's log folder")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write; default: lightning_qk_report.html next to the record",
    )
    options = parser.parse_args(args[1:])
    if not options.record.is_file():
        return _fail(
            f"expected a record that a monitor wrote, got no such file: {options.record}; correct it", 2
        )
    from lightning_qk.logging.health import print_health
    from lightning_qk.logging.history import RunRecord
    from lightning_qk.logging.report import write_report

    try:
        record = RunRecord.load(options.record)
    except OSError as error:
        reason = error.strerror or error
        return _fail(
            f"expected a record that may be read, got {options.record} ({reason}): check its permissions", 1
        )
    target = options.output or options.record.with_name("lightning_qk_report.html")
    try:
        path = write_report(record, target)
    except OSError as error:
        reason = error.strerror or error
        return _fail(
            f"expected a file that may be written, got {target} ({reason}): name another with --output", 1
        )
    print_health(record)
    print(path)
    return 0


def _coverage(args: list[str]) -> int:
    """Measure which model types are read and captured."""
    from lightning_qk.coverage.command import run

    return run(args[1:], f"{_PROG} coverage")


def _inspect(args: list[str]) -> int:
    """Read checkpoints."""
    from lightning_qk.inspect.command import run

    return run(args[1:], f"{_PROG} inspect")


# One line makes a command: its name, what the help says, and a function of the arguments (the name first).
_COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "fit": ("train and validate a model: lightning-qk fit --config configs/quickstart.yaml", _fit_and_kin),
    "validate": ("evaluate on the validation data", _fit_and_kin),
    "test": ("evaluate on the test data", _fit_and_kin),
    "predict": ("run the model over the test data", _fit_and_kin),
    "inspect": ("show what is in a checkpoint's query and key weights: lightning-qk inspect gpt2", _inspect),
    "report": ("make the HTML report of a run again from its record", _report),
    "coverage": ("measure which of transformers' model types are read and captured", _coverage),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    What the user can mend is told in one line. ``--traceback``, or ``LIGHTNING_QK_TRACEBACK=1`` in the
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
    if given[:1] in (["-h"], ["--help"]):
        print(_help())
        return 0
    if given[:1] == ["--version"]:
        from lightning_qk._version import __version__

        print(f"{_PROG} {__version__}")
        return 0
    name = given[0] if given else None
    if name not in _COMMANDS:
        what = f"got {name!r}{_did_you_mean(name, _COMMANDS)}" if name else "got none"
        return _fail(f"expected a command out of {', '.join(_COMMANDS)}, {what}; see {_PROG} --help", 2)
    try:
        return _COMMANDS[name][1](given)
    except Exception as error:
        if traceback or not _can_be_mended(error):
            raise
        return _fail(f"{_mend(error)} (--traceback shows where)", getattr(error, "status", 1))


def _help() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (text, _) in _COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {_PROG} COMMAND [OPTIONS] [--traceback]",
            "",
            "Watch, diagnose and steer what attention does while a transformer trains.",
            "",
            "commands:",
            *lines,
            "",
            f"{_PROG} COMMAND --help shows the options of a command.",
        ]
    )


def _fail(message: str, status: int) -> int:
    print(f"{_PROG}: error: {message}", file=sys.stderr)
    return status


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _can_be_mended(error: Exception) -> bool:
    """Whether an error speaks of the user's input rather than of a fault in a program."""
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, ValueError | FileNotFoundError | ModuleNotFoundError)
        or "MisconfigurationException" in names
        or "wandb" in modules
    )


def _mend(error: Exception) -> str:
    # Where a class of a config refuses its arguments, jsonargparse lists that among other reasons.
    reason = _OUR_REASON.search(str(error))
    text = _one_line(reason["reason"] if reason else str(error))
    if "api key" in text.lower() or "wandb login" in text.lower():
        return (
            f"expected a W&B login for WandbLogger, got none ({text}): run `wandb login`, or give the logger "
            "offline: true"
        )
    return text


# What a class of ours says about its arguments.
_OUR_REASON = re.compile(r"^\s*-? ?(?P<reason>expected [^\n]+)$", re.MULTILINE)
# How jsonargparse says that a key does not exist: on the command line, in a config, in a class's init_args.
_UNKNOWN_KEY = re.compile(
    r"(?:unrecognized arguments: -*|does not accept option '|Option '|Key ')(?P<key>[\w.-]+)", re.IGNORECASE
)
_CLASS_PATH = re.compile(r"Problem with given class_path '(?P<path>[\w.]+)'")
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")


def _explain(error: Exception, command: str) -> str:
    """One line for what jsonargparse says in many."""
    text = str(getattr(error, "message", None) or error)
    path, key, attribute = (pattern.search(text) for pattern in (_CLASS_PATH, _UNKNOWN_KEY, _NO_ATTRIBUTE))
    if attribute:
        module = sys.modules.get(attribute["module"])
        hint = _did_you_mean(attribute["name"], dir(module))
        name = f"{attribute['module']}.{attribute['name']}"
        return f"expected a class_path that exists, got {name}{hint or '; correct it'}"
    if key and path:
        options = _init_args(path["path"])
        hint = _did_you_mean(key["key"], options)
        return f"expected init_args of {path['path']} ({', '.join(options)}), got {key['key']!r}{hint}"
    if key:
        from lightning_qk._lightning_cli import option_names

        hint = _did_you_mean(key["key"], option_names(command))
        return (
            f"expected an option that exists, got {key['key']!r}{hint or f'; see {_PROG} {command} --help'}"
        )
    # A list of callbacks is a union of types, and each type gives its reason: the one of the class is meant.
    start = path.start() if path else 0
    return _one_line(text[start:].split("\n    - ")[0])


def _init_args(class_path: str) -> list[str]:
    import inspect
    from importlib import import_module

    module, _, name = class_path.rpartition(".")
    found: Any = getattr(import_module(module), name)
    return [option for option in inspect.signature(found).parameters if option != "self"]
