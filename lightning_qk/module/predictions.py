"""Predictions of a model in a file: one row an input, whatever the number of processes."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from lightning_qk._printable import FORMULA
from lightning_qk.record.atomic_write import whole_file

_IGNORED = -100
"""The label of tokens that are not targets."""


class PredictionFile(BasePredictionWriter):
    """Writes what a :class:`~lightning_qk.TransformerModule` predicts, one row an input, in the order of the data.

    Columns: ``row``, the input's number in the data, from 0; ``text``, as the tokenizer gives it back; for
    classification ``label`` (where the data have one), ``prediction``, and ``probability of <class>`` for every
    class; for language modelling ``tokens`` (that were predicted), ``loss`` (nats a token) and ``accuracy``.

    Args:
        path: a file that ends in .parquet, .csv or .jsonl. Processes send their rows to the first one, which
            writes it whole at the end.

    Raises:
        ValueError: it ends in something else.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__("batch")
        self.path = Path(path).expanduser()
        if self.path.suffix.lower() not in _WRITERS:
            raise ValueError(
                f"expected a file for predictions that ends in {', '.join(_WRITERS)}, got {self.path.name!r}: "
                "rename it"
            )
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin without rows."""
        self._rows = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep a batch's rows."""
        size = len(prediction["predictions"])
        places = list(batch_indices) if batch_indices else range(len(self._rows), len(self._rows) + size)
        found: dict[str, list[Any]] = {"row": list(places)}
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None and "input_ids" in batch:
            found["text"] = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        labels = batch.get("labels")
        if "labels" in prediction:
            names = list(getattr(pl_module, "label_names", None) or [])
            found |= _classes(prediction, names, labels)
        elif labels is not None:
            causal = getattr(pl_module, "task", None) == "causal_lm"
            found |= _tokens(prediction["logits"], labels, shift=int(causal))
        self._rows += [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of all processes."""
        parts: list[Any] = [self._rows]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, self._rows)
        # Samplers fill up the last batch with inputs that another process has.
        rows = {row["row"]: row for part in parts for row in part}
        self._rows = []
        if trainer.is_global_zero:
            with whole_file(self.path) as partial:
                _WRITERS[self.path.suffix.lower()](partial, [rows[place] for place in sorted(rows)])
            rank_zero_info(f"lightning-qk: {len(rows)} predictions in {self.path}")


def _classes(prediction: dict[str, Any], names: list[str], labels: Tensor | None) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    if labels is not None:
        known = [0 <= label < len(names) for label in labels.tolist()]
        found["label"] = [names[i] if ok else None for i, ok in zip(labels.tolist(), known, strict=True)]
    found["prediction"] = list(prediction["labels"])
    shares = prediction["logits"].float().softmax(-1).T.tolist()
    return found | {f"probability of {name}": share for name, share in zip(names, shares, strict=True)}


def _tokens(logits: Tensor, labels: Tensor, *, shift: int) -> dict[str, list[Any]]:
    logits, labels = logits[:, : logits.shape[1] - shift].float(), labels[:, shift:]
    counted = labels != _IGNORED
    count = counted.sum(1)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none").sum(1)
    right = ((logits.argmax(-1) == labels) & counted).sum(1)
    some = count.clamp_min(1)
    return {
        "tokens": count.tolist(),
        "loss": torch.where(count > 0, loss / some, torch.nan).tolist(),
        "accuracy": torch.where(count > 0, right / some, torch.nan).tolist(),
    }


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["row"])
        writer.writeheader()
        for row in rows:
            # Cells that a spreadsheet shows and does not compute.
            formulas = {n: f"'{v}" for n, v in row.items() if isinstance(v, str) and v.startswith(FORMULA)}
            writer.writerow(row | formulas)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


_WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
