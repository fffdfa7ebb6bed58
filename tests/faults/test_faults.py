"""Monitors never end a job, and never change one: runs in which something goes wrong, with and without them."""

import dataclasses
from pathlib import Path

import fault_harness
import pytest
import torch
from fault_harness import FAULTS, INTERVENTIONS, MONITORS, RECORD, Nursery, Plan, drawn

from lightning_qk.record.history import RunRecord

ALL = ("spectrum", "attention", "hidden", "sinks", "position", "tokens", "guard")


@pytest.fixture(scope="module")
def nursery():
    one = Nursery()
    yield one
    one.close()


@pytest.fixture(scope="module")
def summary():
    """A line for each run, printed at the end."""
    lines: list[str] = []
    yield lines
    if lines:
        print("\n" + "\n".join(sorted(lines)) + f"\n{len(lines)} runs")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_same_weights(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert same(got[name], value), f"{name} differs"


def measured_steps(plan: Plan, done: int) -> list[int]:
    """Steps that are on the cadence among those that were done."""
    return [step for step in range(done) if (step + 1) % plan.every == 0]


def assert_history(plan: Plan, steps: list[int], done: int, name: str) -> None:
    assert steps == sorted(set(steps)), f"{name} is not monotonic: {steps}"
    missing = set(measured_steps(plan, done)) - set(steps)
    # What fails in one measurement costs that one alone.
    allowed = 1 if "once" in plan.fault or plan.fault in ("one_rank_linalg", "one_rank_memory") else 0
    assert len(missing) <= allowed, f"{name} lacks the steps {sorted(missing)}"
    assert not steps or steps[-1] < done


def check(nursery: Nursery, plan: Plan, folder: Path) -> str:
    """The job with its callbacks against the job alone; returns a line of what happened."""
    alone = nursery.run(plan.alone(), folder / "alone")
    watched = nursery.run(plan, folder / "watched")
    for rank, (want, got) in enumerate(zip(alone, watched, strict=True)):
        assert not want["end"].startswith(("died", fault_harness.HUNG)), want["output"][-2000:]
        assert got["end"] == want["end"], (
            f"rank {rank}: {got['end']!r}, alone {want['end']!r}\n{got['output'][-3000:]}"
        )
        assert (want["end"] == "finished") == (not FAULTS[plan.fault].ends), want["end"]
        assert same(torch.tensor(got["losses"]), torch.tensor(want["losses"])), "losses differ"
        assert_same_weights(got["weights"], want["weights"])
        assert torch.equal(got["rng"], want["rng"])
        if plan.fault != "copied_layer":  # see below
            assert got["hooks"] == []
        for name, (steps, _) in got["histories"].items():
            assert_history(plan, steps, got["steps"], name)
        expected = [name for name in plan.callbacks if name != "guard"]
        if measured_steps(plan, got["steps"]):
            assert set(got["histories"]) == set(expected), got["notes"]
    reported = [name for name in plan.callbacks if name != "guard"]
    if reported and measured_steps(plan, watched[0]["steps"]) and has_disk(plan):
        check_record(plan, folder / "watched" / "run" / RECORD, watched[0])
    return line(plan, watched[0]["end"])


def line(plan: Plan, end: str) -> str:
    """Of the summary."""
    where = f"step {plan.step} of {plan.steps}"
    return f"{plan.fault:26} {where}  {plan.model:6} {end[:40]:40} {', '.join(plan.callbacks)}"


def has_disk(plan: Plan) -> bool:
    return not FAULTS[plan.fault].no_disk and plan.fault != "disk_full_later"


def check_record(plan: Plan, path: Path, outcome: dict) -> None:
    """What is on the disk is all that was in memory."""
    assert path.exists(), outcome["output"][-3000:]
    record = RunRecord.load(path)
    for name in plan.callbacks:
        if name == "guard":
            continue
        history = record.histories["spectrum" if name == "singular" else name]
        steps, values = outcome["histories"][name]
        assert history.steps == steps
        assert_history(plan, history.steps, outcome["steps"], f"record of {name}")
        for statistic, series in values.items():
            assert same(history.series(statistic), series), statistic
    assert not [one for one in path.parent.iterdir() if one.name.endswith(".partial")]


QUICK = (
    Plan("nan_weight", step=3, layer=1, callbacks=ALL, validate=2),
    Plan("nan_loss", step=4, callbacks=ALL, model="llama"),
    Plan("dropped_layer", step=2, callbacks=ALL),
    Plan("copied_layer", step=3, callbacks=ALL),
    Plan("pruned_weights", step=3, callbacks=ALL),
    Plan("log_metrics_raises", step=2, callbacks=ALL),
    Plan("full_disk", callbacks=ALL),
    Plan("interrupted", step=5, callbacks=ALL),
    Plan("error_in_training_step", step=5, callbacks=ALL, accumulate=3, validate=2),
    Plan("learning_rate_by_hand", step=3, callbacks=ALL, every=1),
    Plan("linalg_error_once", step=3, callbacks=ALL, every=1),
    Plan("one_rank_memory", step=3, callbacks=("spectrum", "attention", "hidden"), processes=2, every=1),
)


@pytest.mark.parametrize("plan", QUICK, ids=lambda plan: plan.fault)
def test_no_run_is_ended_or_changed(plan, nursery, tmp_path):
    check(nursery, plan, tmp_path)


def test_hooks_that_a_copy_took_along_are_gone_after_the_run(nursery, tmp_path):
    [outcome] = nursery.run(Plan("copied_layer", step=3, callbacks=ALL), tmp_path)
    assert outcome["end"] == "finished"
    assert outcome["hooks"] == []


# Every fault in its turn, everything else drawn.


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_no_drawn_run_is_ended_or_changed(seed, nursery, tmp_path, summary):
    plan = drawn(seed)
    if FAULTS[plan.fault].resumes:
        done = check_resume(
            nursery, dataclasses.replace(plan, save_every=2, step=max(plan.step, 3)), tmp_path
        )
    else:
        done = check(nursery, plan, tmp_path)
    summary.append(f"seed {seed:3}  {done}")


def check_resume(nursery: Nursery, plan: Plan, folder: Path) -> str:
    """A run that is killed and goes on, against one that is not."""
    whole_plan = plan if plan.fault == "steered_sharpen" else dataclasses.replace(plan, fault="none")
    [whole] = nursery.run(whole_plan, folder / "whole")
    assert whole["end"] == "finished", whole["output"][-3000:]
    kill = plan if plan.fault == "killed" else dataclasses.replace(plan, steps=plan.step + 3)
    [first] = nursery.run(kill, folder / "killed")
    assert first["end"] == ("signal 9" if plan.fault == "killed" else "finished"), first["output"][-3000:]
    [second] = nursery.run(dataclasses.replace(plan, resume=True), folder / "killed")
    assert second["end"] == "finished", second["output"][-3000:]
    assert_same_weights(second["weights"], whole["weights"])
    assert second["histories"].keys() == whole["histories"].keys()
    for name, (steps, values) in whole["histories"].items():
        found_steps, found = second["histories"][name]
        assert found_steps == steps, name
        assert found.keys() == values.keys()
        for statistic, series in values.items():
            assert same(found[statistic], series), f"{name}: {statistic}"
    for name, (steps, curves, events) in whole["scalars"].items():
        assert name in second["scalars"], f"{name}: its curves are lost"
        found_steps, found, found_events = second["scalars"][name]
        assert found_steps == steps, f"{name}: curves at {found_steps}, uninterrupted at {steps}"
        for key, series in curves.items():
            assert same(found[key], series), f"{name}: {key}"
        assert found_events == events, name
    return line(plan, "killed and resumed")


QUICK_RESUMES = ("qk_clip", "update_cap")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK_RESUMES else pytest.mark.slow, id=name)
        for name in INTERVENTIONS
        if name != "guard_clips"
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(name, nursery, tmp_path):
    callbacks = ("spectrum", "attention", name) if name != "hard_attention" else ("spectrum", name)
    plan = Plan("killed", step=5, callbacks=callbacks, save_every=2, every=1, validate=3)
    check_resume(nursery, plan, tmp_path)


@pytest.mark.parametrize(
    "stop", [pytest.param(11, marks=pytest.mark.slow), 13, pytest.param(17, marks=pytest.mark.slow)]
)
def test_a_guard_that_acted_goes_on_as_if_it_had_not_been_stopped(stop, nursery, tmp_path):
    """A collapse from step 8 on: alarm, way back, smaller rate and clip, in both."""
    plan = Plan(
        "steered_sharpen", step=8, layer=1, callbacks=("guard_clips",), steps=20, every=1, save_every=1
    )
    [whole] = nursery.run(plan, tmp_path / "whole")
    assert whole["end"] == "finished", whole["output"][-3000:]
    assert whole["scalars"]["guard_clips"][2], "no alarm: the run shows nothing"
    [first] = nursery.run(dataclasses.replace(plan, steps=stop), tmp_path / "stopped")
    assert first["end"] == "finished", first["output"][-3000:]
    [second] = nursery.run(dataclasses.replace(plan, resume=True), tmp_path / "stopped")
    assert second["end"] == "finished", second["output"][-3000:]
    assert_same_weights(second["weights"], whole["weights"])
    for index in range(3):
        got, want = second["scalars"]["guard_clips"][index], whole["scalars"]["guard_clips"][index]
        if index == 1:
            assert all(same(got[key], want[key]) for key in want)
        else:
            assert got == want


def test_every_fault_is_drawn():
    drawn_faults = {drawn(seed).fault for seed in range(100)}
    assert drawn_faults == {name for name in FAULTS if name != "none" and not name.startswith("steered")}
    assert {name for seed in range(100) for name in drawn(seed).callbacks} == set(MONITORS)


def test_a_run_that_hangs_fails(nursery, tmp_path):
    """The harness itself: a child that never ends is killed, and said to hang."""
    plan = Plan("none", steps=100_000)
    [outcome] = nursery.run(plan, tmp_path, timeout=2)
    assert outcome["end"] == fault_harness.HUNG
    # And the next run is as if nothing had been.
    [outcome] = nursery.run(Plan("none", steps=2), tmp_path / "next")
    assert outcome["end"] == "finished"
    assert outcome["steps"] == 2
