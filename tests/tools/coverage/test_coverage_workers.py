"""Processes with bounds: what one of them does is its own."""

import contextlib
import os
import signal
import time

from tools.coverage.workers import run_each


def work(name: str) -> object:
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "leave":
        os._exit(3)
    if name == "raise":
        raise ValueError("expected something else")
    if name == "hang":
        while True:
            time.sleep(0.1)
    if name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if name == "greedy":
        return len(bytearray(400 << 20))
    if name == "modest":
        return len(bytearray(50 << 20))
    if name == "loud":
        print("something")
        os.write(2, b"something")
    return {"name": name, "long": "x" * 300_000}


def test_every_outcome_is_named_and_none_stops_another(capfd) -> None:  # type: ignore[no-untyped-def]
    names = ["crash", "a", "leave", "raise", "hang", "deaf", "greedy", "modest", "loud", "b"]
    started = time.monotonic()
    outcomes = {
        outcome.name: outcome for outcome in run_each(work, names, jobs=3, timeout=2, memory=_now() + 200)
    }
    assert sorted(outcomes) == sorted(names)
    assert time.monotonic() - started < 30
    problems = {name: outcome.problem for name, outcome in outcomes.items()}
    assert problems["crash"] == "its process ended by SIGSEGV"
    assert problems["leave"] == "its process ended with status 3"
    assert problems["raise"].startswith("ValueError: expected something else")
    assert problems["hang"] == problems["deaf"] == "it was not done after 2 s"
    assert "more than" in problems["greedy"]
    assert "MiB" in problems["greedy"]
    for name in ("a", "b", "loud"):
        assert problems[name] is None
        assert outcomes[name].value["name"] == name
        assert len(outcomes[name].value["long"]) == 300_000
    assert outcomes["modest"].value == 50 << 20
    assert capfd.readouterr() == ("", "")


def test_tensors_are_bounded_too() -> None:
    import torch

    def allocate(name: str) -> float:
        return float(torch.ones(int(name) << 18).sum())

    big, small = run_each(allocate, ["1000", "10"], timeout=20, memory=_now() + 300)
    assert big.value is None
    assert "MiB" in str(big.problem)
    assert small.value == 10 << 18


def test_left_early_no_process_stays() -> None:
    running = run_each(work, ["a", "hang", "hang"], jobs=2, timeout=60)
    next(running)
    running.close()
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)


def _now() -> int:
    """MiB in memory: a fork has them too."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
