"""The page on performance says what was measured."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_figures():
    page = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))
    figures = json.loads((ROOT / "docs" / "performance.json").read_text())
    assert (ROOT / "docs" / "performance.md").read_text() == page["render"](figures)


def test_every_bar_is_among_the_figures():
    figures = json.loads((ROOT / "docs" / "performance.json").read_text())
    bars = {entry["name"]: entry["bar"] for entry in figures["results"]}
    asked = {
        "step_default": 1.01,
        "step_every": 1.15,
        "step_locater": 1.02,
        "rows_sampled": 0.5,
        "rows_all": 3.0,
        "dense_time": 0.3,
        "dense_memory": 0.1,
        "moments": 1 / 300,
    }
    assert {name: bars.get(name) for name in asked} == asked
    for entry in figures["results"]:
        assert entry["met"] == (entry["value"] <= entry["bar"])
