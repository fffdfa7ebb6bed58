"""What the command says of a line that it refuses."""

from pathlib import Path

import pytest

from lightning_qk.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *line: str | Path) -> str:
    """What is said of a line that is refused: one line on standard error and status 2."""
    capsys.readouterr()
    assert main(["inspect", *map(str, line)]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.count("\n") == 1
    assert seen.err.startswith("lightning-qk: error: ")
    return seen.err
