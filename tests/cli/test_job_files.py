"""What a run of the command leaves and says: config, seed, versions, a last checkpoint, no lines to ignore."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_qk import __version__
from lightning_qk.cli import main
from lightning_qk.record.history import RunRecord

LOGGER = "lightning.pytorch.loggers.CSVLogger"
NOISE = ("Tip:", "LeafSpec", "FLOPs", "anonymous", "git root", "num_workers", "sync_dist", "Loading `train")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"line {index} of the text\n" for index in range(60)))
    job = {
        "model": {
            "task": "causal_lm",
            "model": {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16},
        },
        "data": {"source": "text.txt", "block_size": 16, "batch_size": 4, "cache_dir": "cache"},
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "limit_val_batches": 0,
            "logger": {"class_path": LOGGER, "init_args": {"save_dir": "logs"}},
            "callbacks": [
                {"class_path": "lightning_qk.AttentionMonitor"},
                {"class_path": "lightning_qk.LocAteR", "init_args": {"weight": 0.01}},
            ],
        },
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


def test_a_run_keeps_what_it_was(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--config", str(config), "--run_dir", "there", "--locater.weight", "0.02"]
    assert main(["fit", *args, "--seed_everything", "5"]) == 0
    said = capsys.readouterr()

    first = Path("there/lightning_logs/version_0")
    text = (first / "lightning_qk_config.yaml").read_text()
    assert f"lightning-qk {__version__}, torch {torch.__version__}" in text.splitlines()[0]
    assert text.splitlines()[1] == "# seed 5"
    assert yaml.safe_load(text)["seed_everything"] == 5
    assert not Path("logs").exists()
    assert step_of(first / "checkpoints/last.ckpt") == 3
    info = RunRecord.load(first / "lightning_qk_record.safetensors").info
    assert "source text.txt" in info["Data"]
    assert "rows: train " in info["Data"]
    assert info["Batch"] == "4 rows"
    assert info["Trainer"].startswith("at most 3 steps")
    assert info["LocAteR"] == "weight 0.02, sigma identity, form variance"
    settings = yaml.unsafe_load((first / "hparams.yaml").read_text())["lightning_qk"]
    assert settings["trainer"]["max_steps"] == 3
    assert settings["data"]["batch_size"] == 4
    assert settings["data"]["rows"]["train"] > 0
    assert not [word for word in NOISE if word in said.out + said.err]

    # The next run goes on from it, in a folder of its own.
    assert main(["fit", *args, "--ckpt_path", "last", "--trainer.max_steps", "5"]) == 0
    assert step_of(Path("there/lightning_logs/version_1/checkpoints/last.ckpt")) == 5
    assert (Path("there/lightning_logs/version_1") / "lightning_qk_config.yaml").is_file()


def test_without_a_checkpoint_nothing_starts_anew(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 2
    said = capsys.readouterr().err
    assert "logs/lightning_logs, got none: name a file, or leave the option out to start a new run" in said
    assert not Path("logs").exists()


def test_a_misspelt_checkpoint_is_told_before_the_data_are_read(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "--config", str(config), "--ckpt_path", "lst.ckpt"]) == 2
    said = capsys.readouterr().err
    assert "after --ckpt_path, got no such file: lst.ckpt; correct it, or pass 'last'" in said
    assert not Path("cache").exists()


def test_a_run_that_fails_leaves_its_last_checkpoint(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_qk import TransformerModule

    def fail(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise ValueError("enough")

    monkeypatch.setattr(TransformerModule, "on_train_batch_end", fail)
    assert main(["fit", "--config", str(config)]) == 1
    assert step_of(Path("logs/lightning_logs/version_0/checkpoints/last.ckpt")) == 2
