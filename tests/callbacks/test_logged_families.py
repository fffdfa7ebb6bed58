"""Families choose what loggers get, and the one number of health is that of the table."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lightning_qk import AttentionMonitor, HiddenStateMonitor, QKSpectrumMonitor, SinkMonitor
from lightning_qk.callbacks.monitors import AttentionProbes, Monitor, PositionMonitor, TokenMonitor
from lightning_qk.record.families import OTHER
from lightning_qk.record.history import RunRecord
from lightning_qk.record.statistics import of_key
from lightning_qk.record.verdicts import healthy_share


class Keys(Logger):
    """Remembers what it is given."""

    name, version = "keys", 0

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def column(self, key: str) -> list[tuple[int, float]]:
        return [(step, row[key]) for step, row in self.rows if key in row]

    @property
    def families(self) -> set[str]:
        return {
            getattr(of_key(key), "family", OTHER)
            for _, row in self.rows
            for key in row
            if "loss" not in key and key != "epoch"
        }


def run(callbacks: list[Callback], folder: Path, **options: Any) -> tuple[Keys, Any]:
    logger = Keys()
    trainer = models.trainer(callbacks, logger=logger, default_root_dir=folder, **{"max_steps": 2, **options})
    trainer.fit(models.Job(), models.tokens(8), models.tokens(4))
    return logger, trainer


def test_loggers_get_the_families_asked_for_and_all_else_has_everything(tmp_path: Path) -> None:
    chosen = ["health", "entropy", "spectrum", "rank"]
    monitors = [
        AttentionMonitor(families=chosen, per_layer=True),
        QKSpectrumMonitor(families=chosen, per_head=True),
        HiddenStateMonitor(families=chosen),
        SinkMonitor(families=chosen),
    ]
    logger, trainer = run(monitors, tmp_path)
    assert logger.families == set(chosen)
    keys = {key for _, row in logger.rows for key in row}
    assert {"attn/health", "attn/layer_01/max_prob", "qk/layer_00/head_03/eig_var"} <= keys
    # What decides, and what is looked at later, has all of it.
    assert {"attn/max_logit/max", "attn/sink_output/mean", "hidden/activation_max/max"} <= set(
        trainer.callback_metrics
    )
    (path,) = tmp_path.rglob("lightning_qk_record.safetensors")
    record = RunRecord.load(path)
    assert record.attention is not None
    assert record.sinks is not None
    assert {"max_abs_logit", "sink_first"} <= set(record.attention.statistics)
    assert "sink_output" in record.sinks.statistics


def test_families_are_left_out(tmp_path: Path) -> None:
    left_out = ["moments", "theory", "tokens", "predictions"]
    tokens = TokenMonitor(exclude=left_out)
    logger, trainer = run([QKSpectrumMonitor(exclude=left_out), tokens], tmp_path)
    assert logger.families == {"spectrum"}
    # Predictions cost time of their own, and are not made.
    assert not any(key.startswith("pred/") for key in trainer.callback_metrics)
    assert not tokens._predictions.history.layers


@pytest.mark.parametrize(
    "monitor",
    [
        AttentionMonitor,
        QKSpectrumMonitor,
        HiddenStateMonitor,
        SinkMonitor,
        PositionMonitor,
        TokenMonitor,
        AttentionProbes,
    ],
)
def test_misspelt_families_are_refused(monitor: type[Monitor]) -> None:
    with pytest.raises(ValueError, match=r"expected families among .*, got 'logit': did you mean 'logits'\?"):
        monitor(families=["logit"])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"expected exclude among .*, got 'x': correct it"):
        monitor(exclude="x")  # type: ignore[call-arg]
    assert monitor(families="rank", exclude=["guard"]).settings()["families"] == ["rank"]  # type: ignore[call-arg]


def test_layers_of_a_family_that_is_not_logged_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'max_logit': add the family 'logits' to families"):
        AttentionMonitor(per_layer=["entropy", "max_logit"], families=["entropy"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_config_can_choose_families() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    chosen = {"families": ["health"], "exclude": "rank"}
    given = {"class_path": "lightning_qk.AttentionMonitor", "init_args": chosen}
    monitor = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert monitor.families == ("health",)
    assert monitor.exclude == ("rank",)


class Spoil(Callback):
    """Makes all logits of the first layer too large from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            pl_module.inner["network"].transformer.h[0].attn.c_attn.weight[:, :64] *= 10


def test_health_falls_with_the_heads_and_is_that_of_the_table(tmp_path: Path) -> None:
    # In front of the others, whose numbers of the same step count all the same.
    monitors: list[Callback] = [
        AttentionMonitor(rows=None),
        QKSpectrumMonitor(),
        HiddenStateMonitor(),
        Spoil(3),
    ]
    logger, trainer = run(monitors, tmp_path, max_steps=6)
    values = [value for _, value in logger.column("attn/health")]
    assert [step for step, _ in logger.column("attn/health")] == list(range(6))
    assert values[:3] == [1.0] * 3
    assert all(value == 0.5 for value in values[3:])
    (path,) = tmp_path.rglob("lightning_qk_record.safetensors")
    record = RunRecord.load(path)
    assert healthy_share(record) == values[-1] == float(trainer.callback_metrics["attn/health"])
    assert record.scalars["attn/health"] == (list(range(6)), values)


def test_health_goes_on_after_a_resume(tmp_path: Path) -> None:
    monitor = AttentionMonitor(report=False)
    run([monitor], tmp_path, max_steps=3)
    other = AttentionMonitor(report=False)
    other.load_state_dict(monitor.state_dict())
    record = RunRecord()
    other.contribute(record)
    assert record.scalars["attn/health"][0] == [0, 1, 2]
