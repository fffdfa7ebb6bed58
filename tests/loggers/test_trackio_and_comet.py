"""What reaches Trackio and Comet, read back from what the real libraries wrote; skipped where there are none.

pip install trackio comet_ml
python -m pytest tests/loggers/test_trackio_and_comet.py
"""

import csv
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger

from lightning_qk import AttentionMonitor, CollapseGuard, HiddenStateMonitor, QKSpectrumMonitor
from lightning_qk.loggers import TrackioLogger
from lightning_qk.loggers.loggers import MAX_BINS, log_alert

STEPS = 4


def fit(logger: Logger, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """A job with a logger and CSV beside it: key → step and value, as CSV has them."""
    callbacks = [
        QKSpectrumMonitor(),
        AttentionMonitor(),
        HiddenStateMonitor(),
        CollapseGuard(every_n_steps=1),
    ]
    table = CSVLogger(folder / "csv")
    trainer = models.trainer(
        callbacks, max_steps=STEPS, logger=[logger, table], default_root_dir=folder, limit_val_batches=1
    )
    trainer.fit(models.Job(), models.tokens(), models.tokens(4))
    found: dict[str, list[tuple[int, float]]] = {}
    with open(Path(table.log_dir) / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("step", "epoch"):
                    found.setdefault(key, []).append((int(row["step"]), float(value)))
    return found


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library with a database of these tests: it finds out where that is when it is imported."""
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    yield pytest.importorskip("trackio")
    del os.environ["TRACKIO_DIR"]
    if before is not None:
        os.environ["TRACKIO_DIR"] = before


def test_trackio_has_the_keys_of_every_logger(tmp_path: Path, trackio: Any) -> None:
    logger = TrackioLogger("p", "one", save_dir=str(tmp_path), auto_log_cpu=False, auto_log_gpu=False)
    expected = fit(logger, tmp_path)
    trackio.finish()
    rows = trackio.SQLiteStorage.get_logs("p", "one")
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and key not in ("step", "epoch"):
                found.setdefault(key, []).append((row["step"], value))
    assert found.keys() == expected.keys()
    assert {"attn/health", "qk/eig_var/mean", "guard/score", "train/loss"} <= found.keys()
    for key, column in expected.items():
        assert [step for step, _ in found[key]] == [step for step, _ in column], key
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in column], rel=1e-6)

    pictures = [
        row["attn/heatmap/entropy_normalized"] for row in rows if "attn/heatmap/entropy_normalized" in row
    ]
    assert {picture["_type"] for picture in pictures} == {"trackio.image"}
    assert list(Path(os.environ["TRACKIO_DIR"]).rglob("*.png"))
    histograms = [row["qk/eigenvalues/modulus"] for row in rows if "qk/eigenvalues/modulus" in row]
    assert len(histograms) == STEPS
    assert all(one["_type"] == "trackio.histogram" and len(one["values"]) <= MAX_BINS for one in histograms)
    settings = trackio.SQLiteStorage.get_run_config("p", "one")["lightning_qk"]
    assert settings["AttentionMonitor"]["rows"] == 64
    (artifact,) = trackio.SQLiteStorage.get_artifacts("p")
    assert artifact["name"].startswith("lightning_qk_history-")
    # The run's own folder.
    assert (tmp_path / "p" / "one" / "lightning_qk_report.html").is_file()


def test_trackio_goes_on_with_a_run_and_takes_alerts(tmp_path: Path, trackio: Any) -> None:
    options: dict[str, Any] = {"auto_log_cpu": False, "auto_log_gpu": False}
    first = TrackioLogger("q", **options)
    first.log_metrics({"a": 1.0}, step=0)
    name = first.version
    copy = pickle.loads(pickle.dumps(first))
    trackio.finish()
    copy.log_metrics({"a": 2.0}, step=1)
    assert copy.version == name
    trainer: Any = SimpleNamespace(loggers=[copy], is_global_zero=True)
    assert log_alert(trainer, "CollapseGuard", "step 1: too large")
    trackio.finish()
    assert [row["a"] for row in trackio.SQLiteStorage.get_logs("q", name)] == [1.0, 2.0]
    (alert,) = trackio.SQLiteStorage.get_alerts("q")
    assert (alert["title"], alert["text"]) == ("CollapseGuard", "step 1: too large")


def test_trackio_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ModuleNotFoundError, match=r"expected the package trackio .*: pip install trackio"):
        TrackioLogger().log_metrics({"a": 1.0}, step=0)


@pytest.fixture
def comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Comet without a server; what it wrote, one message each."""
    pytest.importorskip("comet_ml")
    # Not CometLogger(online=False), with which Lightning switches Comet off.
    monkeypatch.setenv("COMET_START_ONLINE", "false")

    def read() -> list[dict[str, Any]]:
        (path,) = (tmp_path / "comet").glob("*.zip")
        with zipfile.ZipFile(path) as archive:
            lines = archive.read("messages.json").decode().splitlines()
        return [json.loads(line) for line in lines]

    return read


def test_comet_has_the_keys_of_every_logger(
    tmp_path: Path, comet: Callable[[], list[dict[str, Any]]]
) -> None:
    logger = CometLogger(project="p", prefix="a", offline_directory=str(tmp_path / "comet"))
    expected = fit(logger, tmp_path)
    logger.experiment.end()
    messages = comet()
    found: dict[str, list[tuple[int, float]]] = {}
    for message in messages:
        metric = message["payload"].get("metric")
        if metric is not None:
            name = metric["metricName"].removeprefix("a_")
            found.setdefault(name, []).append((metric["step"], float(metric["metricValue"])))
    assert {"attn/health", "qk/eig_var/mean", "guard/score", "train/loss"} <= found.keys()
    assert expected.keys() <= found.keys()
    for key, column in expected.items():
        assert sorted(found[key]) == [(step, pytest.approx(value, rel=1e-6)) for step, value in column], key
    text = json.dumps(messages)
    for part in (
        "a_attn/heatmap/entropy_normalized",
        "a_qk/eigenvalues/modulus",
        "lightning_qk_history.parquet",
    ):
        assert part in text, part
    assert "lightning_qk|AttentionMonitor|rows" in text
