"""``lightning-qk completion``: what a shell needs to complete the command, written by shtab."""

import argparse
from collections.abc import Mapping, Sequence

from lightning_qk.cli._arguments import OneLineParser
from lightning_qk.inspect.documents import BadInput

SHELLS = ("bash", "zsh", "fish")
_JOBS = ("fit", "validate", "test", "predict")
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
        prog=f"{prog} completion",
        description="Print what a shell needs to complete commands, options and file names.",
        epilog=f"""\
once, and again after an upgrade:
  {prog} completion bash > ~/.local/share/bash-completion/completions/{prog}
  {prog} completion zsh > ~/.zfunc/_{prog}          # with fpath+=~/.zfunc before compinit
  {prog} completion fish > ~/.config/fish/completions/{prog}.fish
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own.add_argument(
        "shell", metavar="SHELL", choices=SHELLS, help=" or ".join([", ".join(SHELLS[:-1]), SHELLS[-1]])
    )
    return own


def run(
    args: Sequence[str],
    prog: str,
    commands: Mapping[str, str],
    parsers: Mapping[str, argparse.ArgumentParser],
) -> int:
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
    print(shtab.complete(whole(prog, commands, parsers), shell))
    return 0


def whole(
    prog: str, commands: Mapping[str, str], parsers: Mapping[str, argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Every command with its options, as a parser that is only looked at."""
    from lightning_qk.cli import _configs
    from lightning_qk.cli._verify import parser as verify_parser
    from lightning_qk.cli.inspect import _parser as inspect_parser
    from lightning_qk.cli.watch import parser as watch_parser
    from lightning_qk.cli.workspace import parser as workspace_parser

    ready = {
        "inspect": inspect_parser(prog),
        "verify": verify_parser(f"{prog} verify"),
        "watch": watch_parser(f"{prog} watch"),
        "wandb-workspace": workspace_parser(f"{prog} wandb-workspace"),
        "completion": parser(prog),
        **parsers,
    }
    [name_of_config] = [action for action in ready["configs"]._actions if action.dest == "name"]
    name_of_config.choices = _configs.names()
    top = argparse.ArgumentParser(prog=prog)
    top.add_argument("--version", action="store_true", help="show the version")
    added = top.add_subparsers()
    for name, text in commands.items():
        if name in _JOBS:
            _add_job(added.add_parser(name, help=text, add_help=False), name, _configs.names())
        else:
            parents = [ready[name]] if name in ready else []
            _complete_files(added.add_parser(name, help=text, add_help=False, parents=parents))
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


def _complete_files(command: argparse.ArgumentParser) -> None:
    """Whatever is called a file or a checkpoint is completed as one."""
    for action in command._actions:
        if action.metavar in ("FILE", "CHECKPOINT", "RECORD"):
            action.complete = _file()  # type: ignore[attr-defined]


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
