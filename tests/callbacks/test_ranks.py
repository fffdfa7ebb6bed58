"""What fails in one of two processes: the other does not wait, training does not notice, and it is said once."""

from pathlib import Path

import pytest
import torch
from processes import run_script
from ranks_job import ONCE, PLACES

CASES = [(name, 9_999) for name in PLACES] + [(name, 1) for name in ONCE]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # A process that waits for another one's collective call ends only by its timeout.
    run_script(Path(__file__).with_name("ranks_job.py"), folder, processes=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_does_not_notice(results, case):
    for of_rank in results:
        plain, watched = of_rank["plain"], of_rank[case]
        assert torch.equal(plain["losses"], watched["losses"])
        assert all(torch.equal(a, b) for a, b in zip(plain["weights"], watched["weights"], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_callback_metrics_are_the_same_on_both(results, case):
    first, second = (of_rank[case]["metrics"] for of_rank in results)
    assert first == pytest.approx(second, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("case", [case for case in CASES if case[1] > 1], ids=str)
def test_it_is_said_once(results, case):
    for of_rank in results:
        for notes in of_rank[case]["notes"].values():
            assert len(set(notes)) == len(notes)
    said = [note for of_rank in results for notes in of_rank[case]["notes"].values() for note in notes]
    assert (
        any("injected" in note or "did not converge" in note for note in said) or case[0] == "temporary files"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_did_not_fail_is_still_measured(results, case):
    steps = results[0][case]["steps"]
    if case[0] != "remembering":
        assert any(kept[-5:] == list(range(5)) for kept in steps.values())
    for kept in steps.values():
        assert kept == sorted(set(kept))
