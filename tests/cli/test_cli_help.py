"""What the help says, and how fast."""

import re
import subprocess
import sys
import time

import pytest

from lightning_qk.cli import _configs, main
from lightning_qk.cli._commands import COMMANDS
from lightning_qk.cli._configs import job_help
from lightning_qk.cli._lightning_cli import option_names

JOBS = ("fit", "validate", "test", "predict")


def shown(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """What a line prints that ends well."""
    capsys.readouterr()
    try:
        status = main(line)
    except SystemExit as end:
        status = end.code
    assert status == 0
    return capsys.readouterr().out


def test_the_help_has_an_example_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE)
        assert re.search(rf"^ +lightning-qk {name} \w|^ +lightning-qk {name} --", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 40
    assert shown(capsys, "help") == text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, name, "--help")
    assert "example" in text or "once, and again" in text
    assert len(text.splitlines()) <= 90
    # What is to be copied has one line.
    assert [line for line in text.splitlines() if len(line) > 80 and "  lightning-qk " not in line] == []
    assert shown(capsys, "help", name) == text


@pytest.mark.parametrize("line", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(line: list[str]) -> None:
    code = (
        "import sys; from lightning_qk.cli import main\n"
        f"try:\n  main({line})\nexcept SystemExit: pass\n"
        "sys.exit(sorted({'torch', 'lightning', 'transformers', 'rich', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("command", JOBS)
def test_the_short_help_names_options_that_exist(command: str) -> None:
    text = job_help(command, "lightning-qk")
    known = set(option_names(command))
    named = {name.removesuffix(".help") for name in re.findall(r"--((?:model|data|trainer)\.[\w.]+)", text)}
    assert {name for name in named if not name.startswith("model.model.")} <= known
    assert {"model.model", "model.lr", "data.source", "trainer.callbacks"} <= named
    assert set(re.findall(r"--config (\w+)", text)) - {"job", "CONFIG"} <= set(_configs.names())


def test_the_whole_help_can_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "fit", "--help-all")
    assert "--trainer.gradient_clip_val" in text
    assert "--data.mask_probability" in text
