"""Damaged and hostile records: a page, or one sentence that names the file."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import ESCAPE, change_one_value, status_of
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_qk.cli import main
from lightning_qk.record.history import History, LayerShape, RunRecord
from lightning_qk.record.snapshots import Snapshots


def a_record() -> RunRecord:
    torch.manual_seed(0)
    record = RunRecord(info={"Model": "M"}, notes=["a note"], events=[(1, "an alarm")], points={})
    for name, statistics in (
        (
            "spectrum",
            ("eig_mean", "eig_var", "trace", "trace_sq", "frobenius_sq", "propagation", "localization"),
        ),
        ("attention", ("entropy", "entropy_normalized", "max_abs_logit", "linear_share")),
    ):
        history = History(["layer_00", "layer_01"], [2, 2])
        for step in (0, 5, 9):
            history.append(step, {statistic: torch.rand(4) for statistic in statistics})
        setattr(record, name, history)
    record.eigenvalues = {"layer_00": torch.randn(2, 4, dtype=torch.complex64)}
    record.eigenvalues_step = 9
    record.shapes = {"layer_00": LayerShape(4, 8, 0.5), "layer_01": LayerShape(4, 8, 0.5)}
    record.scalars = {"locater/penalty": ([1, 2], [0.5, float("nan")])}
    eigenvalues, profile = Snapshots(), Snapshots()
    eigenvalues.append(0, record.eigenvalues)
    profile.append(0, {"layer_00": torch.rand(2, 5)})
    record.snapshots = {"eigenvalues": eigenvalues, "linear_profile": profile}
    return record


def parts(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["lightning_qk"]), {
            name: file.get_tensor(name) for name in list(file.keys())
        }


def damage(path: Path, source: random.Random) -> None:
    """One thing of a record becomes something else: a field, a tensor, or bytes of the file."""
    meta, tensors = parts(path)
    kind = source.choice(["meta"] * 5 + ["tensor", "bytes", "shape"])
    if kind == "meta":
        change_one_value(meta, source)
    elif kind == "tensor":
        del tensors[source.choice(sorted(tensors))]
    elif kind == "shape":
        name = source.choice(sorted(tensors))
        tensors[name] = source.choice(
            [torch.zeros(0), torch.ones(3, dtype=torch.int64), torch.full((1, 4), torch.nan)]
        )
    if kind == "bytes":
        data = bytearray(path.read_bytes())
        if source.random() < 0.5:
            data = data[: source.randrange(len(data))]
        for _ in range(4):
            data[source.randrange(len(data))] = source.randrange(256)
        path.write_bytes(bytes(data))
    else:
        save_file(tensors, path, metadata={"lightning_qk": json.dumps(meta)})


@pytest.mark.parametrize("part", range(4))
def test_mutations_of_a_record(part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = random.Random(part)
    statuses = []
    whole = a_record()
    for place in range(24):
        path = whole.save(tmp_path / f"record_{place}.safetensors")
        damage(path, source)
        arguments = ["report", str(path), "--output", str(tmp_path / "page.html"), "--parquet"]
        statuses.append(status_of(capsys, arguments, path.name))
    assert 2 in statuses


def test_what_a_record_holds_is_neither_markup_nor_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = a_record()
    record.info["Model"] = record.notes[0] = ESCAPE
    record.events = [(1, ESCAPE)]
    for history in record.histories.values():
        history.layers = (ESCAPE, "layer_01")
    path = record.save(tmp_path / "record.safetensors")
    assert main(["report", str(path)]) == 0
    seen = capsys.readouterr()
    assert "[red]" in seen.out
    assert not set(seen.out + seen.err) & {"\x1b", "\x07", "\u202e"}
    page = (tmp_path / "lightning_qk_report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
