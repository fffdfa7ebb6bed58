"""docs/atlas.md is what the references and the comparisons that lie in the repository make it."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def atlas(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import atlas

    return atlas


def test_the_page_is_made_from_the_references(atlas):
    comparisons = json.loads((ROOT / "docs" / "predictions.json").read_text("utf-8"))
    page = atlas.render([atlas.reference(name) for name in sorted(atlas.TITLES)], comparisons)
    assert (ROOT / "docs" / "atlas.md").read_text("utf-8") == page
    for name in ("predicted", "layers", "spectra"):
        assert f"images/atlas-{name}.png" in page
        assert (ROOT / "docs" / "images" / f"atlas-{name}.png").stat().st_size < 200_000


def test_a_comparison_that_misses_is_called_so(atlas):
    row = {"statistic": "distance", "spearman": 0.8, "error": 1.0, "asked": 0.9}
    where = {"model": "toy", "heads": 4, "moments": "a", "measured": "b", "length": 8}
    closed = row | {"statistic": "distance, closed form", "spearman": 0.7, "asked": None}
    for asked, missed in ((0.9, 1), (0.7, 0)):
        table = atlas._comparisons([where | {"rows": [row | {"asked": asked}, closed]}])
        assert table.count("missed") == missed
    assert "| toy, 4 heads, a → b | 8 | drawn tokens | 0.800 / 1 |" in table
    assert "| toy, 4 heads, a → b | 8 | closed form | 0.700 / 1 |" in table
    assert "| toy, 4 heads, a → b | 8 | asked | 0.70 |" in table


def test_quantiles_are_those_of_heads(atlas):
    values = {name: torch.linspace(0, 1, 101).double() for name in atlas.SHOWN}
    known = atlas.Reference("toy", {"Title": "Toy"}, ["a"] * 101, [*range(101)], values)
    assert "| `distance` | 0.05 | 0.5 | 0.95 |" in atlas._quantiles([known])
