"""What docs/comparison.md says of other packages is what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
THEIRS = ROOT / ".venv-comparison" / "bin" / "python"


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import comparison

    return comparison


def test_the_page_is_made_from_the_figures(comparison):
    figures = json.loads((ROOT / "docs" / "comparison.json").read_text())
    page = comparison.render(figures)
    assert (ROOT / "docs" / "comparison.md").read_text() == page
    assert "{" not in page  # every figure that the text asks for is there


def test_every_overlap_was_measured_and_met(comparison):
    figures = json.loads((ROOT / "docs" / "comparison.json").read_text())
    rows = {(row["package"], row["name"]): row for row in figures["overlaps"]}
    assert set(rows) == {(package, name) for package, name, _, _ in comparison.OVERLAPS}
    assert figures["model"] == {"layers": 12, "heads": 12, "width": 768}
    for row in rows.values():
        assert row["bar"] == 1e-3
        assert row["met"] == (row["difference"] <= row["bar"])
        assert row["met"]


def test_a_difference_is_seen(comparison):
    found = torch.randn(3, 8, dtype=torch.complex128)
    assert comparison.matched(found, found[:, torch.randperm(8)]) == 0
    other = found.clone()
    other[1, 4] += 0.01 * found[1].abs().max()
    assert comparison.matched(found, other) == pytest.approx(0.01, rel=0.1)
    with pytest.raises(ValueError, match="expected spectra of one size"):
        comparison.matched(found, found[:, :5])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not THEIRS.exists(), reason="make comparison makes .venv-comparison, with the two packages"
)
def test_spectra_are_the_same_as_theirs(tmp_path):
    out = tmp_path / "found.json"
    sizes = ["--layers", "3", "--heads", "4", "--width", "128", "--repeats", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "comparison.py"), *sizes, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["overlaps"]
    assert len(rows) == 5
    assert all(row["difference"] <= 1e-3 for row in rows)
