"""Damaged and hostile files: values that nobody expects, and what the command must do with any file."""

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from lightning_qk.cli import main

ESCAPE = "\x1b]0;title\x07[red]<script>alert(1)</script>name[/red]\u202e"
VALUES: list[Any] = [
    None, True, -1, 0, 10**6, 10**9, 10**30, 1.5, "", ESCAPE, "../../etc", [], [1, "a"], {}, {"a": {}}, [[[]]],
    float("nan"), "x" * 5000, "x" * 10**5,
]  # fmt: skip


def change_one_value(fields: Any, source: random.Random) -> None:
    """One field of parsed JSON, on any level, becomes something else or goes."""
    places: list[tuple[Any, Any]] = []
    waiting = [fields]
    while waiting:
        one = waiting.pop()
        for key in list(one) if isinstance(one, dict) else range(len(one)):
            places.append((one, key))
            if isinstance(one[key], dict | list):
                waiting.append(one[key])
    home, key = source.choice(places)
    if source.random() < 0.1 and isinstance(home, dict):
        del home[key]
    else:
        home[key] = source.choice(VALUES)


def status_of(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], name: str) -> int:
    """Exit status of the command: 0, or 2 with one sentence that names the file; quick, and safe to print."""
    capsys.readouterr()
    before = time.perf_counter()
    status = main(list(arguments))
    assert time.perf_counter() - before < 20
    seen = capsys.readouterr()
    assert not set(seen.out + seen.err) & {"\x1b", "\x07", "\u202e"}
    assert status in (0, 2)
    if status == 2:
        assert seen.err.startswith("lightning-qk: error: expected ")
        assert seen.err.count("\n") == 1
        assert len(seen.err) < 3000
        assert "--traceback shows" not in seen.err  # nobody foresaw it
        assert name in seen.err
    return status
