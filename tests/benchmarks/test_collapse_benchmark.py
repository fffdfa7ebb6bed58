"""The rule that says what became of a run, and the reduced benchmark."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "collapse"


@pytest.fixture
def truth(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import truth

    return truth


def test_what_became_of_a_run_is_told_by_its_loss(truth):
    healthy = [3 * math.exp(-step / 100) + 1 for step in range(300)]
    reference = truth.reference([healthy, healthy, [loss + 0.01 for loss in healthy]])
    assert truth.judge(healthy, reference) == truth.Truth("fine", truth.final(healthy), None)
    stuck = truth.judge([max(loss, 2.5) for loss in healthy], reference)
    assert stuck.outcome == "plateau"
    # 2.5 is 5 % above the healthy loss from step 77 on, its median of 20 steps from about ten steps later.
    assert 77 < stuck.failure < 93
    risen = truth.judge([loss if step < 200 else 3.0 for step, loss in enumerate(healthy)], reference)
    assert risen.outcome == "diverged"
    assert 200 < risen.failure <= 212
    broken = truth.judge([*healthy[:150], *[math.nan] * 150], reference)
    assert (broken.outcome, broken.failure) == ("diverged", 151)
    spike = [*healthy[:150], *[9.0] * 8, *healthy[158:]]
    assert not truth.judge(spike, reference).fails


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_reduced_benchmark(tmp_path):
    out = tmp_path / "quick.json"
    command = [
        sys.executable,
        str(FOLDER / "run.py"),
        "--quick",
        "--cache",
        str(tmp_path / "cache"),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    found = json.loads(out.read_text())
    both = [found["chosen_on"], found["reported_on"]]
    failing = sum(half["failing"] for half in both)
    assert failing >= 5
    assert sum(half["warned_before"] for half in both) >= failing / 2
    assert sum(half["false_alarms"] for half in both) <= 1
    assert sum(half["rescued"] for half in both) >= failing / 2
