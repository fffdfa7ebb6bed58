"""Code blocks of Markdown pages, run or checked as a reader would use them."""

import contextlib
import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What may stand on a page and is no code: output, formulas, what sphinx alone understands.
OTHER = {"text", "{eval-rst}", "{toctree}"}


def blocks(page: str | Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    found = re.findall(r"^```(\S+)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def languages(page: str | Path) -> set[str]:
    """The languages of a page's blocks."""
    return set(re.findall(r"^```(\S+)\n.*?^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE))


def commands(page: str | Path) -> list[str]:
    """The lines of a page's shell blocks."""
    return [line for code in blocks(page, "bash") for line in code.splitlines() if line and line[0] != "#"]


def run_python(page: str | Path, namespace: dict[str, Any] | None = None) -> tuple[dict[str, Any], str]:
    """Run all Python blocks of a page, one after the other as a reader would.

    Returns:
        The names that they leave, and what they print.
    """
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), namespace)
    return namespace, out.getvalue()


def check_command(line: str) -> None:
    """Make sure that a command exists and takes its options: of a job, the whole configuration is read."""
    words = shlex.split(line.partition(" > ")[0])
    program, *arguments = words
    if program.endswith("python") or program.endswith("python3"):
        script = next((ROOT / word for word in arguments if word.endswith(".py")), None)
        assert script is None or script.is_file(), line
        return
    if program in ("open", "xdg-open", "source", "."):
        return
    if program.endswith("pip"):
        assert arguments[0] == "install", line
        return
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments), line
        return
    assert program.endswith("lightning-qk"), line
    _check_ours(arguments)


def _check_ours(arguments: Sequence[str]) -> None:
    from lightning_qk.cli import main
    from lightning_qk.cli._commands import COMMANDS
    from lightning_qk.cli.inspect import _options as inspect_options

    name, *rest = arguments
    if name in ("fit", "validate", "test", "predict"):
        # A file that the page makes is a copy of one of the package's.
        rest = ["quickstart" if word == "job.yaml" and not Path(word).exists() else word for word in rest]
        extra = [] if any("help" in word or "print_config" in word for word in rest) else ["--print_config"]
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main([name, *rest, *extra])
            except SystemExit as end:
                status = end.code
        assert status in (0, None), arguments
    elif name == "inspect":
        inspect_options(rest, "inspect")
    elif name == "configs":
        assert main(list(arguments)) == 0
    elif name in COMMANDS and "--help" not in rest:
        COMMANDS[name].module.parser(name).parse(rest)
    else:
        assert name in ("--help", "--version", *COMMANDS), arguments
