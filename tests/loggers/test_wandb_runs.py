"""Whole offline W&B runs, read back from their files: keys, axes, summaries, settings, artifacts."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import models
import pyarrow.parquet as pq
import pytest
import wandb
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from transformers import AutoConfig, AutoModelForCausalLM
from wandb_reader import WandbRun, read_wandb_run, read_wandb_runs

from lightning_qk import (
    AttentionMonitor,
    CollapseGuard,
    HiddenStateMonitor,
    LocAteR,
    PositionMonitor,
    QKClip,
    QKSpectrumMonitor,
    SinkMonitor,
)
from lightning_qk.callbacks.monitors import TokenMonitor
from lightning_qk.loggers.loggers import WANDB_SECTIONS, WANDB_STEP
from lightning_qk.loggers.workspace import GROUPS
from lightning_qk.record.families import OTHER
from lightning_qk.record.statistics import of_key

LAYERS = HEADS = 32
# What W&B's documentation advises for one value and for one call, and its code for a histogram.
MOST_BYTES_OF_A_VALUE, MOST_BYTES_OF_A_ROW, MOST_BINS = 1_000_000, 25_000_000, 512


def everything() -> list[Callback]:
    return [
        QKSpectrumMonitor(),
        AttentionMonitor(),
        LocAteR(0.05),
        SinkMonitor(),
        PositionMonitor(),
        HiddenStateMonitor(),
        QKClip(),
        CollapseGuard(),
    ]


class Big(NamedTuple):
    run: WandbRun
    callbacks: list[Callback]
    folder: Path


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Big:
    """Every callback at its defaults on a model of 32 layers of 32 heads, with a validation and a test."""
    folder = tmp_path_factory.mktemp("big")
    config = AutoConfig.for_model(
        "llama",
        hidden_size=HEADS,
        head_dim=2,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=8,
        vocab_size=models.VOCABULARY,
    )
    job = models.Job(AutoModelForCausalLM.from_config(config))
    job.test_step = job.validation_step  # type: ignore[method-assign]
    callbacks = everything()
    trainer = models.trainer(
        callbacks,
        max_steps=2,
        logger=WandbLogger(project="big", save_dir=folder, offline=True),
        default_root_dir=folder,
        limit_val_batches=1,
        limit_test_batches=1,
    )
    try:
        trainer.fit(job, models.tokens(4), models.tokens(4))
        trainer.test(job, models.tokens(4), verbose=False)
    finally:
        wandb.finish()
    return Big(read_wandb_run(folder), callbacks, folder)


def test_fewer_than_300_keys(big: Big) -> None:
    keys = {key for row in big.run.history for key in row}
    assert len(keys) < 300
    # And yet each of these has its say.
    for key in (
        "qk/eig_var/mean",
        "qk/eig_var/max",
        "qk/layer_31/eig_var",
        "qk/heatmap/sym_var",
        "qk/eigenvalues/modulus",
        "qk/spectral_radius/max",
        "attn/entropy/min",
        "attn/layer_31/entropy",
        "attn/layer_00/max_logit",
        "attn/sink_output/mean",
        "attn/positional_share/mean",
        "attn/val/entropy/mean",
        "attn/test/entropy/mean",
        "hidden/layer_31/rank_residual_relative",
        "hidden/embedding/rank_residual_relative",
        "locater/penalty",
        "clip/gamma/min",
        "guard/score",
    ):
        assert key in keys, key
    assert not any("head_" in key for key in keys)


def test_pictures_are_files_and_values_are_small(big: Big) -> None:
    images = histograms = 0
    for row in big.run.history:
        sizes = {key: len(json.dumps(value)) for key, value in row.items()}
        assert max(sizes.values()) < MOST_BYTES_OF_A_VALUE
        assert sum(sizes.values()) < MOST_BYTES_OF_A_ROW
        for key, value in row.items():
            kind = value.get("_type") if isinstance(value, dict) else None
            if kind == "histogram":
                histograms += 1
                assert len(value["values"]) <= MOST_BINS
            elif "/heatmap/" in key:
                images += 1
                assert kind == "images/separated"
                assert set(value["filenames"]) <= set(big.run.files)
    assert images >= 9
    assert histograms >= 2


def test_axes_and_summaries(big: Big) -> None:
    run = big.run
    for section in ("qk/*", "attn/*", "hidden/*", "locater/*", "clip/*", "guard/*"):
        assert run.metrics[section] == WANDB_STEP
    for key, extreme in (
        ("attn/max_logit/max", max),
        ("qk/eig_var/max", max),
        ("qk/spectral_radius/max", max),
        ("clip/max_logit/max", max),
        ("guard/score", max),
        ("attn/entropy/min", min),
        ("hidden/rank_residual_relative/min", min),
        ("clip/gamma/min", min),
    ):
        assert run.metrics[key] == WANDB_STEP
        values = [value for _, value in run.column(key)]
        assert len(values) == 2
        assert run.summary[key] == pytest.approx({extreme.__name__: extreme(values), "last": values[-1]})
    for key in ("qk/eig_var/mean", "attn/layer_03/entropy", "locater/penalty"):
        assert run.summary[key] == pytest.approx(run.column(key)[-1][1])


def test_rows_are_in_order(big: Big) -> None:
    steps = [row[WANDB_STEP] for row in big.run.history if WANDB_STEP in row]
    assert steps == sorted(steps)
    assert [row["_step"] for row in big.run.history] == list(range(len(big.run.history)))
    assert [step for step, _ in big.run.column("qk/spectral_radius/max")] == [0, 1]


def test_settings_are_in_the_config(big: Big) -> None:
    settings = big.run.config["lightning_qk"]
    assert set(settings) == {"trainer", *(type(callback).__name__ for callback in big.callbacks)}
    assert settings["AttentionMonitor"]["rows"] == 64
    assert settings["AttentionMonitor"]["per_head"] is False
    assert settings["QKSpectrumMonitor"]["support"] == "model"
    assert settings["QKClip"]["cap"] == 100.0
    assert settings["CollapseGuard"]["action"] == "warn"


def test_the_artifact_holds_every_head(big: Big) -> None:
    ((name, files),) = big.run.artifacts.items()
    assert name.startswith("lightning_qk_history-")
    ((entry, path),) = files.items()
    assert entry == "lightning_qk_history.parquet"
    table = pq.read_table(path).to_pandas()
    expected = 0
    for callback, group in zip(big.callbacks, ("qk", "attn", None, "attn", "attn", "hidden"), strict=False):
        if group is None:
            continue
        history = callback.history  # type: ignore[attr-defined]
        for statistic in history.statistics:
            own = table[table.key == f"{group}/{statistic}"]
            values = history.series(statistic).flatten()
            values = values[~values.isnan()]
            assert own.value.tolist() == values.tolist(), statistic
            expected += len(values)
    assert expected >= 2 * LAYERS * HEADS * 20
    some = table[(table.key == "attn/entropy") & (table.layer == "layer_07") & (table["head"] == 5)]
    attention = next(callback for callback in big.callbacks if isinstance(callback, AttentionMonitor))
    assert attention.history is not None
    assert some.step.tolist() == attention.history.steps
    assert some.layer_index.tolist() == [7] * len(some)
    assert some.value.tolist() == [
        attention.history.grid("entropy", i)[7, 5].item() for i in range(len(some))
    ]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> WandbRun:
    """Spectra over tokens, and predictions beside what was measured, in a model of two layers."""
    folder = tmp_path_factory.mktemp("tokens")
    trainer = models.trainer(
        [TokenMonitor(predict_every=1), AttentionMonitor()],
        max_steps=2,
        logger=WandbLogger(project="tokens", save_dir=folder, offline=True),
        default_root_dir=folder,
        limit_val_batches=0,
    )
    try:
        trainer.fit(models.Job(), models.tokens())
    finally:
        wandb.finish()
    return read_wandb_run(folder)


def test_the_workspace_shows_keys_that_exist(big: Big, tokens: WandbRun) -> None:
    keys = {key for row in (*big.run.history, *tokens.history) for key in row}
    for group in GROUPS:
        for chart in group.charts:
            assert set(chart.keys) <= keys, chart
            if chart.regex:
                layers = 2 if "tokens" in chart.regex else LAYERS
                assert sum(bool(re.search(chart.regex, key)) for key in keys) == layers + (
                    "hidden" in chart.regex
                ), chart


def test_charts_of_tokens_and_predictions_have_values(tokens: WandbRun) -> None:
    shown = {key for group in GROUPS[-2:] for chart in group.charts for key in chart.keys}
    assert {key.split("/")[0] for key in shown} == {"qk", "pred", "attn"}
    for key in shown:
        column = tokens.column(key)
        if "/heatmap/" in key:
            assert all(set(picture["filenames"]) <= set(tokens.files) for _, picture in column), key
        else:
            assert [step for step, _ in column] == [0, 1], key
            assert all(math.isfinite(value) for _, value in column), key
        assert column, key
    for section in ("qk/tokens/*", "pred/*"):
        assert tokens.metrics[section] == WANDB_STEP
    # Rows of a step that come late, as the comparison does, are that step's.
    steps = [row[WANDB_STEP] for row in tokens.history if WANDB_STEP in row]
    assert steps == sorted(steps)


def test_every_key_is_in_a_family(big: Big, tokens: WandbRun) -> None:
    logged = {key for row in (*big.run.history, *tokens.history) for key in row}
    ours = {key for key in logged if any(key.startswith(section[:-1]) for section in WANDB_SECTIONS)}
    families = {key: getattr(of_key(key), "family", OTHER) for key in ours}
    assert OTHER not in families.values(), [key for key, family in families.items() if family == OTHER]
    assert {"health", "entropy", "spectrum", "tokens", "predictions", "guard", "interventions"} <= set(
        families.values()
    )


def test_health_is_in_the_summary_with_its_least(big: Big) -> None:
    values = [value for _, value in big.run.column("attn/health")]
    assert len(values) == 2
    assert big.run.summary["attn/health"] == {"min": min(values), "last": values[-1]}


@pytest.fixture
def finished() -> Iterator[None]:
    yield
    wandb.finish()


def small(folder: Path, **options: Any) -> L.Trainer:
    logger = WandbLogger(project="small", save_dir=folder, offline=True, id="same")
    checkpoints = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    return models.trainer(
        [QKSpectrumMonitor(), AttentionMonitor(), LocAteR(0.1), checkpoints, *options.pop("callbacks", ())],
        logger=logger,
        default_root_dir=folder,
        val_check_interval=2,
        max_epochs=-1,
        **{"enable_checkpointing": True, **options},
    )


def test_a_resumed_run_keeps_its_steps_in_order(tmp_path: Path, finished: None) -> None:
    data = models.tokens(24), models.tokens(4)
    small(tmp_path, max_steps=4).fit(models.Job(), *data)
    wandb.finish()
    (checkpoint,) = (tmp_path / "checkpoints").glob("*step=4.ckpt")
    trainer = small(tmp_path, max_steps=8)
    trainer.fit(models.Job(), *data, ckpt_path=checkpoint)
    wandb.finish()

    runs = read_wandb_runs(tmp_path)
    assert len(runs) == 2
    # This is what makes `wandb sync` append the second to the first.
    assert all(run.resumes and run.directory.name.endswith("-same") for run in runs)
    for run in runs:
        assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    rows = [row for run in runs for row in run.history]
    steps = [row[WANDB_STEP] for row in rows]
    assert steps == sorted(steps)
    for key in (
        "train/loss",
        "qk/eig_var/mean",
        "qk/spectral_radius/max",
        "attn/entropy/mean",
        "locater/penalty",
    ):
        assert [row[WANDB_STEP] for row in rows if key in row] == list(range(8)), key
    assert len([row for row in rows if "attn/val/entropy/mean" in row]) == 4
    ((_, path),) = next(iter(runs[1].artifacts.values())).items()
    table = pq.read_table(path, filters=[("key", "==", "qk/eig_var")]).to_pandas()
    assert sorted(set(table.step)) == list(range(-1, 8))


class Stopping(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_the_artifact_is_left_by_a_run_that_is_stopped(
    error: BaseException, tmp_path: Path, finished: None
) -> None:
    trainer = small(tmp_path, max_steps=8, callbacks=[Stopping(error)])
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(models.Job(), models.tokens(24), models.tokens(4))
    wandb.finish()
    ((_, path),) = next(iter(read_wandb_run(tmp_path).artifacts.values())).items()
    table = pq.read_table(path, filters=[("key", "==", "attn/entropy")]).to_pandas()
    assert sorted(set(table.step)) == [0, 1, 2]


def test_an_artifact_that_fails_is_one_warning(
    tmp_path: Path, finished: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(wandb.Artifact, "add_file", refuse)
    trainer = small(tmp_path, max_steps=2)
    with pytest.warns(RuntimeWarning, match=r"WandbLogger could not log the file .*no space left") as caught:
        trainer.fit(models.Job(), models.tokens(), models.tokens(4))
    assert len([w for w in caught if "no space left" in str(w.message)]) == 1
    assert trainer.global_step == 2
    (written,) = tmp_path.rglob("lightning_qk_history.parquet")
    assert pq.read_table(written).num_rows
    assert list(tmp_path.rglob("lightning_qk_report.html"))


def test_layers_on_request(tmp_path: Path, finished: None) -> None:
    logger = WandbLogger(project="layers", save_dir=tmp_path, offline=True)
    quiet: dict[str, Any] = {"report": False, "figures_every": 0}
    callbacks = [
        QKSpectrumMonitor(per_layer=False, **quiet),
        AttentionMonitor(per_layer=True, **quiet),
        HiddenStateMonitor(per_layer=["cosine", "token_norm"], report=False),
        SinkMonitor(per_layer="waiver_mass", **quiet),
        QKClip(per_layer=True),
    ]
    trainer = models.trainer(callbacks, max_steps=1, logger=logger, limit_val_batches=1)
    trainer.fit(models.Job(), models.tokens(4), models.tokens(4))
    wandb.finish()
    run = read_wandb_run(tmp_path)
    keys = {key for row in run.history for key in row if "layer_" in key}
    assert not any(key.startswith("qk/") for key in keys)
    hidden = {key for key in keys if key.startswith("hidden/")}
    assert hidden == {f"hidden/layer_0{i}/{name}" for i in range(2) for name in ("cosine", "token_norm")}
    assert {
        "attn/layer_01/participation",
        "attn/val/layer_01/participation",
        "attn/layer_00/waiver_mass",
    } <= keys
    assert not any("sink_output" in key for key in keys)
    assert {"clip/layer_00/gamma", "clip/layer_01/max_logit"} <= keys
    assert run.config["lightning_qk"]["HiddenStateMonitor"]["per_layer"] == ["cosine", "token_norm"]


@pytest.mark.parametrize("monitor", [QKSpectrumMonitor, AttentionMonitor, SinkMonitor, HiddenStateMonitor])
def test_an_unknown_statistic_is_refused(monitor: Any) -> None:
    with pytest.raises(ValueError, match=r"expected per_layer .* got 'entropi'"):
        monitor(per_layer=["entropi"])


def test_nothing_is_lost_of_a_number(big: Big) -> None:
    """Means in the run are those of the heads in the table."""
    ((_, path),) = next(iter(big.run.artifacts.values())).items()
    table = pq.read_table(path, filters=[("key", "==", "attn/entropy")]).to_pandas()
    for step, value in big.run.column("attn/entropy/mean"):
        assert math.isclose(table[table.step == step].value.mean(), value, rel_tol=1e-5)
