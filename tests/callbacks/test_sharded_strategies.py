"""Lightning's strategies in two processes against one process, and the ready configs for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_strategies_job
import torch
import transformers
from processes import run_script

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "configs"
CASES = [
    "fsdp2 plain",
    "fsdp2 clipped",
    "fsdp2 tokens",
    "fsdp2 loss blocks plain",
    "fsdp2 loss whole plain",
    "tp plain",
    "ddp static plain",
    "ddp unused plain",
    "zero1 plain",
    "fsdp plain",
    "fsdp clamped",
]


def start(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    # The package of this checkout, wherever another one is installed.
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False, **kwargs
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    sharded_strategies_job.run(folder, 1)
    run_script(Path(sharded_strategies_job.__file__), folder, 2, processes=2)
    return {name: torch.load(folder / f"{name}.pt") for name in ("alone", "0", "1")}


def same(got: dict, want: dict, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"{name}: {got[name]}"
        )


PAIR = 0.5 / (8 * 16)
"""What one pair of query and key is of a mean over a batch's rows, at most: in a row that sees two keys."""


def same_counts(got: torch.Tensor, want: torch.Tensor) -> None:
    """Shares of counted pairs: another order of sums may move a single pair over a threshold."""
    difference = (got - want).abs().nan_to_num()
    assert torch.equal(got.isnan(), want.isnan())
    assert (difference > 1e-4).sum() <= 1
    assert difference.max() <= PAIR


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_values_are_those_of_one_process(results, case, rank):
    got, want = results[rank][case], results["alone"][case.split()[-1]]
    assert got["gradients"].keys() == want["gradients"].keys()
    for name, gradient in want["gradients"].items():
        assert (got["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    same(got["spectrum"], want["spectrum"], 1e-4)
    counted = {"linear_share"} if case == "fsdp2 tokens" else set()
    assert got["attention"].keys() == want["attention"].keys()
    same(
        *(
            {name: own[name] for name in own if name not in counted}
            for own in (got["attention"], want["attention"])
        ),
        1e-4,
    )
    for name in counted:
        same_counts(got["attention"][name], want["attention"][name])
    same(got["hidden"], want["hidden"], 1e-3)
    moments = ("qk/tokens/", "pred/")
    if case.startswith(
        ("tp", "fsdp ")
    ):  # named: heads, or the weights that a rotation is checked by, are apart
        assert any("spread over processes" in note for note in got["notes of tokens"])
        assert all(value.isnan().all() for value in got["tokens"].values())
    else:
        assert got["notes of tokens"] == []
        same(got["tokens"], want["tokens"], 1e-4)
    keys = {key for key in want["metrics"] if "loss" not in case or not key.startswith("locater/")}
    keys = {key for key in keys if not key.startswith(moments)}
    assert {key for key in got["metrics"] if not key.startswith(moments)} == keys
    for key in keys:
        value = want["metrics"][key]
        if not key.startswith("train/"):
            least = PAIR if key.split("/")[1] in counted else 1e-4
            assert got["metrics"][key] == pytest.approx(value, rel=1e-3, abs=least), key
    assert got["notes"] == want["notes"]


def test_half_precision(results):
    """Rounding is that of bf16; penalty and spectra come from the full weights."""
    want = results["alone"]["half"]
    for rank in ("0", "1"):
        got = results[rank]["fsdp2 half"]
        for name, gradient in want["gradients"].items():
            assert (got["gradients"][name] - gradient).norm() <= 0.03 * gradient.norm(), name
        same(got["spectrum"], want["spectrum"], 3e-3)
        assert got["metrics"].keys() == want["metrics"].keys()
        same(got["tokens"], want["tokens"], 0.03)


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("ddp", []),
        ("fsdp2", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ],
)
def test_the_configs_train_on_two_processes(name, launcher, tmp_path):
    """By the Trainer's own launcher and by torchrun."""
    command = str(Path(sys.executable).with_name("lightning-qk"))
    options = {
        "trainer.accelerator": "cpu",
        "trainer.max_steps": "2",
        "trainer.val_check_interval": "2",
        "trainer.limit_val_batches": "1",
        "trainer.log_every_n_steps": "1",
        "trainer.default_root_dir": str(tmp_path),
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "false",
        "data.max_characters": "40000",
        "data.block_size": "32",
        "data.batch_size": "4",
        "data.cache_dir": str(tmp_path / "cache"),
        "model.model.n_layer": "2",
        "model.save_pretrained_to": str(tmp_path / "model"),
    }
    start(
        [
            *([sys.executable, *launcher] if launcher else [sys.executable]),
            command,
            "fit",
            *("--config", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / f"{name}.yaml")),
            *(part for key, value in options.items() for part in (f"--{key}", value)),
        ],
        cwd=tmp_path,
    )
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert len(network.transformer.h) == 2
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    checkpoints = {path.name: path for path in tmp_path.rglob("*.ckpt")}
    assert checkpoints.keys() == {"epoch=0-step=2.ckpt", "last.ckpt"}
    assert all(path.is_dir() == (name == "fsdp2") for path in checkpoints.values())
