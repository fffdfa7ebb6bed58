"""examples/paper/README.md says what results/*.json say."""

import json
from pathlib import Path

import page
import pytest
from common import HERE
from stand_in import stand_in


def test_the_page_is_that_of_the_committed_results() -> None:
    assert (HERE / "README.md").read_text(encoding="utf-8") == page.render()


def test_numbers_come_from_the_results(tmp_path: Path) -> None:
    for name in page.SCRIPTS:
        found = json.loads((HERE / "results" / f"{name}.json").read_text())
        if name == "theory":
            found["results"]["everywhere"]["exact"]["max"] = 0.777
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert "within 0.777 of Monte Carlo" in page.render(tmp_path)


def test_figures_of_the_page_are_there() -> None:
    text = page.render()
    drawn = {path.name for path in (HERE / "results").glob("*.png")}
    shown = {part.split(")")[0] for part in text.split("](results/")[1:]}
    assert shown == drawn


@pytest.mark.parametrize(("found", "text"), [((1.0, 0.5, 1.5), "1.00 [0.50, 1.50]")])
def test_bands(found: tuple[float, float, float], text: str) -> None:
    assert page.band(found, 2) == text
    assert page.band(dict(zip(("mean", "low", "high"), found, strict=True)), 2) == text


def test_the_stand_in_has_what_experiments_look_for(tmp_path: Path) -> None:
    folder = stand_in(tmp_path)
    text = (folder / "wikitext-2" / "test.txt").read_text(encoding="utf-8").splitlines()
    assert sum(len(line.split()) >= 128 for line in text) >= 24
    for name, rows in (("train", 8000), ("dev", 1200)):
        header, *lines = (folder / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        assert header == "sentence\tlabel"
        assert len(lines) >= rows
        assert {line.split("\t")[1] for line in lines} == {"0", "1"}
        assert all(len(line.split("\t")) == 2 for line in lines)
    written = (folder / "sst2" / "dev.tsv").stat().st_mtime_ns
    assert stand_in(tmp_path) == folder
    assert (folder / "sst2" / "dev.tsv").stat().st_mtime_ns == written
