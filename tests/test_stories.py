"""The three stories of a new user, from the README's own blocks, in at most ten lines typed.

An environment is not made here, the one at hand stands for it; the lines that would make it are counted.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_readme import BLOCKS, COMMANDS, PYTHON, ROOT
from wandb_reader import read_wandb_run

MOST = 10
_FIRST = COMMANDS.index("python3 -m venv .venv")
INSTALL = [*COMMANDS[_FIRST : _FIRST + 3], "source .venv/bin/activate"]
[JOB] = [code for code in PYTHON if "# new" in code]


def without(code: str, *marks: str) -> str:
    """A block of code less the lines that end in one of the marks."""
    return "".join(line for line in code.splitlines(keepends=True) if not line.rstrip().endswith(marks))


def marked(mark: str) -> list[str]:
    return [line for line in JOB.splitlines() if line.endswith(mark)]


def run(code: str) -> dict:
    namespace = {"__name__": "__main__"}
    exec(compile(code, "job.py", "exec"), namespace)
    return namespace


def environment() -> dict[str, str]:
    """The environment at hand, as if it were activated, without what tests set for W&B or an account's key."""
    kept = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_lines_that_install_are_those_of_the_readme():
    assert INSTALL[0].startswith("python3 -m venv")
    assert all("pip install" in line for line in INSTALL[1:3])
    assert INSTALL[3] in (ROOT / "README.md").read_text()


def test_callbacks_are_added_to_a_job_that_is_there(tmp_path, capsys):
    before = without(JOB, "# new", "# W&B")
    assert "lightning_qk" not in before
    trainer = run(before)["trainer"]
    assert trainer.global_step == 20
    assert not any(key.startswith(("qk/", "attn/", "locater/")) for key in trainer.callback_metrics)
    assert not list(tmp_path.rglob("lightning_qk_report.html"))

    trainer = run(without(JOB, "# W&B"))["trainer"]

    for key in ("qk/eig_var/mean", "attn/entropy/mean", "locater/penalty"):
        assert trainer.callback_metrics[key].isfinite(), key
    [report] = tmp_path.rglob("lightning_qk_report.html")
    said = capsys.readouterr().out
    assert "tensor(" in said
    assert report.name in said.replace("\n", "")  # where to look is told at the end
    assert len([*INSTALL, *marked("# new"), "python job.py"]) <= MOST


@pytest.mark.slow
def test_metrics_are_watched_in_wandb_without_an_account(tmp_path):
    Path("job.py").write_text(JOB)
    done = subprocess.run(
        [sys.executable, "job.py"], env=environment(), capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]
    found = read_wandb_run(tmp_path)
    for key in ("qk/eig_var/mean", "attn/layer_00/entropy", "locater/penalty"):
        assert [step for step, _ in found.column(key)] == [4, 9, 14, 19], key
    assert any("heatmap" in key for row in found.history for key in row)
    # What the README syncs with an account is there.
    pattern = re.search(r"`wandb sync (\S+)`", (ROOT / "README.md").read_text())[1]
    assert list(tmp_path.glob(pattern))
    assert len([*INSTALL, *marked("# new"), *marked("# W&B"), "python job.py"]) <= MOST


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pretrained_model_is_fine_tuned_from_one_config(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    [block] = [code for _, code in BLOCKS if "get_model_path" in code]
    lines = block.splitlines()
    config = re.search(r"--config (\S+)", lines[-1])[1]
    callbacks = yaml.safe_load((tmp_path / config).read_text())["trainer"]["callbacks"]
    assert any(one["class_path"] == "lightning_qk.LocAteR" for one in callbacks)
    few = (
        " --trainer.max_steps 3 --trainer.log_every_n_steps 1 --trainer.val_check_interval 3"
        " --trainer.limit_val_batches 1 --data.max_characters 200000 --data.cache_dir cache"
    )
    done = subprocess.run(
        ["bash", "-c", lines[-1] + few],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "classification" / "model" / "model.safetensors").is_file()
    found = read_wandb_run(tmp_path)
    assert [step for step, _ in found.column("locater/penalty")] == [0, 1, 2]
    assert found.column("val/accuracy")
    assert len([*INSTALL, *lines]) <= MOST
