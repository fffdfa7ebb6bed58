"""Predictions in a file: equal to what the network gives, in the order of the data, from one process or two."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch

from lightning_qk import TextDataModule, TransformerModule
from lightning_qk.module import PredictionFile

TEXTS = ["=SUM(A1)", "good film", "bad film", "a film that is neither", "fine"] * 4
LABELS = ["pos", "neg", "neg", "pos", "pos"] * 4


def job(tmp_path: Path) -> tuple[TransformerModule, TextDataModule]:
    source = tmp_path / "train.tsv"
    source.write_text("text\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in zip(TEXTS, LABELS, strict=True)))
    data = TextDataModule(
        str(source),
        "sequence_classification",
        tokenizer="bytes",
        test_files=str(source),
        batch_size=3,
        cache_dir=str(tmp_path / "cache"),
    )
    fields = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    return TransformerModule({**fields, "intermediate_size": 16}, "sequence_classification"), data


def predicted(path: Path, module: Any, data: Any) -> None:
    trainer = L.Trainer(
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PredictionFile(path)],
    )
    trainer.predict(module, data, return_predictions=False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_row_an_input(tmp_path: Path, suffix: str) -> None:
    module, data = job(tmp_path)
    path = tmp_path / "out" / f"predictions{suffix}"
    predicted(path, module, data)
    rows = rows_of(path)
    module.eval()
    with torch.no_grad():
        logits = torch.cat(
            [
                module(**{name: value for name, value in batch.items() if name != "labels"}).logits
                for batch in data.predict_dataloader()
            ]
        )
    assert [int(row["row"]) for row in rows] == list(range(len(TEXTS)))
    assert [row["label"] for row in rows] == LABELS
    assert [row["prediction"] for row in rows] == [module.label_names[i] for i in logits.argmax(1).tolist()]
    for place, name in enumerate(module.label_names):
        want = logits.softmax(1)[:, place].tolist()
        assert [float(row[f"probability of {name}"]) for row in rows] == pytest.approx(want, abs=1e-6)
    # A spreadsheet would compute the first text.
    assert rows[0]["text"] == ("'=SUM(A1)" if suffix == ".csv" else "=SUM(A1)")


def test_another_kind_of_file_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"ends in .parquet, .csv, .jsonl, got 'p.xlsx'"):
        PredictionFile("p.xlsx")


def test_rows_of_two_processes_are_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler gives the second process an input of the first one's, to fill up its last batch."""
    writer = PredictionFile(tmp_path / "predictions.jsonl")
    trainer = SimpleNamespace(world_size=2, is_global_zero=True, datamodule=None)
    other = [{"row": 1, "prediction": "b"}, {"row": 0, "prediction": "a"}]

    def gather(parts: list[Any], own: list[Any]) -> None:
        parts[:] = [own, other]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    prediction = {"logits": torch.zeros(2, 2), "predictions": torch.zeros(2), "labels": ["a", "c"]}
    writer.write_on_batch_end(
        trainer, SimpleNamespace(label_names=["a", "c"]), prediction, [0, 2], batch, 0, 0
    )
    writer.on_predict_end(trainer, SimpleNamespace())
    assert [row["row"] for row in rows_of(writer.path)] == [0, 1, 2]
