"""The command: jobs from configs, and one line for what is wrong with them."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import wandb
import yaml
from wandb_reader import read_wandb_run

from lightning_qk import TransformerModule
from lightning_qk.cli import main

# Without those that are laid over a job.
CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml")
    if "model" in yaml.safe_load(path.read_text())
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of two steps, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {index} of the text\n" for index in range(60)))
    job = {
        "model": {
            "task": "causal_lm",
            "model": {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16},
        },
        "data": {
            "source": "text.txt",
            "test_files": "text.txt",
            "block_size": 16,
            "batch_size": 4,
            "cache_dir": "cache",
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "logs", "name": None, "version": ""},
            },
        },
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, which has to be one line, and the last."""
    begins = re.compile(r"lightning-qk: error:")
    lines = [line for line in capsys.readouterr().err.splitlines() if begins.match(line)]
    assert len(lines) == 1
    return lines[0]


def test_help_is_quick_and_complete() -> None:
    code = "import sys; from lightning_qk.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0
    for command in ("fit", "validate", "test", "predict", "report"):
        assert f"  {command} " in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_qk import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-qk {__version__}\n"


@pytest.mark.parametrize("module", ["lightning_qk", "lightning_qk.cli"])
def test_python_runs_the_command(module: str) -> None:
    """Where no ``lightning-qk`` is on the path, as in notebooks and containers."""
    done = [
        subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, timeout=60)
        for args in (["--help"], ["fti"])
    ]

    assert [each.returncode for each in done] == [0, 2]
    assert done[0].stdout.startswith("usage: lightning-qk COMMAND")
    assert not done[0].stderr
    [line] = done[1].stderr.splitlines()
    assert "did you mean 'fit'?" in line


def test_a_job_from_fit_to_predict(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["fit", "--config", str(config), "--model.lr", "1e-3", "--seed_everything", "3"]) == 0

    saved = yaml.safe_load(Path("logs/lightning_qk_config.yaml").read_text())
    assert saved["model"]["lr"] == 1e-3
    checkpoint = Path("logs/checkpoints/last.ckpt")
    assert len(list(checkpoint.parent.glob("*.ckpt"))) == 2
    module = TransformerModule.load_from_checkpoint(checkpoint)
    assert module.lr == 1e-3
    assert module.network.config.vocab_size == 263
    hparams = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert hparams["task"] == "causal_lm"

    said: list[str] = []
    monkeypatch.setattr("lightning_qk.cli._lightning_cli.rank_zero_info", said.append)
    for command in ("validate", "test", "predict"):
        assert main([command, "--config", str(config), "--ckpt_path", str(checkpoint)]) == 0
    assert not said
    printed = capsys.readouterr()
    # Another model than the checkpoint's is named by what differs first.
    line = ["validate", "--config", str(config), "--ckpt_path", "last", "--model.model.n_embd", "12"]
    capsys.readouterr()
    assert main(line) == 1
    wrong = error_of(capsys)
    assert "got another's (size mismatch for model.transformer.wte.weight: " in wrong
    assert "lightning_qk_config.yaml" in wrong
    said.clear()
    # What nobody has trained is said to be that.
    assert main(["test", "--config", str(config)]) == 0
    assert said == ["lightning-qk: the weights are random: --ckpt_path names a checkpoint of a run"]
    capsys.readouterr()
    assert "test/perplexity" in printed.out
    rows = pq.read_table("predictions.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert all(row["loss"] > 0 and row["tokens"] > 0 and isinstance(row["text"], str) for row in rows)
    assert main(["predict", "--config", str(config), "--output", "predictions.xls"]) == 2
    assert "ends in .parquet, .csv, .jsonl, got 'predictions.xls'" in capsys.readouterr().err
    assert (
        main(["fit", "--config", str(config), "--ckpt_path", str(checkpoint), "--trainer.max_steps", "3"])
        == 0
    )


def test_task_and_seed_are_given_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_qk import TextDataModule

    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(TextDataModule, "prepare_data", lambda self: seen.append((self.task, self.seed)))
    monkeypatch.setattr(
        TextDataModule, "setup", lambda self, stage: (_ for _ in ()).throw(ValueError("enough"))
    )

    assert main(["fit", "--config", str(config), "--model.task", "masked_lm", "--seed_everything", "7"]) == 1
    assert main(["fit", "--config", str(config)]) == 1

    assert seen == [("masked_lm", 7), ("causal_lm", 0)]


MISSPELT: list[tuple[dict[str, Any], str]] = [
    ({"model": {"lrr": 1.0}}, "expected an option that exists, got 'model.lrr'; did you mean 'model.lr'?"),
    ({"modell": {"lr": 1.0}}, "got 'modell.lr'; did you mean 'model.lr'?"),
    ({"data": {"blocksize": 1}}, "got 'data.blocksize'; did you mean 'data.block_size'?"),
    ({"trainer": {"max_step": 1}}, "got 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
    ({"zzz": 1}, "got 'zzz'; see lightning-qk fit --help"),
    (
        {"trainer": {"callbacks": [{"class_path": "lightning_qk.LocAteR", "init_args": {"wieght": 1.0}}]}},
        "expected init_args of lightning_qk.LocAteR (weight, ",
    ),
    (
        {"trainer": {"callbacks": [{"class_path": "lightning_qk.Locater", "init_args": {"weight": 1.0}}]}},
        "expected a class_path that exists, got lightning_qk.Locater; did you mean 'LocAteR'?",
    ),
    (
        {"trainer": {"callbacks": [{"class_path": "nosuch.LocAteR"}]}},
        "Problem with given class_path 'nosuch.LocAteR': No module named 'nosuch'",
    ),
    ({"model": {"lr": "quick"}}, "model.lr"),
]


@pytest.mark.parametrize(("change", "message"), MISSPELT)
def test_a_misspelt_config_gets_one_line(
    config: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("change.yaml").write_text(yaml.safe_dump(change))

    assert main(["fit", "--config", str(config), "--config", "change.yaml"]) == 2

    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected a command out of fit, validate, test, predict, inspect, verify, report, "),
        (["--hlep"], "got '--hlep'; did you mean '--help'?"),
        (["fti"], "got 'fti'; did you mean 'fit'?"),
        (["fit"], "model.model"),
        (["fit", "--config", "none.yaml"], "none.yaml"),
        (["fit", "--config", "broken.yaml"], "line 2"),
        (["fit", "--config", "job.yaml", "--modle.lr", "1"], "got 'modle.lr'; did you mean 'model.lr'?"),
        (["fit", "--config", "jbo.yaml"], "got no such file: jbo.yaml; did you mean 'job.yaml'?"),
        (["fit", "--config", "quikstart"], "did you mean 'quickstart'?"),
        (["fit", "--config", "."], "got the folder .: name a file in it"),
        (["fit", "--config", "list.yaml"], "expected a config with keys such as model, data and trainer"),
        (["fit", "job.yaml"], "expected options alone, got 'job.yaml'; a config is given with --config"),
        (["fit", "--config"], "expected one argument"),
        (
            ["fit", "--config", "job.yaml", "--trainer.max_steps", "abc"],
            "expected trainer.max_steps to be int, got 'abc'; correct it",
        ),
        (
            ["fit", "--config", "job.yaml", "--trainer.precision", "half"],
            "bf16-mixed, 32-true, 64-true, 64, 32, 16, bf16 or int or null, got 'half'",
        ),
        (
            [
                "fit",
                "--config",
                "job.yaml",
                "--trainer.callbacks=lightning_qk.LocAteR",
                "--trainer.callbacks.form=x",
            ],
            "form of lightning_qk.LocAteR to be one of variance, target, limit or null, got 'x'; correct it",
        ),
        (["fit", "--config", "job.yaml", "--model.model.model_type", "gpt22"], "did you mean 'gpt2'?"),
        (["fit", "--config", "job.yaml", "--model.model.n_layr", "2"], "did you mean 'n_layer'?"),
        (["report", "none.safetensors"], "expected a record that a monitor wrote, got no such file"),
        (["report", "."], "expected a record that a monitor wrote, got a folder without one: ."),
        (["report"], "expected RECORD, got none; see lightning-qk report --help"),
        (["report", "--outpt", "x", "y"], "got '--outpt'; did you mean '--output'?"),
        (["inspect", "gpt2", "--lenght", "2"], "got '--lenght'; did you mean '--length'?"),
        (["inspect", "gpt2", "--length", "two"], "invalid int value: 'two'"),
        (["completion"], "expected SHELL, got none"),
    ],
)
def test_a_wrong_command_line_gets_one_line(
    config: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.yaml").write_text("model:\n  task: [a\n")
    Path("list.yaml").write_text("- a\n- b\n")

    assert main(args) == 2

    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.source", "none.txt"], "expected a text file, got no such file"),
        (["--model.task", "causal"], "expected a task out of causal_lm, masked_lm, sequence_classification"),
        (["--model.model.n_layerr", "2"], "got 'n_layerr': did you mean 'n_layer'?"),
        (["--model.model", "none/such"], "expected a folder or a name on the Hugging Face hub as model"),
        (["--trainer.callbacks+=lightning_qk.LocAteR", "--trainer.callbacks.weight=-1"], "weight"),
    ],
)
def test_a_job_that_cannot_run_gets_one_line(
    config: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(config), *args]) in (1, 2)

    assert message in error_of(capsys)


def test_arguments_that_a_callback_refuses_get_its_own_line(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = yaml.safe_load(config.read_text())
    job["trainer"]["callbacks"] = [{"class_path": "lightning_qk.LocAteR", "init_args": {"weight": -1}}]
    config.write_text(yaml.safe_dump(job))
    assert main(["fit", "--config", str(config)]) == 1
    assert "error: expected a finite weight of at least 0, got -1.0: pass 0 to" in error_of(capsys)


def test_a_missing_wandb_login_gets_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr("wandb.init", refuse)
    job = yaml.safe_load(config.read_text())
    job["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.WandbLogger"}
    config.write_text(yaml.safe_dump(job))
    assert main(["fit", "--config", str(config)]) == 1
    error = error_of(capsys)
    assert "expected a W&B login for WandbLogger, got none" in error
    assert "offline: true" in error


def test_the_traceback_can_be_had(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["fit", "--config", str(config), "--data.source", "none.txt"]
    with pytest.raises(ValueError, match="no such file"):
        main([*args, "--traceback"])
    monkeypatch.setenv("LIGHTNING_QK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such file"):
        main(args)


def test_a_fault_of_the_program_is_not_hidden(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(TransformerModule, "training_step", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["fit", "--config", str(config)])


def test_a_config_in_the_working_folder_is_never_overwritten(config: Path) -> None:
    before = config.read_text()

    assert main(["fit", "--config", str(config), "--trainer.logger", "false"]) == 0

    assert config.read_text() == before
    assert not list(Path().glob("*config*"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_configs_have_no_wrong_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(path), "--print_config"])

    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert {"lightning_qk.QKSpectrumMonitor", "lightning_qk.AttentionMonitor", "lightning_qk.LocAteR"} <= {
        callback["class_path"] for callback in shown["trainer"]["callbacks"]
    }


def test_the_quick_start_runs_and_its_report_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    [path] = [path for path in CONFIGS if path.stem == "quickstart"]
    small = [
        *(
            "--trainer.max_steps",
            "3",
            "--trainer.log_every_n_steps",
            "1",
            "--trainer.val_check_interval",
            "3",
        ),
        *("--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"),
        *("--data.max_characters", "60000", "--data.cache_dir", "cache", "--data.batch_size", "4"),
        *("--model.model.n_layer", "2", "--trainer.enable_progress_bar", "false"),
    ]

    assert main(["fit", "--config", str(path), *small]) == 0

    run = Path("runs/quickstart")
    assert len(list(run.rglob("lightning_qk_report.html"))) == 1
    wandb.finish()
    assert read_wandb_run(run).column("locater/penalty")
    rows = (run / "csv/version_0/metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert {"train/loss", "val/perplexity", "lr", "locater/penalty", "qk/eig_var/mean"} <= set(header)
    column = header.index("val/perplexity")
    [perplexity] = [float(cells[column]) for cells in (row.split(",") for row in rows[1:]) if cells[column]]
    assert 1 < perplexity < 300
    assert math.isfinite(perplexity)

    capsys.readouterr()
    [record] = run.rglob("lightning_qk_record.safetensors")
    assert main(["report", str(record), "--output", "again.html"]) == 0
    assert "<html" in Path("again.html").read_text()
    assert capsys.readouterr().out.strip().endswith("again.html")


def test_a_record_that_is_none_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")

    assert main(["report", str(tmp_path / "a.safetensors")]) == 2

    assert "expected a record that a monitor wrote" in error_of(capsys)


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_qk.record.history import RunRecord

    record = RunRecord().save(tmp_path / "a.safetensors")
    (tmp_path / "file").write_text("")
    reasons = {
        tmp_path: "got the folder",
        tmp_path / "file" / "b.html": "expected a file that may be written, got",
    }
    for target, reason in reasons.items():
        before = sorted(path.name for path in tmp_path.iterdir())
        assert main(["report", str(record), "--output", str(target)]) == 2
        seen = capsys.readouterr()
        assert seen.err.count("\n") == 1
        assert f"{reason} {target}" in seen.err
        assert sorted(path.name for path in tmp_path.iterdir()) == before
