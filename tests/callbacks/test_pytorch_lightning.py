"""The callbacks in jobs of the package pytorch_lightning, whose classes are not those of lightning."""

import csv
import json
import subprocess
import sys

import lightning
import models
import pytest
import torch

import lightning_qk
from lightning_qk import AttentionMonitor, AttentionProbes, HiddenStateMonitor, QKSpectrumMonitor
from lightning_qk._packages import either, is_lightning
from lightning_qk.callbacks.callback import Callback
from lightning_qk.callbacks.monitors._report import RECORD_NAME
from lightning_qk.record.history import RunRecord

pl = pytest.importorskip(
    "pytorch_lightning",
    reason="the package pytorch_lightning is not installed: pip install pytorch-lightning",
)


def job(package) -> object:
    """The same job, written with one package or the other."""

    class Job(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = models.gpt2()
            self.losses = []

        def training_step(self, batch, batch_idx):
            loss = self.network(input_ids=batch, labels=batch).loss
            self.losses.append(loss.detach().clone())
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.network(input_ids=batch, labels=batch).loss)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    package.seed_everything(3, verbose=False)
    return Job()


def trainer(package, callbacks, **kwargs):
    arguments = {
        "max_steps": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "val_check_interval": 2,
        **kwargs,
    }
    given = list(callbacks) if isinstance(callbacks, list) else callbacks  # the trainer appends its own
    return package.Trainer(callbacks=given, **arguments)


def monitors() -> list:
    return [QKSpectrumMonitor(), AttentionMonitor(rows=None), HiddenStateMonitor(), AttentionProbes()]


def fit(package, callbacks, **kwargs):
    module, run = job(package), trainer(package, callbacks, **kwargs)
    run.fit(module, models.tokens(), models.tokens(8))
    return module, run


def test_numbers_are_those_under_lightning_and_losses_are_untouched(tmp_path):
    found = {}
    for package in (lightning.pytorch, pl):
        callbacks = monitors()
        logger = package.loggers.CSVLogger(tmp_path, name=package.__name__)
        module, run = fit(package, callbacks, logger=logger, enable_checkpointing=True)
        found[package] = callbacks, module, run, logger
    bare, _ = fit(pl, [])
    (own, _, first, _), (others, module, second, logger) = found.values()
    assert all(torch.equal(a, b) for a, b in zip(module.losses, bare.losses, strict=True))
    for one, other in zip(own, others, strict=True):
        assert one.history.steps == other.history.steps
        for name in one.history.statistics:
            torch.testing.assert_close(
                one.history.series(name), other.history.series(name), rtol=0, atol=0, equal_nan=True
            )
    assert first.callback_metrics.keys() == second.callback_metrics.keys()
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"qk/eig_var/mean", "attn/entropy/mean", "hidden/rank_residual/min"} <= rows[0].keys()
    record = RunRecord.load(f"{logger.log_dir}/{RECORD_NAME}")
    assert f"pytorch_lightning {pl.__version__}" in record.info["Versions"]


def test_a_resume_goes_on_with_the_history(tmp_path):
    steps = []
    for package in (lightning.pytorch, pl):
        _, run = fit(package, monitors())
        run.save_checkpoint(tmp_path / "last.ckpt")
        after = monitors()
        trainer(package, after, max_steps=6).fit(
            job(package), models.tokens(), models.tokens(8), ckpt_path=tmp_path / "last.ckpt"
        )
        steps.append([callback.history.steps for callback in after[:3]])
    assert steps[0] == steps[1]
    assert steps[1][0][:5] == [-1, 0, 1, 2, 3]
    assert [len(one) for one in steps[1]] == [7, 6, 6]


def test_one_callback_without_a_list():
    run = trainer(pl, QKSpectrumMonitor())
    assert isinstance(run.callbacks[0], pl.Callback)
    assert isinstance(run.callbacks[0], lightning.pytorch.Callback)


@pytest.mark.slow
def test_a_command_line_of_the_package_takes_every_callback(tmp_path):
    """In another process: here pytorch_lightning may have come first."""
    config = {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning_qk.QKSpectrumMonitor",
                    "init_args": {"modules": "*.h.0.*", "on_unreadable": "raise"},
                },
                {"class_path": "lightning_qk.AttentionMonitor", "init_args": {"modules": ["*.0.*", "*.1.*"]}},
            ],
            "logger": False,
            "accelerator": "cpu",
        }
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    code = f"""
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel
cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=["--config={tmp_path / "config.yaml"}"])
print([(type(c).__name__, c.modules, c.on_unreadable) for c in cli.trainer.callbacks[:2]])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == (
        "[('QKSpectrumMonitor', '*.h.0.*', 'raise'), ('AttentionMonitor', ['*.0.*', '*.1.*'], 'warn')]"
    )


def test_every_public_callback_is_one_of_both_packages():
    kinds = [getattr(lightning_qk, name) for name in lightning_qk.__all__]
    kinds = [
        kind for kind in kinds if isinstance(kind, type) and issubclass(kind, lightning.pytorch.Callback)
    ]
    assert len(kinds) > 10
    QKSpectrumMonitor()  # joins, where pytorch_lightning came later
    missing = [
        kind.__name__ for kind in kinds if issubclass(kind, Callback) and not issubclass(kind, pl.Callback)
    ]
    assert missing == []


@pytest.mark.parametrize("package", [lightning.pytorch, pl])
def test_classes_are_told_by_name_and_home(package):
    strategy = package.strategies.SingleDeviceStrategy("cpu")
    assert is_lightning(strategy, "SingleDeviceStrategy")
    assert isinstance(strategy, either("Strategy"))
    assert not isinstance(strategy, either("DDPStrategy", "FSDPStrategy"))

    class SingleDeviceStrategy:
        """A user's own of the same name."""

    assert not is_lightning(SingleDeviceStrategy(), "SingleDeviceStrategy")
