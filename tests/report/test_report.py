"""The report as a file: nothing from outside, escaped, below its size, whole or not at all."""

import html
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed import unpack
from simulated_run import simulated_record

from lightning_qk.functional import circle_law_radius, circle_law_share, signal_propagation_probability
from lightning_qk.record.history import History, LayerShape, RunRecord
from lightning_qk.report.payload import LAW, THETA, evenly
from lightning_qk.report.report import MAX_BYTES, write_report


class Page(HTMLParser):
    """Tags with their attributes, and whether they nest; scripts by id."""

    VOID = ("meta", "link", "br", "img", "path", "rect", "line", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self.words: list[str] = []
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

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self.tags[-1][1].get("id")] = data
        else:
            self.words.append(data)

    def plots(self) -> list[str | None]:
        return [attrs["data-plot"] for _, attrs in self.tags if "data-plot" in attrs]

    def data(self) -> tuple[dict[str, Any], np.ndarray]:
        return unpack(self.scripts["data"])


def written(record: RunRecord, tmp_path: Path) -> str:
    return write_report(record, tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_every_part(tmp_path: Path) -> None:
    text = written(simulated_record(), tmp_path)
    page = Page(text)
    assert page.plots()[:8] == ["verdicts", "map", "map", "entropy", "propagation", "plane", "within", "time"]
    assert page.plots().count("time") == 4 + 4
    assert page.plots().count("scalar") == 2
    assert "<title>Attention report: GPT2LMHeadModel</title>" in text
    for words in ("GPT2LMHeadModel", "124,439,808", "layer_02 was captured without its mask.", "Bao et al."):
        assert words in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    anchors = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} == {f"#{anchor}" for anchor in anchors}
    assert all(attrs.get("aria-label") for _, attrs in page.tags if "data-plot" in attrs)
    assert 'class="hint">No' not in text


def test_predictions_are_drawn_against_what_was_measured(tmp_path: Path) -> None:
    record = simulated_record()
    attention = record.attention
    assert attention is not None
    predicted = History(attention.layers, attention.heads)
    measured = attention.values["entropy_normalized"][-1]
    predicted.append(attention.steps[-1], {"entropy_normalized": measured.square(), "sink_first": measured})
    record.histories = {**record.histories, "pred": predicted}
    text = written(record, tmp_path)
    page = Page(text)
    assert page.plots().count("predicted") == 1
    drawn = {one["name"] for one in page.data()[0]["histories"]["pred"]["statistics"]}
    assert "entropy_normalized" in drawn
    error = float((measured - measured.square()).abs().mean())
    assert f"normalized attention entropy 1.00 and {error:.3g}" in text
    record.histories = {name: one for name, one in record.histories.items() if name != "attention"}
    assert "predicted" not in Page(written(record, tmp_path)).plots()


def test_nothing_comes_from_outside(tmp_path: Path) -> None:
    text = written(simulated_record(), tmp_path)
    page = Page(text)
    assert not {"link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        for name in ("href", "src", "xlink:href", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith("#")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    record = RunRecord(info={"model": evil, evil: evil}, notes=[evil], points={0: evil})
    record.spectrum = History([evil], [1])
    record.spectrum.append(
        0, {"eig_mean": torch.ones(1), "sym_var": torch.ones(1), "frobenius_sq": torch.full((1,), torch.nan)}
    )
    record.scalars = {evil: ([0, 1], [1.0, 2.0])}
    text = written(record, tmp_path)
    assert "<script>alert" not in text
    assert html.escape("<script>alert(") in text
    assert Page(text).data()[0]["histories"]["spectrum"]["layers"] == [evil]


def test_the_data_are_those_of_the_record(tmp_path: Path) -> None:
    record = simulated_record()
    content, numbers = Page(written(record, tmp_path)).data()

    def array(where: list[int]) -> torch.Tensor:
        return torch.from_numpy(numbers[where[0] : where[0] + where[1]].copy())

    for name in ("spectrum", "attention"):
        raw, history = content["histories"][name], getattr(record, name)
        assert raw["layers"] == list(history.layers)
        assert raw["steps"] == history.steps
        shown = [one["name"] for one in raw["statistics"]]
        assert shown[0] == {"spectrum": "sym_var", "attention": "entropy_normalized"}[name]
        assert not any(one.endswith("_se") or one == "trace" for one in shown)
        for one in raw["statistics"]:
            want = history.series(one["name"]).T.reshape(-1)
            torch.testing.assert_close(array(one["values"]), want, rtol=2.5e-4, atol=0)
    newest = content["eigenvalues"][-1]
    assert newest["step"] == record.eigenvalues_step
    assert [entry["step"] for entry in content["eigenvalues"]] == [0, 20, 40]
    for label, part in zip(newest["layers"], newest["parts"], strict=True):
        assert part["mirrored"]
        real, imag = array(part["real"]), array(part["imag"])
        assert (imag >= 0).all()
        # Each conjugate pair counts twice.
        assert len(real) + int((imag > 0).sum()) == record.eigenvalues[label].numel()
        torch.testing.assert_close(
            (real * (1 + (imag > 0))).sum(), record.eigenvalues[label].real.sum(), rtol=1e-3, atol=1e-3
        )
        norm = record.spectrum.split(record.spectrum.values["frobenius_sq"][-1])[
            newest["layers"].index(label)
        ]
        torch.testing.assert_close(array(part["radius"]), circle_law_radius(norm, 64), rtol=2.5e-4, atol=0)
        torch.testing.assert_close(array(part["law"]), circle_law_share(LAW, 8, 64), rtol=2.5e-4, atol=1e-6)
    predicted = content["propagation"]["predicted"][-1]
    values = {name: record.spectrum.values[name][-1][4:8] for name in ("trace", "trace_sq", "frobenius_sq")}
    scale = 8**-0.5
    want = signal_propagation_probability(
        THETA[:, None],
        scale * values["trace"],
        scale**2 * values["trace_sq"],
        scale**2 * values["frobenius_sq"],
    )
    got = array(predicted["layers"]["layer_01"]).reshape(4, 20)
    torch.testing.assert_close(got, want.mT, rtol=2.5e-4, atol=1e-6)
    measured = content["propagation"]["measured"][-1]
    want = record.snapshots["linear_profile"].values[-1]["layer_02"].reshape(-1)
    torch.testing.assert_close(array(measured["layers"]["layer_02"]), want, rtol=2.5e-4, atol=0)


@pytest.mark.parametrize(
    "part", ["spectrum", "attention", "eigenvalues", "snapshots", "shapes", "scalars", "info", "notes"]
)
def test_missing_parts_are_left_out_with_what_to_add(part: str, tmp_path: Path) -> None:
    record = simulated_record()
    setattr(record, part, getattr(RunRecord(), part))
    if part == "eigenvalues":
        del record.snapshots["eigenvalues"]
    text = written(record, tmp_path)
    plots = Page(text).plots()
    sentences = {
        "spectrum": ("No spectrum statistics were recorded: add QKSpectrumMonitor()", "entropy"),
        "attention": ("No attention statistics were recorded: add AttentionMonitor()", "entropy"),
        "eigenvalues": ("No eigenvalues were recorded: add QKSpectrumMonitor()", "plane"),
        "snapshots": (
            "The linear share by position was not recorded: train with AttentionMonitor()",
            None,
        ),
        "shapes": ("Signal propagation of a random walk needs moments and softmax scale", None),
        "scalars": (None, "scalar"),
    }
    sentence, gone = sentences.get(part, (None, None))
    assert ('<p class="hint">' in text) == (sentence is not None)
    assert sentence is None or sentence in text
    assert gone is None or gone not in plots


def test_a_record_of_an_earlier_version_makes_a_page(tmp_path: Path) -> None:
    """Without shapes and snapshots; the width for the circle is found from the moments."""
    record = simulated_record()
    record.shapes, record.snapshots = {}, {}
    content, numbers = Page(written(record, tmp_path)).data()
    (entry,) = content["eigenvalues"]
    start, size = entry["parts"][0]["radius"]
    norm = record.spectrum.values["frobenius_sq"][-1][:4]
    np.testing.assert_allclose(numbers[start : start + size], (norm / 64).sqrt(), rtol=2.5e-4)
    assert content["propagation"]["predicted"] == []


def test_no_circle_where_the_width_is_unknown(tmp_path: Path) -> None:
    record = simulated_record()
    record.shapes, record.snapshots = {}, {}
    record.spectrum.values["eig_mean"][-1] = record.spectrum.values["trace"][-1] / 8
    content, numbers = Page(written(record, tmp_path)).data()
    part = content["eigenvalues"][0]["parts"][0]
    assert part["law"] is None
    assert np.isnan(numbers[part["radius"][0] : sum(part["radius"])]).all()


def test_an_empty_record_makes_a_page(tmp_path: Path) -> None:
    text = written(RunRecord(), tmp_path)
    page = Page(text)
    assert page.plots() == []
    assert "data" not in page.scripts
    assert "Nothing was recorded in this run." in text
    assert "add QKSpectrumMonitor or AttentionMonitor" in text
    assert len(text) < 50_000


def test_cross_attention_and_nan_everywhere(tmp_path: Path) -> None:
    record = simulated_record()
    for name, column in record.spectrum.values.items():
        if name != "frobenius_sq":
            column[-1][4:] = math.nan
    record.spectrum.append(99, {"singular_max": torch.ones(12), "frobenius_sq": torch.full((12,), torch.nan)})
    record.eigenvalues["layer_00"] = torch.full_like(record.eigenvalues["layer_00"], complex("nan"))
    text = written(record, tmp_path)
    assert "its weights hold NaN" in text
    assert "singular_max" in [
        one["name"] for one in Page(text).data()[0]["histories"]["spectrum"]["statistics"]
    ]


def test_the_same_record_makes_the_same_page(tmp_path: Path) -> None:
    assert written(simulated_record(), tmp_path) == written(simulated_record(), tmp_path)


def large_record(points: int, layers: int = 32, heads: int = 32) -> RunRecord:
    """Numbers that do not compress, unlike those of a run: the worst case."""
    record = simulated_record(layers=layers, heads=heads, points=3, d_head=4, d_model=16)
    assert record.spectrum is not None
    assert record.attention is not None
    for history in (record.spectrum, record.attention):
        names = [*history.statistics, "concentration", "distance", "logit_std", "max_prob", "participation"]
        for step in range(3, points):
            history.append(10 * step, {name: torch.rand(layers * heads) for name in names})
    upper = torch.randn(layers, heads, 64, dtype=torch.complex64)
    spectra = dict(zip(record.spectrum.layers, torch.cat([upper, upper.conj()], -1), strict=True))
    record.shapes = {label: LayerShape(128, 4096, 128**-0.5) for label in spectra}
    record.eigenvalues, record.eigenvalues_step = spectra, record.spectrum.steps[-1]
    record.snapshots["eigenvalues"].append(record.eigenvalues_step, spectra)
    return record


@pytest.mark.parametrize("points", [60, 256])
def test_size_and_time_for_a_large_model(points: int, tmp_path: Path) -> None:
    record = large_record(points)
    start = time.process_time()
    path = write_report(record, tmp_path / "report.html")
    # 3 s where this was written.
    assert time.process_time() - start < 20
    assert path.stat().st_size < MAX_BYTES
    text = path.read_text(encoding="utf-8")
    raw = Page(text).data()[0]["histories"]["spectrum"]
    assert len(raw["steps"]) == 60
    assert raw["steps"][-1] == 10 * (points - 1)
    assert ("60 are drawn, evenly chosen" in text) == (points > 60)


@pytest.mark.slow
def test_size_for_a_very_large_model(tmp_path: Path) -> None:
    path = write_report(large_record(256, layers=80, heads=64), tmp_path / "report.html")
    assert path.stat().st_size < MAX_BYTES
    assert "drawn, evenly chosen" in path.read_text(encoding="utf-8")


def test_evenly() -> None:
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(100, 1) == [99]
    assert evenly(101, 3) == [0, 50, 100]


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


def test_models_side_by_side(tmp_path: Path) -> None:
    record = simulated_record(points=2)
    record.attention = None
    record.points = {0: "base", 10: "tuned"}
    text = written(record, tmp_path)
    assert "Weights of 12 heads in 3 layers in base, tuned." in text
    assert Page(text).data()[0]["points"] == {"0": "base", "10": "tuned"}


def test_an_odd_spectrum_is_not_mirrored(tmp_path: Path) -> None:
    """Eigenvalues that do not come in conjugate pairs are all carried."""
    record = RunRecord(
        eigenvalues={"a": torch.tensor([[1 + 1j, 2 + 0j, 3 + 3j]])},
        shapes={"a": LayerShape(3, 9, 1.0)},
        eigenvalues_step=4,
    )
    part = Page(written(record, tmp_path)).data()[0]["eigenvalues"][0]["parts"][0]
    assert not part["mirrored"]
    assert part["counts"] == [3]
