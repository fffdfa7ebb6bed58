"""A few steps out of a long run: bounded, spread, never without the first and the newest."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_qk.record.history import LayerShape, RunRecord
from lightning_qk.record.snapshots import Snapshots


def filled(steps: range, max_points: int = 4) -> Snapshots:
    snapshots = Snapshots(max_points)
    for step in steps:
        snapshots.append(step, {"a": torch.tensor([float(step)])})
    return snapshots


def test_first_and_newest_stay_and_the_rest_is_spread() -> None:
    for count in (5, 17, 100, 1001):
        snapshots = filled(range(0, 10 * count, 10))
        assert len(snapshots) == 4
        assert snapshots.steps[0] == 0
        assert snapshots.steps[-1] == 10 * (count - 1)
        assert [values["a"].item() for values in snapshots.values] == snapshots.steps
    gaps = torch.tensor(snapshots.steps).diff()
    assert gaps.max() < 0.6 * snapshots.steps[-1]


def test_a_run_that_is_set_back_forgets_what_came_after() -> None:
    snapshots = filled(range(0, 40, 10))
    snapshots.append(15, {"a": torch.tensor([1.5])})
    assert snapshots.steps == [0, 10, 15]
    snapshots.append(15, {"a": torch.tensor([2.5])})
    assert snapshots.steps == [0, 10, 15]
    assert snapshots.values[-1]["a"].item() == 2.5


def test_state() -> None:
    snapshots = filled(range(3))
    again = Snapshots.from_state_dict(snapshots.state_dict())
    assert again.steps == snapshots.steps
    assert again.values[1]["a"].item() == 1
    with pytest.raises(ValueError, match="expected max_points of at least 2"):
        Snapshots(1)


def test_a_record_keeps_them(tmp_path) -> None:
    snapshots = Snapshots()
    values = torch.randn(2, 3, 4, dtype=torch.complex64)
    snapshots.append(-1, {"a": values[0], "b": values[1]})
    snapshots.append(9, {"a": values[1]})
    profile = Snapshots()
    profile.append(9, {"a": torch.rand(3, 10)})
    record = RunRecord(
        snapshots={"eigenvalues": snapshots, "linear_profile": profile},
        shapes={"a": LayerShape(4, 16, 0.5)},
        points={0: "base", 1: "tuned"},
    )
    again = RunRecord.load(record.save(tmp_path / "record.safetensors"))
    assert again.shapes == record.shapes
    assert again.points == record.points
    assert again.snapshots["eigenvalues"].steps == [-1, 9]
    for kind, kept in record.snapshots.items():
        for before, after in zip(kept.values, again.snapshots[kind].values, strict=True):
            assert list(before) == list(after)
            assert all(torch.equal(before[label], after[label]) for label in before)


def test_a_file_of_an_earlier_version_is_read(tmp_path) -> None:
    """Before there were snapshots, a record's file said nothing of them."""
    record = RunRecord(eigenvalues={"a": torch.ones(2, 3) + 0j}, eigenvalues_step=5, info={"model": "m"})
    path = record.save(tmp_path / "new.safetensors")
    with safe_open(str(path), framework="pt") as file:
        meta = json.loads(file.metadata()["lightning_qk"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    old = {name: value for name, value in meta.items() if name not in ("shapes", "points", "snapshots")}
    assert len(old) == len(meta) - 3
    save_file(tensors, tmp_path / "old.safetensors", metadata={"lightning_qk": json.dumps(old)})
    again = RunRecord.load(tmp_path / "old.safetensors")
    assert torch.equal(again.eigenvalues["a"], record.eigenvalues["a"])
    assert (again.shapes, again.points, again.snapshots) == ({}, {}, {})
