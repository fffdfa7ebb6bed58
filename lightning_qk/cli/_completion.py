"""``lightning-qk completion``: what a shell needs to complete the command, written by shtab."""

import argparse
from collections.abc import Sequence

from lightning_qk.cli import _configs
from lightning_qk.cli._arguments import OneLineParser
from lightning_qk.cli._commands import COMMANDS, JOBS, PROG
from lightning_qk.inspect.documents import BadInput

SHELLS = ("bash", "zsh", "fish")
# Options of which the values are known.
_CHOICES = {
    "--model.schedule": ("constant", "linear", "cosine"),
    "--data.tokenizer": ("bytes", "words"),
    "--data.source": ("stdlib",),
    "--trainer.accelerator": ("auto", "cpu", "cuda", "mps"),
}
_FILES = ("--ckpt_path", "--data.source", "--data.val_files", "--data.test_files", "--data.tokenizer")


def parser(prog: str) -> OneLineParser:
    """The options of the command itself."""
    own = OneLineParser(
        prog=prog,
        description="Print what a shell needs to complete commands, options and file names.",
        epilog=f"""\
once, and again after an upgrade:
  {prog} bash > ~/.local/share/bash-completion/completions/{PROG}
  {prog} zsh > ~/.zfunc/_{PROG}          # with fpath+=~/.zfunc before compinit
  {prog} fish > ~/.config/fish/completions/{PROG}.fish
""",
    )
    own.add_argument(
        "shell", metavar="SHELL", choices=SHELLS, help=" or ".join([", ".join(SHELLS[:-1]), SHELLS[-1]])
    )
    return own


def run(args: Sequence[str], prog: str) -> int:
    """Print the completions.

    Raises:
        BadInput: an unknown shell, or shtab is not installed.
    """
    shell = parser(prog).parse(args).shell
    try:
        import shtab
    except ModuleNotFoundError:
        raise BadInput(
            "expected the package shtab, which writes completions, got none: pip install shtab"
        ) from None
    print(shtab.complete(whole(), shell))
    return 0


def whole() -> argparse.ArgumentParser:
    """Every command with its options, as a parser that is only looked at."""
    top = argparse.ArgumentParser(prog=PROG)
    top.add_argument("--version", action="store_true", help="show the version")
    added = top.add_subparsers()
    for name, command in COMMANDS.items():
        if name in JOBS:
            _add_job(added.add_parser(name, help=command.what, add_help=False), name, _configs.names())
            continue
        parents = [command.module.parser(f"{PROG} {name}")]
        own = added.add_parser(name, help=command.what, add_help=False, parents=parents)
        for action in own._actions:
            if name == "configs" and action.dest == "name":
                action.choices = _configs.names()
            # Whatever is called a file or a checkpoint is completed as one.
            if action.metavar in ("FILE", "CHECKPOINT", "RECORD"):
                action.complete = _file()  # type: ignore[attr-defined]
    return top


def _add_job(job: argparse.ArgumentParser, name: str, configs: list[str]) -> None:
    from lightning_qk.cli._lightning_cli import option_strings
    from lightning_qk.tasks import TASKS

    choices = {**_CHOICES, "--model.task": TASKS}
    flags = ("--help", "--help-all", "--print_config")
    config = job.add_argument("-c", "--config", help="a file, or a config of the package")
    config.complete = _file_or(configs)  # type: ignore[attr-defined]
    for option in option_strings(name):
        if option in flags:
            job.add_argument(option, action="store_true")
        elif option != "--config":
            added = job.add_argument(option, choices=choices.get(option))
            if option in _FILES:
                added.complete = _file()  # type: ignore[attr-defined]


def _file_or(words: Sequence[str]) -> dict[str, object]:
    """Files and these words, as each shell says it."""
    name, listed = "_lightning_qk_config_or_file", " ".join(words)
    return {
        "bash": name,
        "zsh": name,
        "fish": f"(printf '%s\\n' {listed}; __fish_complete_path (commandline -ct))",
        "preamble": {
            "bash": f'{name}() {{\n  compgen -W \'{listed}\' -- "$1"\n  compgen -f -- "$1"\n}}',
            "zsh": f"{name}() {{\n  _alternative 'configs:config:({listed})' 'files:file:_files'\n}}",
        },
    }


def _file() -> object:
    import shtab

    return shtab.FILE
