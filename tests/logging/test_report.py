"""The report: one file, nothing from outside, escaped, whole or not at all."""

import html
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from simulated_run import simulated_record

from lightning_qk.logging import report
from lightning_qk.logging.history import History, RunRecord
from lightning_qk.logging.report import write_report


class Page(HTMLParser):
    """Tags with their attributes, and whether they nest."""

    VOID = ("meta", "link", "br", "img", "path", "use", "rect", "image", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def written(record: RunRecord, tmp_path: Path) -> str:
    return write_report(record, tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_every_part(tmp_path: Path) -> None:
    text = written(simulated_record(), tmp_path)
    page = Page(text)
    assert page.count("svg") == page.count("figure") == page.count("figcaption") == 18
    assert page.count("tr") == 1 + 3
    assert "<title>Attention report: GPT2LMHeadModel</title>" in text
    for words in ("GPT2LMHeadModel", "124,439,808", "layer_02 was captured without its mask.", "Bao et al."):
        assert words in text
    anchors = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert anchors == {"health", "spectrum", "attention", "heads", "theory", "eigenvalues", "penalty"}
    assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} == {f"#{anchor}" for anchor in anchors}
    pictures = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(pictures) == 18
    assert all(len(attrs["aria-label"] or "") > 30 for attrs in pictures)


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    text = written(simulated_record(), tmp_path)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        for name in ("href", "src", "xlink:href", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique(tmp_path: Path) -> None:
    page = Page(written(simulated_record(), tmp_path))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    record = RunRecord(info={"model": evil, evil: evil}, notes=[evil])
    record.spectrum = History([evil], [1])
    record.spectrum.append(0, {"eig_mean": torch.ones(1), "sym_var": torch.ones(1)})
    record.scalars = {evil: ([0, 1], [1.0, 2.0])}
    text = written(record, tmp_path)
    assert "<script" not in text
    assert html.escape("<script>alert(") in text
    Page(text)


@pytest.mark.parametrize("part", ["spectrum", "attention", "eigenvalues", "scalars", "info", "notes"])
def test_missing_parts_are_left_out(part: str, tmp_path: Path) -> None:
    record = simulated_record()
    setattr(record, part, getattr(RunRecord(), part))
    text = written(record, tmp_path)
    Page(text)
    sentence = {
        "spectrum": "No spectrum statistics were recorded in this run.",
        "attention": "No attention statistics were recorded in this run.",
        "eigenvalues": "No eigenvalues were recorded in this run.",
    }.get(part)
    assert (sentence is None) == ('<p class="missing">' not in text)
    assert sentence is None or sentence in text


def test_an_empty_record_makes_a_page(tmp_path: Path) -> None:
    text = written(RunRecord(), tmp_path)
    assert Page(text).count("svg") == 0
    assert "Nothing was recorded in this run." in text


def test_cross_attention_and_nan_everywhere(tmp_path: Path) -> None:
    record = simulated_record()
    for name, column in record.spectrum.values.items():
        if name != "frobenius_sq":
            column[-1][4:] = math.nan
    record.spectrum.append(99, {"singular_max": torch.ones(12), "frobenius_sq": torch.full((12,), torch.nan)})
    record.eigenvalues["layer_00"][:] = complex("nan")
    text = written(record, tmp_path)
    Page(text)
    assert "largest singular value" in text
    assert "the weights of head 0 hold NaN" in text


def test_the_same_record_makes_the_same_page(tmp_path: Path) -> None:
    assert written(simulated_record(), tmp_path) == written(simulated_record(), tmp_path)


def test_size_and_time_for_a_large_model(tmp_path: Path) -> None:
    record = simulated_record(layers=32, heads=32, points=2, d_head=64, d_model=128)
    values = dict(
        zip(record.spectrum.statistics, [c[-1] for c in record.spectrum.values.values()], strict=True)
    )
    measured = {name: column[-1] for name, column in record.attention.values.items()}
    for step in range(3, 257):
        record.spectrum.append(10 * step, values)
        record.attention.append(10 * step, measured)
    assert len(record.spectrum) == 256
    start = time.perf_counter()
    path = write_report(record, tmp_path / "report.html")
    # 3 s where this was written.
    assert time.perf_counter() - start < 20
    assert path.stat().st_size < 5e6


def test_the_folder_is_made_and_the_path_returned(tmp_path: Path) -> None:
    path = write_report(RunRecord(), str(tmp_path / "a" / "b.html"))
    assert path == tmp_path / "a" / "b.html"
    assert path.exists()


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(RunRecord(), tmp_path / "report.html")
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(simulated_record(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_every_drawn_statistic_is_explained() -> None:
    wanted = {
        name
        for groups in (
            report._SPECTRUM_CURVES,
            report._ATTENTION_CURVES,
            report._SPECTRUM_MAPS,
            report._ATTENTION_MAPS,
        )
        for group in groups
        for name in group
    }
    assert wanted <= set(report._MEANING)
