"""The README's blocks are executed: Python as it stands, commands as far as they need no network."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line]


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    if "steer" in namespace:
        assert sum(ast.literal_eval(printed).values()) == 8  # a class for every head
        return
    assert "tensor(" in printed
    if "trainer" in namespace:
        assert namespace["trainer"].global_step == 20
        assert list(tmp_path.rglob("lightning_qk_report.html"))
    else:
        assert isinstance(namespace["penalty"], torch.Tensor)


def test_every_block_is_of_a_language_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"python", "bash", "diff", "text"}
    assert PYTHON
    assert COMMANDS


def test_the_lines_to_add_are_those_of_a_job():
    """Lines of the first block are Python with names that the package has."""
    [block] = [code for language, code in BLOCKS if language == "diff"]
    added = "\n".join(line[1:].strip() for line in block.splitlines() if line.startswith("+"))
    namespace = {}
    exec(added.replace("callbacks=", "callbacks = ").rstrip(","), namespace)
    assert all(isinstance(one, L.Callback) for one in namespace["callbacks"])


def test_the_table_is_that_of_the_command():
    [block] = [code for language, code in BLOCKS if language == "text"]
    titles = [cell.strip() for cell in block.splitlines()[2].split("┃")]
    assert {"layer", "sym var", "entropy", "sink", "max|logit|", "linear share", "verdict"} <= set(titles)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_real(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        assert shutil.which("torchrun", path=str(Path(sys.executable).parent))
        program, *arguments = arguments[arguments.index("--no-python") + 1 :]
    if program == "make":
        # What make would run, without running it: it would make an environment in an environment.
        shown = subprocess.run(
            ["make", "--dry-run", "--always-make", *arguments], capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
        steps = shown.stdout
        install = [line for line in COMMANDS if line.startswith(".venv/bin/pip install")]
        if arguments == ["quickstart"]:  # the lines below it in the README are the same
            for line in install:
                constraint, package = re.search(r"-c (\S+) (.*)", line).groups()
                assert f"-c {constraint} {package}" in steps, line
            assert COMMANDS[COMMANDS.index(install[-1]) + 1] in steps
        else:
            assert "-m pytest" in steps
    elif arguments[:1] == ["verify"]:
        from lightning_qk.cli._verify import parser as verify_parser

        assert verify_parser("verify").parse_args(arguments[1:]).length >= 4
    elif arguments[:1] == ["inspect"]:
        from lightning_qk.cli.inspect import parser as inspect_parser

        assert inspect_parser("inspect").parse_args(arguments[1:]).fail_on is not None
    elif program.endswith("lightning-qk"):
        # The whole configuration is read and checked, classes included.
        from lightning_qk.cli import main

        with pytest.raises(SystemExit) as done:
            main([*arguments, "--print_config"])
        assert done.value.code in (0, None)
    else:
        assert program in ("python3", ".venv/bin/pip", "pip")
        assert shutil.which("python3")


def test_the_coverage_that_the_readme_tells_is_that_of_the_table():
    table = (ROOT / "docs" / "coverage.md").read_text()
    counts = {
        what: re.search(rf"\| {what} \| (\d+) \|", table)[1]
        for what in ("with softmax attention", "weights verified", "statistics verified")
    }
    attention, weights, statistics = counts.values()
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"of {attention} model types with softmax attention" in text
    assert f"weights are verified for {weights} and statistics for {statistics}" in text
