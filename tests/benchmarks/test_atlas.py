"""docs/atlas.md is what the references and the comparisons that lie in the repository make it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_qk.inspect import Options, open_source, read_checkpoint, reference
from tests import models

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


def test_what_is_written_is_read_again(atlas, tmp_path, monkeypatch):
    models.llama().save_pretrained(tmp_path / "model")
    (checkpoint,) = open_source(str(tmp_path / "model"), Options())
    reading, *_ = read_checkpoint(checkpoint)
    reading = replace(reading, predicted={"entropy": torch.arange(sum(reading.heads)).float()})
    monkeypatch.setattr("lightning_qk.inspect.healthy._FOLDER", tmp_path)
    atlas.write_reference(reading, tmp_path / "own.parquet", facts={"Text": "a text"})
    known = reference("own")
    assert known.facts["Text"] == "a text"
    assert len(known.layers) == len(known.heads) == sum(reading.heads)
    torch.testing.assert_close(known.values["eig_mean"].float(), reading.values["eig_mean"])
    assert known.values["predicted/entropy"].tolist() == [*range(sum(reading.heads))]
