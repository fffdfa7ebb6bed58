"""Callbacks by their names on the command line, and the folder of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_qk.cli import main
from lightning_qk.cli._job_arguments import callback_name, job_arguments
from lightning_qk.inspect.documents import BadInput


def overlay(*args: str) -> dict[str, Any]:
    """The config that options become."""
    [*_, last] = [arg for arg in job_arguments(["fit", *args]) if arg.startswith("--config={")]
    return json.loads(last.removeprefix("--config="))


def callbacks(*args: str) -> dict[str, dict[str, Any]]:
    entries = overlay(*args)["trainer"]["callbacks"]
    return {entry["class_path"].rpartition(".")[2]: entry.get("init_args", {}) for entry in entries}


@pytest.mark.parametrize(
    ("class_path", "name"),
    [
        ("lightning_qk.LocAteR", "locater"),
        ("lightning_qk.QKSpectrumMonitor", "qk_spectrum"),
        ("lightning_qk.QKClip", "qk_clip"),
        ("lightning.pytorch.callbacks.ModelCheckpoint", "model_checkpoint"),
        ("mine.Monitor", "monitor"),
    ],
)
def test_names(class_path: str, name: str) -> None:
    assert callback_name(class_path) == name


def test_arguments_are_set_and_others_stay() -> None:
    found = callbacks("--config", "quickstart", "--locater.weight", "1e-2", "--spectrum.per_head=true")
    assert found == {
        "QKSpectrumMonitor": {"per_head": True},
        "AttentionMonitor": {},
        "LocAteR": {"weight": 0.01},
    }
    assert callbacks("--config", "quickstart", "--attention_monitor.rows", "128")["AttentionMonitor"] == {
        "rows": 128
    }


def test_lightning_takes_what_they_become(capsys: pytest.CaptureFixture[str]) -> None:
    added = ["--trainer.callbacks+=lightning_qk.QKClip", "--qk_clip.cap", "50"]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "quickstart", "--locater.weight", "0.02", *added, "--print_config"])
    assert end.value.code == 0
    job = yaml.safe_load(capsys.readouterr().out)
    found = {one["class_path"]: one["init_args"] for one in job["trainer"]["callbacks"]}
    assert found["lightning_qk.LocAteR"]["weight"] == 0.02
    assert found["lightning_qk.QKClip"]["cap"] == 50.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--locater.wieght", "1"], "expected an argument of lightning_qk.LocAteR (weight, "),
        (["--locatre.weight", "1"], "(qk_spectrum, attention, locater), got --locatre.weight; did you mean"),
        (["--qk_clip.cap", "1"], "add it with --trainer.callbacks+=lightning_qk.QKClip"),
        (["--locater.weight"], "expected a value after --locater.weight, got none"),
        (["--run_dir"], "expected a value after --run_dir, got none"),
        (["--run_dir="], "expected a folder after --run_dir, got none"),
    ],
)
def test_what_cannot_be_set(args: list[str], message: str) -> None:
    with pytest.raises(BadInput) as error:
        job_arguments(["fit", "--config", "quickstart", *args])
    assert message in str(error.value)


def test_a_name_that_two_callbacks_have(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({"trainer": {"callbacks": ["a.SinkMonitor", "b.SinkMonitor"]}}))
    with pytest.raises(BadInput, match="of which the config has 2"):
        job_arguments(["fit", "--config", str(job), "--sink.rows", "3"])


def test_other_options_are_left_to_lightning() -> None:
    args = [
        "fit",
        "--model.lr",
        "1",
        "--modle.lr=2",
        "--trainer.callbacks.weight",
        "3",
        "--ckpt_path",
        "last",
    ]
    assert job_arguments(args) == args


@pytest.mark.parametrize("config", ["quickstart", "finetune_classification", "paper_wikitext2"])
def test_a_run_moves_as_a_whole(config: str) -> None:
    moved = overlay("--config", config, "--run_dir", "there", "--locater.weight", "0.5")
    trainer = moved["trainer"]
    assert trainer["default_root_dir"] == "there"
    loggers = {one["class_path"].rpartition(".")[2]: one["init_args"] for one in trainer["logger"]}
    assert {own["save_dir"] for own in loggers.values()} == {"there"}
    assert loggers["WandbLogger"]["offline"] is True
    for entry in trainer["callbacks"]:
        own = entry.get("init_args", {})
        assert own.get("dirpath", "there").startswith("there")
        if entry["class_path"].endswith("LocAteR"):
            assert own["weight"] == 0.5
    if config == "finetune_classification":
        assert moved["model"]["save_pretrained_to"] == "there/model"
    assert "runs" not in json.dumps(moved)
