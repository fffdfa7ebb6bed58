"""AttentionProbes in two processes on gloo against one."""

from pathlib import Path

import torch
from processes import run_script


def test_values_are_reduced_and_a_rank_that_fails_keeps_nobody_waiting(tmp_path):
    for processes in (1, 2):
        run_script(Path(__file__).with_name("probes_ddp_job.py"), tmp_path, processes, processes=processes)
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
