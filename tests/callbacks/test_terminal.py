"""What a person sees in a terminal: the table of health and its reasons beside progress bars."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lightning_qk.record.health import print_health
from lightning_qk.record.history import RunRecord

TESTS = Path(__file__).parents[1]
CASES = [f"{columns}-{bar}" for columns in (80, 100, 120) for bar in ("rich", "tqdm")]
_PART = re.compile(r"\x1b\[(?P<number>[\d;?]*)(?P<code>[A-Za-z])|(?P<char>.)", re.DOTALL)


def shown(raw: str, columns: int) -> list[str]:
    """Lines of a terminal of this width that has scrolled over all that was written."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for part in _PART.finditer(raw):
        char, code, number = part["char"], part["code"], part["number"]
        count = int(number) if number and number.isdigit() else 1
        if char == "\n":
            row += 1
        elif char == "\r":
            column = 0
        elif char is not None:
            if column == columns:
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            line = lines[row]
            line += " " * (column + 1 - len(line))
            line[column] = char
            column += 1
        elif code == "A":
            row = max(row - count, 0)
        elif code == "K":
            lines[row] = [] if number == "2" else lines[row][:column]
        else:
            assert code in "mhl", part.group()  # colours; a cursor that hides
        while len(lines) <= row:
            lines.append([])
    return ["".join(line).rstrip() for line in lines]


@pytest.fixture(scope="module")
def screens(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """The folder of the runs and, for each width and bar, what the terminal shows."""
    folder = tmp_path_factory.mktemp("runs")
    parent, child = pty.openpty()
    job = subprocess.Popen(
        [sys.executable, str(TESTS / "callbacks" / "terminal_job.py"), str(folder), *CASES],
        stdin=child,
        stdout=child,
        stderr=child,
        env={
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("COLUMNS", "LINES", "NO_COLOR")
            },
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "TERM": "xterm-256color",
            "OMP_NUM_THREADS": "1",
        },
    )
    os.close(child)
    raw = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # how Linux ends a terminal whose programs have ended
            break
        if not part:
            break
        raw += part
    os.close(parent)
    text = raw.decode()
    assert job.wait() == 0, text[-3000:]
    parts = re.split(r"BEGIN (\d+-\w+)\r\n", text)[1:]
    return folder, {
        case: shown(part, int(case.split("-")[0])) for case, part in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_every_line_of_table_and_reasons_is_on_the_screen(screens, case: str) -> None:
    folder, seen = screens
    columns = int(case.split("-")[0])
    record = next((folder / case).rglob("lightning_qk_record.safetensors"))
    out = io.StringIO()
    print_health(RunRecord.load(record), Console(file=out, width=columns))
    expected = [line.rstrip() for line in out.getvalue().splitlines()]
    assert any("saturated, head" in line for line in expected)
    assert any(line.startswith("What to do (saturated)") for line in expected)

    lines = seen[case]

    start = lines.index(expected[0])
    assert lines[start : start + len(expected)] == expected
    assert lines[start + len(expected)].startswith("Report: ")
    # Nothing is drawn again below it: one more line where the path is longer than the terminal is wide.
    below = [line for line in lines[start + len(expected) :] if line and line != "END"]
    assert "".join(below) == f"Report: {record.parent / 'lightning_qk_report.html'}"


@pytest.mark.parametrize("case", CASES)
def test_a_line_that_is_logged_while_a_bar_is_drawn_stays(screens, case: str) -> None:
    assert "lightning-qk: spectra verified on 2 of 2 layers" in screens[1][case]
