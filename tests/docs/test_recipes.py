"""CONTRIBUTING: its picture, its walk and its recipes are those of the code."""

import re
import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from pages import ROOT, blocks
from test_imports import FLOORS

import lightning_qk
from lightning_qk import AttentionMonitor, head_projections
from lightning_qk.functional import AttentionLogits
from lightning_qk.heads import layouts
from lightning_qk.record import statistics
from lightning_qk.record.statistics import describe

PAGE = "CONTRIBUTING.md"
LAYOUT, STATISTIC, MONITOR = blocks(PAGE, "python")


def test_the_picture_has_every_package_and_no_package_below_what_it_imports():
    (picture,) = blocks(PAGE, "text")
    drawn = [line.partition("|")[0].split() for line in picture.splitlines()]
    height = {room: -row for row, rooms in enumerate(drawn) for room in rooms}
    floors = [{room for room in floor if not room.startswith("_") and room != "tasks"} for floor in FLOORS]
    floors = [floor for floor in floors if floor]
    assert set(height) == set().union(*floors)
    for below, above in pairwise(floors):
        assert max(height[room] for room in below) < min(height[room] for room in above)


def test_every_stop_of_the_walk_is_there():
    stops = re.findall(r"^\d+\. `([\w/.]+)`: `([\w.]+)`", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert 0 < len(stops) <= 12
    package = Path(lightning_qk.__file__).parent
    for path, name in stops:
        text = (package / path).read_text()
        for part in name.split("."):
            assert re.search(rf"^\s*(def|class) {part}\b", text, re.MULTILINE), (path, name)


def test_a_query_passes_every_stop_of_the_walk(tmp_path: Path):
    package = Path(lightning_qk.__file__).parent
    stops = re.findall(r"^\d+\. `([\w/.]+)`: `(?:\w+\.)?(\w+)`", (ROOT / PAGE).read_text(), re.MULTILINE)
    passed: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_name in names:
            path = Path(frame.f_code.co_filename)
            if package in path.parents:
                passed.append((path.relative_to(package).as_posix(), frame.f_code.co_name))

    names = {name for _, name in stops}
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[AttentionMonitor(1, figures_every=0, report=False)],
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    job, data = models.Job(models.llama()), models.tokens(4)
    sys.setprofile(note)
    try:
        trainer.fit(job, data)
    finally:
        sys.setprofile(None)
    ordered = iter(passed)
    assert [stop for stop in stops if stop not in ordered] == []


def test_a_layout_is_one_line(monkeypatch: pytest.MonkeyPatch):
    model = models.llama()
    want = head_projections(model)
    for module in model.modules():
        if "q_proj" in module._modules:
            module.my_query, module.my_key = module._modules.pop("q_proj"), module._modules.pop("k_proj")
    with pytest.raises(ValueError, match="expected"):
        head_projections(model)
    namespace: dict = {}
    exec(LAYOUT, namespace)
    monkeypatch.setattr(layouts, "LAYOUTS", (*layouts.LAYOUTS, namespace["layout"]))
    found = head_projections(model)
    assert list(found) == list(want)
    for name in want:
        assert torch.equal(found[name].query, want[name].query)
        assert torch.equal(found[name].key, want[name].key)


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the recipe of a statistic defines; the table is as before afterwards."""
    found: dict = {"__name__": "recipe"}
    exec(STATISTIC, found)
    one = found["statistic"]
    monkeypatch.setattr(statistics, "_ALL", (*statistics._ALL, one))
    monkeypatch.setattr(statistics, "STATISTICS", {**statistics.STATISTICS, f"{one.group}/{one.name}": one})
    return found


def test_a_statistic_is_an_entry_and_a_function(namespace: dict):
    assert describe("decided").share
    query, key = torch.randn(2, 2, 3, 7, 4).unbind()
    sums = namespace["decided_sums"](AttentionLogits.of(query, key, is_causal=True))
    logits = (query @ key.mT / 2).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    want = (logits.softmax(-1).amax(-1) > 0.5).double().mean((0, 2))
    assert torch.allclose(sums.means(per_sequence=False)[0].double(), want)


def test_a_monitor_is_one_class(namespace: dict, tmp_path: Path):
    exec(MONITOR, namespace)
    monitor = namespace["DecisionMonitor"](1, per_layer=True, figures_every=0, report=False)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(models.Job(models.llama()), models.tokens(4))
    assert 0 < float(trainer.callback_metrics["attn/decided/mean"]) <= 1
    assert list(monitor.history.layers) == ["layer_00", "layer_01"]
