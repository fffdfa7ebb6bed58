"""What thinning takes out of a history, and the table that has it all the same."""

import pickle
from pathlib import Path

import models
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_qk import AttentionMonitor
from lightning_qk.callbacks.monitors import _watching
from lightning_qk.record.forgotten import Forgotten
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.parquet import write_history


def point(step: int) -> dict[str, torch.Tensor]:
    return {"entropy": torch.tensor([float(step), step + 0.5, -step]), "late": torch.full((3,), torch.nan)}


def thinned(steps: int) -> History:
    history = History(["layer_00", "layer_01"], [2, 1], max_points=4)
    history.forgotten = Forgotten()
    for step in range(steps):
        history.append(step, point(step))
        history.complete(step, {"late": torch.tensor([0.0, 1.0, float(step)])})
    return history


def test_every_step_is_in_the_table(tmp_path: Path) -> None:
    history = thinned(23)
    assert len(history) <= 5
    table = pq.read_table(write_history(RunRecord(attention=history), tmp_path / "h.parquet")).to_pandas()
    for key, of in (("attn/entropy", lambda s: [s, s + 0.5, -s]), ("attn/late", lambda s: [0.0, 1.0, s])):
        own = table[table.key == key]
        assert own.step.tolist() == [step for step in range(23) for _ in range(3)]
        assert own.value.tolist() == [value for step in range(23) for value in of(float(step))]


def test_a_run_that_was_set_back_has_its_steps_once(tmp_path: Path) -> None:
    history = thinned(23)
    for step in range(9, 30):
        history.append(step, {"entropy": torch.full((3,), 100.0 + step)})
    table = pq.read_table(write_history(RunRecord(attention=history), tmp_path / "h.parquet")).to_pandas()
    own = table[(table.key == "attn/entropy") & (table.layer == "layer_01")]
    # What the history itself had let go of before step 9 is there, and nothing of the steps that were taken back.
    assert own.step.tolist() == list(range(30))
    assert own.value.tolist() == [-float(s) for s in range(9)] + [100.0 + s for s in range(9, 30)]


def test_without_thinning_there_is_no_file() -> None:
    forgotten = thinned(3).forgotten
    assert forgotten is not None
    assert forgotten._file is None
    assert forgotten.places("entropy", 3)[0].tolist() == []


def test_it_does_not_travel() -> None:
    forgotten = pickle.loads(pickle.dumps(thinned(23).forgotten))
    assert forgotten.places("entropy", 3)[0].tolist() == []
    forgotten.keep(1, point(1))
    assert forgotten.places("entropy", 3)[0].tolist() == [1]


def test_a_long_run_keeps_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_watching, "History", lambda layers, heads: History(layers, heads, max_points=4))
    monitor = AttentionMonitor()
    trainer = models.trainer([monitor], max_steps=11, max_epochs=-1, logger=CSVLogger(tmp_path))
    trainer.fit(models.Job(), models.tokens())
    assert monitor.history is not None
    assert len(monitor.history) < 11
    (path,) = tmp_path.rglob("lightning_qk_history.parquet")
    table = pq.read_table(path, filters=[("key", "==", "attn/entropy")]).to_pandas()
    assert table.step.tolist() == [step for step in range(11) for _ in range(8)]


def test_a_full_disk_loses_later_points_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Forgotten()
    kept.keep(0, {"a": torch.tensor([1.0, 2.0])})
    file = kept._file

    class Full:
        def seek(self, *where: int) -> int:
            return file.seek(*where)  # type: ignore[union-attr]

        def write(self, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

        def read(self, size: int) -> bytes:
            return file.read(size)  # type: ignore[union-attr]

    kept._file = Full()  # type: ignore[assignment]
    for step in (1, 2, 3):
        kept.keep(step, {"a": torch.zeros(2)})
    assert kept.problem is not None
    assert "TMPDIR" in kept.problem
    steps, places = kept.places("a", 2)
    assert steps.tolist() == [0]
    assert kept.read(int(places[0]), 2).tolist() == [1.0, 2.0]  # type: ignore[union-attr]


def test_what_a_long_run_leaves_is_bounded(tmp_path: Path) -> None:
    history = History(["layer_00", "layer_01"], [2, 1])
    history.forgotten = Forgotten()
    record, sizes = RunRecord(attention=history), {}
    for step in range(3000):
        history.append(step, point(step))
        if step in (100, 1500, 2999):
            sizes[step] = record.save(tmp_path / "record.safetensors").stat().st_size
    assert len(history) <= history.max_points + 1
    assert sizes[2999] <= 3 * sizes[100]
    assert sizes[2999] <= 1.5 * sizes[1500]
    forgotten = history.forgotten
    assert len(forgotten) == 3000 - len(history)
    columns = (forgotten._steps, forgotten._kinds, forgotten._offsets)
    assert sum(column.itemsize for column in columns) == 20
    assert len(forgotten._names) == 1
