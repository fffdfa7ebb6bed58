"""What reaches the real loggers, read back from what they wrote."""

import csv
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from wandb_reader import read_wandb_run

from lightning_qk.loggers.loggers import (
    MAX_BINS,
    describe_config,
    log_alert,
    log_file,
    log_histogram,
    log_png,
    log_scalars,
)
from lightning_qk.record.history import History
from lightning_qk.report.figures import heatmap, to_png


def trainer_with(*loggers: Any, is_global_zero: bool = True) -> Any:
    return SimpleNamespace(loggers=list(loggers), is_global_zero=is_global_zero)


@pytest.fixture
def figure() -> Any:
    history = History(["layer_00", "layer_01"], [2, 2])
    history.append(5, {"entropy_normalized": torch.rand(4)})
    return heatmap(history, "entropy_normalized")


@pytest.fixture
def wandb_logger(tmp_path: Path) -> Iterator[WandbLogger]:
    import wandb

    yield WandbLogger(project="test", save_dir=tmp_path, offline=True)
    wandb.finish()


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Reporter(Callback):
    """Uses every function, several keys a step, as a monitor does."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        describe_config(trainer, {"Reporter": {"every_n_steps": 2, "modules": ("a", "b"), "path": Path("x")}})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        step = trainer.global_step
        if step % 2:
            return
        log_scalars(trainer, {"qk/eig_var/mean": float(step), "qk/eig_mean/mean": math.nan}, step)
        log_scalars(trainer, {"attn/entropy/mean": 1.5}, step)
        log_png(trainer, "qk/heatmap/eig_var", to_png(self.figure), step)
        log_histogram(trainer, "qk/eigenvalues", torch.linspace(-1, 1, 1000), step)


def fit(loggers: list[Logger], figure: Any, tmp_path: Path) -> None:
    trainer = Trainer(
        max_steps=6,
        logger=loggers,
        log_every_n_steps=1,
        accelerator="cpu",
        callbacks=[Reporter(figure)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Tiny(), torch.utils.data.DataLoader(torch.ones(6, 2), batch_size=1))


def test_wandb_holds_rows_images_histograms_and_settings(
    wandb_logger: WandbLogger, figure: Any, tmp_path: Path
) -> None:
    import wandb

    fit([wandb_logger], figure, tmp_path)
    wandb.finish()
    run = read_wandb_run(tmp_path)

    assert run.column("qk/eig_var/mean") == [(0, 0.0), (2, 2.0), (4, 4.0)]
    assert [step for step, _ in run.column("attn/entropy/mean")] == [0, 2, 4]
    assert all("qk/eig_mean/mean" not in row for row in run.history)
    # Nothing was dropped, and our rows lie in order among Lightning's.
    assert [step for step, _ in run.column("train/loss")] == [0, 1, 2, 3, 4, 5]
    steps = [row["trainer/global_step"] for row in run.history]
    assert steps == sorted(steps)
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))

    images = run.column("qk/heatmap/eig_var")
    assert [step for step, _ in images] == [0, 2, 4]
    for _, image in images:
        (name,) = image["filenames"]
        assert name in run.files
        with Image.open(run.directory / "files" / name) as picture:
            assert picture.size == (image["width"], image["height"])
            assert len(picture.convert("RGB").getcolors(100_000)) > 20
    for _, histogram in run.column("qk/eigenvalues"):
        assert histogram["_type"] == "histogram"
        assert len(histogram["values"]) <= MAX_BINS
        assert sum(histogram["values"]) == 1000

    assert run.config["lightning_qk"]["Reporter"] == {"every_n_steps": 2, "modules": ["a", "b"], "path": "x"}
    for section in ("qk/*", "attn/*", "locater/*"):
        assert run.metrics[section] == "trainer/global_step"


def test_wandb_run_handed_over_and_prefixed_gets_its_axes(tmp_path: Path) -> None:
    import wandb

    run = wandb.init(project="test", dir=tmp_path, mode="offline")
    logger = WandbLogger(experiment=run, prefix="a")
    log_scalars(trainer_with(logger), {"qk/eig_var/mean": 1.0}, 7)
    wandb.finish()
    read = read_wandb_run(tmp_path)
    assert read.metrics["a-qk/*"] == "trainer/global_step"
    assert read.column("a-qk/eig_var/mean") == [(7, 1.0)]


def test_tensorboard_and_csv_in_one_job(figure: Any, tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    fit([board, table], figure, tmp_path)

    events = EventAccumulator(board.log_dir, size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    scalars = events.Scalars("qk/eig_var/mean")
    assert [(event.step, event.value) for event in scalars] == [(0, 0.0), (2, 2.0), (4, 4.0)]
    assert "qk/eig_mean/mean" not in events.Tags()["scalars"]
    images = events.Images("qk/heatmap/eig_var")
    assert [event.step for event in images] == [0, 2, 4]
    assert all(image.width > 100 for image in images)
    histograms = events.Histograms("qk/eigenvalues")
    assert [event.step for event in histograms] == [0, 2, 4]
    assert histograms[0].histogram_value.num == 1000

    with open(Path(table.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = [(int(row["step"]), float(row["qk/eig_var/mean"])) for row in rows if row["qk/eig_var/mean"]]
    assert logged == [(0, 0.0), (2, 2.0), (4, 4.0)]
    for folder in (board.log_dir, table.log_dir):
        settings = yaml.safe_load((Path(folder) / "hparams.yaml").read_text())
        assert settings["lightning_qk"]["Reporter"]["modules"] == ["a", "b"]


def test_mlflow_keeps_scalars_settings_pictures_and_files(
    figure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLflow's own database needs its whole package; the small one has files or a server.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    fit([logger], figure, tmp_path)
    table = tmp_path / "lightning_qk_history.parquet"
    table.write_bytes(b"PAR1")
    taken = log_file(trainer_with(logger), table, name="history", kind="history", description="Every head.")
    assert taken == ["MLFlowLogger"]

    from mlflow.tracking import MlflowClient

    client, run_id = MlflowClient(f"file:{tmp_path / 'mlruns'}"), logger.run_id
    assert run_id is not None
    scalars = client.get_metric_history(run_id, "qk/eig_var/mean")
    assert [(each.step, each.value) for each in scalars] == [(0, 0.0), (2, 2.0), (4, 4.0)]
    assert client.get_metric_history(run_id, "qk/eig_mean/mean") == []
    assert client.get_run(run_id).data.params["lightning_qk/Reporter/every_n_steps"] == "2"
    pictures = client.list_artifacts(run_id, "qk/heatmap/eig_var")
    assert [Path(each.path).name for each in pictures] == [f"step_0000000{step}.png" for step in (0, 2, 4)]
    with Image.open(client.download_artifacts(run_id, pictures[0].path, str(tmp_path))) as picture:
        assert picture.size[0] > 100
    (file,) = client.list_artifacts(run_id, "lightning_qk")
    assert file.path == "lightning_qk/lightning_qk_history.parquet"
    # It has no histograms.
    log_histogram(trainer_with(logger), "qk/eigenvalues", [1.0, 2.0], 12)
    assert "qk/eigenvalues" not in client.get_run(run_id).data.metrics


def test_other_loggers_get_scalars_and_settings_and_nothing_that_they_cannot_show(
    figure: Any, tmp_path: Path
) -> None:
    class Other(Logger):
        """One that Lightning does not bring."""

        name = version = "other"
        experiment = None

        def __init__(self) -> None:
            self.rows: list[tuple[int | None, dict[str, float]]] = []
            self.settings: dict[str, Any] = {}

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

        def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
            self.settings.update(params)

    logger = Other()
    fit([logger], figure, tmp_path)
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1")
    assert log_file(trainer_with(logger), file, name="x", kind="x", description="x") == []
    ours = [row for row in logger.rows if "qk/eig_var/mean" in row[1]]
    assert ours == [(step, {"qk/eig_var/mean": float(step)}) for step in (0, 2, 4)]
    assert all(isinstance(value, float | int) for _, row in logger.rows for value in row.values())
    assert logger.settings["lightning_qk"]["Reporter"]["every_n_steps"] == 2


def test_an_alert_reaches_wandb_alone(wandb_logger: WandbLogger, tmp_path: Path) -> None:
    import wandb

    assert log_alert(trainer_with(wandb_logger, CSVLogger(tmp_path)), "CollapseGuard", "step 3: look")
    assert not log_alert(trainer_with(CSVLogger(tmp_path)), "CollapseGuard", "step 3: look")
    assert not log_alert(trainer_with(wandb_logger, is_global_zero=False), "CollapseGuard", "step 3: look")
    wandb.finish()
    assert read_wandb_run(tmp_path).alerts == [("CollapseGuard", "step 3: look")]


def test_settings_of_several_callbacks_stay_beside_one_another(
    wandb_logger: WandbLogger, tmp_path: Path
) -> None:
    import wandb

    board, table = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    trainer = trainer_with(wandb_logger, board, table)
    describe_config(trainer, {"A": {"rows": 1}})
    describe_config(trainer, {"B": {"tau": 2.0}})
    describe_config(trainer, {"A": {"rows": 3}})
    expected = {"A": {"rows": 3}, "B": {"tau": 2.0}}
    assert board.hparams["lightning_qk"] == expected
    assert table.experiment.hparams["lightning_qk"] == expected
    wandb.finish()
    assert read_wandb_run(tmp_path).config["lightning_qk"] == expected


class Broken(CSVLogger):
    """Fails as often as asked, and counts the calls."""

    def __init__(self, folder: Path, failures: int) -> None:
        super().__init__(folder)
        self.left, self.calls = failures, 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            raise ConnectionError("no route\nto host")
        super().log_metrics(metrics, step)


def test_a_broken_logger_warns_once_and_is_left_alone(tmp_path: Path) -> None:
    broken, healthy = Broken(tmp_path / "a", failures=99), CSVLogger(tmp_path / "b")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            log_scalars(trainer_with(broken, healthy), {"qk/x": 1.0}, step)
    (warning,) = [str(item.message) for item in caught if item.category is RuntimeWarning]
    assert "\n" not in warning
    assert warning.startswith("Broken could not log scalars (no route to host)")
    assert "check the settings of Broken" in warning
    assert broken.calls == 3
    assert [row["step"] for row in healthy.experiment.metrics] == list(range(8))


def test_a_logger_that_recovers_goes_on(tmp_path: Path) -> None:
    flaky = Broken(tmp_path, failures=2)
    with pytest.warns(RuntimeWarning, match="could not log"):
        log_scalars(trainer_with(flaky), {"qk/x": 1.0}, 0)
    for step in range(1, 5):
        log_scalars(trainer_with(flaky), {"qk/x": 1.0}, step)
    assert [row["step"] for row in flaky.experiment.metrics] == [2, 3, 4]


def test_wandb_without_a_login_says_how_to_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = WandbLogger(save_dir=tmp_path)
    with pytest.warns(
        RuntimeWarning, match=r"WandbLogger could not log settings .*wandb login.*offline=True"
    ):
        describe_config(trainer_with(logger), {"x": 1})


def test_other_ranks_log_nothing(tmp_path: Path, figure: Any) -> None:
    logger = CSVLogger(tmp_path)
    trainer = trainer_with(logger, is_global_zero=False)
    log_scalars(trainer, {"qk/x": 1.0}, 0)
    describe_config(trainer, {"x": 1})
    log_png(trainer, "qk/heatmap", to_png(figure), 0)
    assert not list(tmp_path.iterdir())


def test_what_a_logger_of_ones_own_lacks_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(CSVLogger):
        pass

    trainer = trainer_with(CSVLogger(tmp_path), Own(tmp_path / "own"))
    with caplog.at_level("INFO"):
        for _ in range(2):
            describe_config(trainer, {"x": 1})
    (said,) = [record.getMessage() for record in caplog.records if "lightning-qk" in record.getMessage()]
    assert said == (
        "lightning-qk: Own gets numbers and settings; pictures and every head are in the run's files"
    )


def test_only_finite_numbers_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_scalars(trainer_with(logger), {"a": math.nan, "b": math.inf, "c": 2.0}, 0)
    log_scalars(trainer_with(logger), {"a": math.nan}, 1)
    assert logger.experiment.metrics == [{"c": 2.0, "step": 0}]


@pytest.mark.parametrize(
    ("values", "bins", "total"),
    [
        ([1.0, 1.0, 1.0], 1, 3),
        ([1.0, 1.0 + 1e-15], 1, 2),
        ([0.0, math.nan, math.inf, 1.0], 64, 2),
        (np.arange(5000), 64, 5000),
    ],
)
def test_awkward_histograms(
    wandb_logger: WandbLogger, tmp_path: Path, values: Any, bins: int, total: int
) -> None:
    import wandb

    log_histogram(trainer_with(wandb_logger), "qk/eigenvalues", values, 3)
    wandb.finish()
    ((step, histogram),) = read_wandb_run(tmp_path).column("qk/eigenvalues")
    assert step == 3
    assert len(histogram["values"]) == bins
    assert sum(histogram["values"]) == total


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from lightning_qk.architecture import labels\n"
        "from lightning_qk.loggers import loggers\n"
        "from lightning_qk.record import health\n"
        "from lightning_qk.report import figures, report\n"
        "print([m for m in ('lightning', 'wandb', 'matplotlib', 'jinja2', 'rich', 'tensorboard', 'PIL')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_wandb_stays_unimported_without_its_logger(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from lightning.pytorch.loggers import CSVLogger\n"
        "from lightning_qk.loggers.loggers import log_scalars, log_histogram\n"
        f"trainer = SimpleNamespace(is_global_zero=True, loggers=[CSVLogger({str(tmp_path)!r})])\n"
        "log_scalars(trainer, {'qk/x': 1.0}, 0)\n"
        "log_histogram(trainer, 'qk/h', [1.0, 2.0], 0)\n"
        "print('wandb' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
