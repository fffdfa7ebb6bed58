"""The table of every head, read back."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from simulated_run import simulated_record

from lightning_qk.cli import main
from lightning_qk.record import parquet
from lightning_qk.record.forgotten import Forgotten
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.parquet import history_size, write_history


def test_every_value_of_every_head_comes_back(tmp_path: Path) -> None:
    record = simulated_record(layers=3, heads=4, points=5)
    record.hidden = History(["embedding", "layer_00"], [1, 1])
    record.hidden.append(0, {"cosine": torch.tensor([0.25, 0.5])})
    table = pq.read_table(write_history(record, tmp_path / "deep" / "h.parquet")).to_pandas()
    assert list(table.columns) == ["step", "layer", "layer_index", "head", "key", "value"]
    for history, prefix in ((record.spectrum, "qk"), (record.attention, "attn")):
        assert history is not None
        for statistic in history.statistics:
            own = table[table.key == f"{prefix}/{statistic}"]
            if statistic == "sink_learnt":
                assert own.empty  # NaN everywhere
                continue
            for row in own.itertuples():
                point = history.steps.index(row.step)
                assert row.value == history.grid(statistic, point)[int(row.layer_index), int(row.head)].item()
                assert history.layers[int(row.layer_index)] == row.layer
            assert len(own) == len(history) * 12
    hidden = table[table.key == "hidden/cosine"]
    assert hidden["head"].isna().all()
    assert list(hidden.layer) == ["embedding", "layer_00"]
    assert list(hidden.value) == [0.25, 0.5]
    curve = table[table.key == "locater/penalty"]
    assert curve.step.tolist() == [0, 10, 20]
    assert curve.value.tolist() == [3.0, 2.0, 1.5]
    assert curve.layer.isna().all()


def test_layers_of_different_sizes_and_heads_without_a_value(tmp_path: Path) -> None:
    history = History(["layer_00", "cross_layer_00"], [3, 2])
    history.append(7, {"entropy": torch.tensor([1.0, torch.nan, 3.0, torch.inf, 5.0])})
    table = pq.read_table(write_history(RunRecord(attention=history), tmp_path / "h.parquet")).to_pandas()
    assert table.layer.tolist() == ["layer_00", "layer_00", "cross_layer_00", "cross_layer_00"]
    assert table["head"].tolist() == [0, 2, 0, 1]
    assert table.value.tolist() == [1.0, 3.0, float("inf"), 5.0]
    assert table.step.tolist() == [7] * 4


def test_one_key_is_read_without_the_others(tmp_path: Path) -> None:
    path = write_history(simulated_record(), tmp_path / "h.parquet")
    file = pq.ParquetFile(path)
    assert file.num_row_groups > 10
    own = pq.read_table(path, filters=[("key", "==", "qk/eig_var")])
    assert own.num_rows == 5 * 12
    assert set(own.column("key").to_pylist()) == {"qk/eig_var"}


def test_an_empty_record_is_an_empty_table(tmp_path: Path) -> None:
    assert pq.read_table(write_history(RunRecord(), tmp_path / "h.parquet")).num_rows == 0


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_history(simulated_record(), tmp_path / "h.parquet")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = simulated_record().save(tmp_path / "lightning_qk_record.safetensors")
    assert main(["report", str(record), "--parquet"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("lightning_qk_history.parquet")
    assert pq.read_table(tmp_path / "lightning_qk_history.parquet").num_rows > 0
    assert main(["report", str(record), "--parquet", str(tmp_path / "own.parquet")]) == 0
    assert (tmp_path / "own.parquet").is_file()


def test_a_long_run_is_written_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_MOST_VALUES", 20)
    history = History(["layer_00", "layer_01"], [2, 1], max_points=4)
    history.forgotten = Forgotten()
    for step in range(0, 1000, 10):
        history.append(step, {"entropy": torch.tensor([step, step + 0.5, -step])})
    record = RunRecord(attention=history)
    path = write_history(record, tmp_path / "h.parquet")
    file = pq.ParquetFile(path)
    groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    assert max(groups) == 18  # six steps of three heads
    assert sum(groups) == 300
    assert history_size(record) == 4 * 300
    table = file.read().to_pandas()
    assert table.step.tolist() == [step for step in range(0, 1000, 10) for _ in range(3)]
    assert table.value.tolist() == [value for s in range(0, 1000, 10) for value in (s, s + 0.5, -s)]
