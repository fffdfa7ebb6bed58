"""The scripts of examples/ run, and leave what their docstrings tell you to look at."""

import ast
import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "refresh_tour.py")


@pytest.fixture(autouse=True)
def _data_of_this_test(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(name: str, *options: str, drop: str = "") -> dict:
    """Run a script in this process, without the lines that have ``drop`` in them; its names."""
    text = "".join(
        line for line in (FOLDER / name).read_text().splitlines(keepends=True) if not drop or drop not in line
    )
    before, sys.argv = sys.argv, [name, "--out", "out", *options]
    try:
        namespace = {"__name__": "__main__"}
        exec(compile(text, name, "exec"), namespace)
    finally:
        sys.argv = before
    return namespace


def columns(path: str = "out/metrics.csv") -> dict[str, list[float]]:
    with Path(path).open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def look(*keys: str) -> dict[str, list[float]]:
    """The columns of the log, where those that are asked for hold finite numbers, and the report is there."""
    assert Path("out/lightning_qk_report.html").is_file()
    found = columns()
    for key in keys:
        assert found[key], key
        assert all(map(math.isfinite, found[key])), key
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_and_say_how_they_are_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 85
    told = ast.get_docstring(ast.parse(text))
    assert f"python examples/{path.name}" in told
    seconds = re.search(r"Time: (\d+) processor seconds", told)[1]
    assert "ook at" in told
    index = (FOLDER / "README.md").read_text()
    assert re.search(rf"\]\({path.name}\).* \| {seconds} s \|", index)


def test_the_index_has_no_other_files():
    named = re.findall(r"\]\(([\w.]+\.(?:py|ipynb))\)", (FOLDER / "README.md").read_text())
    assert sorted(set(named)) == sorted([*(path.name for path in SCRIPTS), "tour.ipynb"])


def test_existing_job():
    run("existing_job.py", "--steps", "4")
    look("qk/eig_var/mean", "attn/entropy/mean", "locater/penalty", "train/loss")
    assert Path("out/checkpoints/last.ckpt").is_file()


def test_the_existing_job_is_unchanged_by_what_looks_on():
    text = (FOLDER / "existing_job.py").read_text()
    new = [line for line in text.splitlines() if "# +" in line]
    assert len(new) == 4
    assert [line.split("#")[0].strip().split("(")[0] for line in new[1:]] == [
        "QKSpectrumMonitor",
        "AttentionMonitor",
        "LocAteR",
    ]
    assert new[0].startswith("from lightning_qk import")
    losses = []
    for drop in ("# +", "LocAteR()"):
        run("existing_job.py", "--steps", "3", drop=drop)
        losses.append(columns()["train/loss"])
        assert any("qk/" in name for name in columns()) == (drop != "# +")
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_vit_digits():
    run("vit_digits.py", "--steps", "3")
    found = look("qk/eig_var/mean", "attn/entropy/mean", "locater/penalty", "val/accuracy")
    assert 0 <= found["val/accuracy"][-1] <= 1


def test_causal_lm(capsys):
    Path("text.txt").write_text("\n".join(f"line {index} of a text to learn" for index in range(3000)))
    run("causal_lm.py", "--steps", "3", "--source", "text.txt")
    look("qk/offset_16/eig_mean/mean", "attn/entropy/mean", "locater/penalty", "val/perplexity")
    assert "16 heads: " in capsys.readouterr().out

    from lightning_qk.cli import main

    assert main(["inspect", "out/model"]) == 0
    assert "layer_03" in capsys.readouterr().out


def test_classification(capsys):
    for name, count in (("train", 200), ("dev", 40)):
        rows = [
            f"a {'good' if index % 4 else 'bad'} film, number {index}\t{int(index % 4 > 0)}"
            for index in range(count)
        ]
        Path(f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    run("classification.py", "--steps", "2", "--data", ".")
    assert "0.750 of the validation rows are '1'" in capsys.readouterr().out
    assert list(Path("out").rglob("lightning_qk_report.html"))
    assert list(Path("out").glob("wandb/offline-run-*"))
    assert Path("out/model/model.safetensors").is_file()


@pytest.mark.slow
def test_masked_lm():
    run("masked_lm.py", "--steps", "2")
    look("qk/eig_var/mean", "attn/sink_output/mean", "attn/waiver_mass/mean", "val/perplexity")


@pytest.mark.slow
def test_lora(capsys):
    run("lora.py", "--steps", "3")
    look("qk/update_ratio/mean", "locater/penalty", "val/accuracy")
    command = capsys.readouterr().out.strip().splitlines()[-1].split()

    from lightning_qk.cli import main

    assert command[0] == "lightning-qk"
    assert main(command[1:]) == 0
    assert "layer_05" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_multi_device(strategy):
    script = str(FOLDER / "multi_device.py")
    done = subprocess.run(
        [sys.executable, script, "--strategy", strategy, "--steps", "6", "--out", "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.findall(r"process (\d): (\d+) measurements, entropy ([\d.]+)", done.stdout)
    assert sorted(rank for rank, _, _ in said) == ["0", "1"]
    assert said[0][1:] == said[1][1:]
    found = look("qk/eig_var/mean", "attn/entropy/mean", "locater/penalty")
    assert float(said[0][2]) == pytest.approx(found["attn/entropy/mean"][-1], abs=1e-4)
