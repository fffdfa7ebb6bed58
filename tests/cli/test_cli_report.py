"""``lightning-qk report``: a page from a record, or a sentence and nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_qk.cli import main
from lightning_qk.record.history import History, RunRecord


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The record of a run of two layers."""
    found, history = RunRecord(), History(["layer_00", "layer_01"], [2, 2])
    history.append(10, {name: torch.rand(4) for name in ("entropy", "entropy_normalized", "max_abs_logit")})
    found.attention = history
    return found.save(tmp_path / "lightning_qk_record.safetensors")


def refusal(capsys: pytest.CaptureFixture[str], *line: str | Path) -> str:
    """What is said of a line that is refused."""
    capsys.readouterr()
    assert main(["report", *map(str, line)]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.count("\n") == 1
    return seen.err


def test_a_page_beside_the_record(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(record)]) == 0
    assert "layer_01" in capsys.readouterr().out
    assert (record.parent / "lightning_qk_report.html").read_text().rstrip().endswith("</html>")


def test_the_newest_record_of_a_folder(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "older" / record.name
    older.parent.mkdir()
    older.write_bytes(record.read_bytes())
    os.utime(older, (1, 1))
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(record.with_name("lightning_qk_report.html")))
    (tmp_path / "nothing").mkdir()
    assert "got a folder without one: " in refusal(capsys, tmp_path / "nothing")


def test_a_record_that_was_cut_short(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = record.read_bytes()
    for size in (len(whole) - 20, 20, 0):
        record.write_bytes(whole[:size])
        assert "expected a record that a monitor wrote" in refusal(capsys, record)
    assert os.listdir(record.parent) == [record.name]


def test_weights_of_a_model_are_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert "pass the file from the run's log folder" in refusal(capsys, tmp_path / "model.safetensors")


def test_pages_that_cannot_be_written(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    assert "add a name" in refusal(capsys, record, "--output", tmp_path / "folder")
    assert "may be written" in refusal(capsys, record, "--output", record / "page.html")
    (tmp_path / "lightning_qk_report.html").mkdir()  # where the page would go by itself
    assert "add a name" in refusal(capsys, record)
    assert sorted(os.listdir(tmp_path)) == [
        "folder",
        "lightning_qk_record.safetensors",
        "lightning_qk_report.html",
    ]


def test_an_interrupted_report_leaves_what_was_there(record: Path) -> None:
    page = record.with_name("lightning_qk_report.html")
    page.write_text("before")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from lightning_qk.cli import main; from lightning_qk.report import report\n"
        "def slow(*_): Path('started').touch(); time.sleep(60)\n"
        "report.render = slow\n"
        f"sys.exit(main(['report', {str(record)!r}]))"
    )
    status, said = interrupt(code, record.parent)
    assert status == 130
    assert said == "lightning-qk: interrupted\n"
    assert page.read_text() == "before"
    assert sorted(os.listdir(record.parent)) == [record.name, page.name, "started"]


def interrupt(code: str, folder: Path) -> tuple[int, str]:
    """The status and the errors of a program that gets SIGINT as soon as there is a file ``started``."""
    # A shell that starts programs in the background has them ignore the signal.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    program = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 120
        while not (folder / "started").exists() and program.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    finally:
        program.kill()
    return program.returncode, said
