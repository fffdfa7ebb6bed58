"""The command: what it prints, writes and returns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.coverage import catalogue
from tools.coverage.command import run
from tools.coverage.tables import Totals, markdown, row_of

# One of each kind: separate, Conv1D, fused by group, grouped queries with rotary, norms between, latent, cross-
# attention, images, a hybrid, and one without attention.
SAMPLE = ("bert", "gpt2", "falcon", "mistral", "qwen3", "deepseek_v2", "t5", "vit", "jamba", "mamba")
PROG = "python -m tools.coverage"


def test_a_sample_of_types_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "docs" / "coverage.md", tmp_path / "coverage.json"
    assert run([*SAMPLE, "--output", str(page), "--json", str(data)], PROG) == 0
    types = json.loads(data.read_text())["types"]
    assert sorted(types) == sorted(SAMPLE)
    for name in SAMPLE:
        assert types[name]["peak"] < 2048
        if name == "mamba":
            assert types[name]["group"] == "no softmax"
            continue
        assert types[name]["group"] == "attention"
        assert types[name]["weights_verified"], types[name]
        assert types[name]["statistics_verified"], types[name]
    # Both implementations, every layer of both stacks, and cross-attention.
    assert types["bert"]["implementations"] == ["eager", "sdpa"]
    assert len(types["t5"]["sites"]) == 6
    assert len(types["jamba"]["sites"]) == 1
    text = page.read_text()
    assert "| `bert` | 2 | 2 / 2 | table | 2 |" in text
    assert "`mamba`" in text
    printed = capsys.readouterr().out
    assert "Weights verified: 9 of 9 (100.0 %)" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (["lama"], "did you mean 'llama'?"),
        (["bert", "xyzzyx"], "AutoConfig"),
        (["--jobs", "0"], "at least 1 job"),
    ],
)
def test_a_wrong_line_is_told_in_one(wrong: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(wrong, PROG) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{PROG}: error: expected")
    assert hint in error
    assert error.count("\n") == 1


def site(**changes: object) -> dict[str, object]:
    return {
        "name": "a",
        "class": "A",
        "read": True,
        "route": "table",
        "weights": "verified",
        "statistics": "verified",
        **changes,
    }


def result(*sites: dict[str, object], **changes: object) -> dict[str, object]:
    return {"not_built": None, "not_run": None, "softmax": True, "sites": list(sites), **changes}


def test_types_count_as_verified_only_when_every_layer_that_ran_is() -> None:
    rows = [
        row_of("good", result(site(), site()), None),
        row_of("half", result(site(), site(route="inferred", weights="its queries are wrong")), None),
        row_of("idle", result(site(weights="not run", statistics="not run")), None),
        row_of("crash", None, "its process ended by SIGSEGV"),
        row_of("linear", result(site(weights="no softmax", statistics="no softmax"), softmax=False), None),
        row_of("missing", result(not_built="ImportError: timm"), None),
        row_of("stuck", result(not_run="TypeError: no input"), None),
    ]
    totals = Totals.of(rows)
    assert (totals.attention, totals.weights, totals.statistics) == (4, 1, 2)
    assert (totals.no_softmax, totals.not_built, totals.not_run) == (1, 1, 1)
    assert not totals.meets_bars()
    assert Totals.of(rows[:1]).meets_bars()
    page = markdown(rows, "versions")
    assert "| `half` | 2 | 2 / 1 | 1 × inferred; 1 × table | 2 |" in page
    assert "| weights read by: inferred | 1 | | 1 |" in page
    assert "its queries are wrong" in page
    assert "SIGSEGV" in page
    assert "timm" in page
    assert "no input" in page
    assert "| weights verified | 1 | 25.0 % |" in page


def test_every_type_has_a_configuration_and_most_a_class() -> None:
    types = catalogue.model_types()
    assert len(types) > 300
    assert types == sorted(types)
    assert next(catalogue.classes("bert")).__name__ == "BertModel"


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_bars_hold_over_all_types(tmp_path: Path) -> None:
    page, data = tmp_path / "coverage.md", tmp_path / "coverage.json"
    options = ["--jobs", "2", "--timeout", "300", "--output", str(page), "--json", str(data)]
    # In a process of its own: what the tests hold in memory would count for each type.
    status = subprocess.run([sys.executable, "-m", "tools.coverage", *options], check=False).returncode
    measured = json.loads(data.read_text())
    totals = measured["totals"]
    assert totals["weights"] >= 0.97 * totals["attention"], totals
    assert totals["statistics"] >= 0.85 * totals["attention"], totals
    assert status == 0
    for name, found in measured["types"].items():
        assert found.get("peak", 0) < 2300, name
        if found["group"] in ("not built", "not run"):
            assert found["why"], name
