"""AttentionProbes in two processes on gloo against one."""

import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]


def test_values_are_reduced_and_a_rank_that_fails_keeps_nobody_waiting(tmp_path):
    script = str(Path(__file__).with_name("probes_ddp_job.py"))
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in (
        [sys.executable, script, str(tmp_path), "1"],
        [*torchrun, script, str(tmp_path), "2"],
    ):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    # Every token is masked, so that nothing is drawn; the batch of one process is that of two.
    for name in ("explanation", "parallel_entropy_whole", "parallel_entropy_parts"):
        torch.testing.assert_close(first["values"][name], one["values"][name], atol=1e-5, rtol=1e-4)
    for name, values in first["values"].items():
        assert values.isfinite().all()
        assert torch.equal(values, second["values"][name])
    assert first["metrics"].keys() == second["metrics"].keys() == one["metrics"].keys()
    assert {key: v for key, v in first["metrics"].items() if key.startswith("probe/")} == {
        key: v for key, v in second["metrics"].items() if key.startswith("probe/")
    }
    assert one["notes"] == []
    # Rank zero says what happened on the other.
    (note,) = first["notes"]
    assert "the probe irrelevant failed once (OSError: no marks here)" in note
    assert len(list(tmp_path.rglob("lightning_qk_heads.csv"))) == 2
