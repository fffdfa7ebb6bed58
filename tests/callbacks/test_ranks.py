"""What fails in one of two processes: the other does not wait, training does not notice, and it is said once."""

from pathlib import Path

import pytest
import torch
from processes import run_once, run_script
from ranks_decisions import BOTH, CHANGING, WATCHING
from ranks_job import ONCE, PLACES

CASES = [(name, 9_999) for name in PLACES] + [(name, 1) for name in ONCE]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    # A process that waits for another one's collective call ends only by its timeout.
    job = Path(__file__).with_name("ranks_job.py")
    folder = run_once(
        "ranks", tmp_path_factory.getbasetemp(), lambda into: run_script(job, into, processes=2)
    )
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


@pytest.mark.parametrize("name", [*WATCHING, *CHANGING])
def test_it_fails_and_both_have_the_same_weights(results, name):
    first, second = (of_rank[name, 1] for of_rank in results)
    assert [first["failed"], second["failed"]].count(True) == 1
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


@pytest.mark.parametrize("name", WATCHING)
def test_who_watches_changes_nothing(results, name):
    for of_rank in results:
        watched = of_rank[name, 1]
        plain = of_rank["plain", watched["is_sharded"]]
        assert torch.equal(plain["losses"], watched["losses"])
        assert all(torch.equal(a, b) for a, b in zip(plain["weights"], watched["weights"], strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_what_fails_on_one_process_is_left_out_as_if_it_failed_on_both(results, name):
    one, both = (results[0][name, count] for count in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], both["weights"], strict=True))
    plain = results[0]["plain", one["is_sharded"]]
    assert not all(torch.equal(a, b) for a, b in zip(one["weights"], plain["weights"], strict=True))
