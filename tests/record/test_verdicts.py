"""Verdicts on single heads, and their order."""

import math

import pytest
import torch

from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.verdicts import VERDICTS, extreme_heads, head_health


def record_of(
    attention: dict[str, list[float]] | None, spectrum: dict[str, list[float]] | None = None
) -> RunRecord:
    record = RunRecord()
    for name, values in (("attention", attention), ("spectrum", spectrum)):
        if values:
            history = History(["layer_00"], [len(next(iter(values.values())))])
            history.append(0, {key: torch.tensor(value) for key, value in values.items()})
            setattr(record, name, history)
    return record


@pytest.mark.parametrize(
    ("values", "verdict", "words"),
    [
        ({"entropy_normalized": 0.5, "max_abs_logit": 150.0}, "saturated", "100, where Kimi K2 clips"),
        ({"entropy_normalized": 0.5, "max_abs_logit": 2e4}, "saturated", "1e4"),
        ({"entropy_normalized": 0.02, "max_abs_logit": 9.0}, "saturated", "0.020"),
        ({"entropy_normalized": 0.99, "max_abs_logit": 1.0}, "uniform", "0.990"),
        ({"entropy_normalized": 0.5, "max_abs_logit": 1.0, "sink_first": 0.6}, "sink", "0.60"),
        ({"entropy_normalized": 0.5, "max_abs_logit": 1.0, "sink_first": 0.1}, "ok", ""),
        ({"entropy_normalized": 0.5, "max_abs_logit": math.nan}, "non-finite", "logits hold NaN"),
        ({"entropy_normalized": math.inf}, "non-finite", "entropy_normalized is infinite"),
        ({"entropy_normalized": math.nan}, "no data", "nothing is known"),
    ],
)
def test_measured(values: dict[str, float], verdict: str, words: str) -> None:
    (row,) = head_health(record_of({name: [value] for name, value in values.items()}))
    assert row.verdict == verdict
    assert words in row.reason
    assert (row.label, row.head) == ("layer_00", 0)


def test_predicted_where_nothing_was_measured() -> None:
    spectrum = {
        "frobenius_sq": [1.0, 1.0, 1.0, math.nan],
        "propagation": [0.01, 0.5, 0.5, 0.5],
        "localization": [0.0, 0.01, 0.9, 0.0],
    }
    verdicts = {row.head: row.verdict for row in head_health(record_of(None, spectrum))}
    assert verdicts == {0: "saturated", 1: "uniform", 2: "ok", 3: "non-finite"}
    attention = {"entropy_normalized": [0.5] * 4, "max_abs_logit": [1.0] * 4}
    measured = {row.head: row.verdict for row in head_health(record_of(attention, spectrum))}
    assert measured == {0: "ok", 1: "ok", 2: "ok", 3: "non-finite"}


def test_growing_logits() -> None:
    history = History(["layer_00"], [2])
    for step in range(9):
        history.append(
            step,
            {
                "max_abs_logit": torch.tensor([15.0, 5.0 + 2.5 * step]),
                "entropy_normalized": torch.full((2,), 0.5),
            },
        )
    rows = {row.head: row for row in head_health(RunRecord(attention=history))}
    assert rows[0].verdict == "ok"
    assert rows[1].verdict == "ok"  # 17.5 at two thirds, 25 at the end
    history.append(
        9, {"max_abs_logit": torch.tensor([15.0, 60.0]), "entropy_normalized": torch.full((2,), 0.5)}
    )
    (worst, _) = head_health(RunRecord(attention=history))
    assert (worst.head, worst.verdict) == (1, "growing")
    assert "to 60.0" in worst.reason


def test_the_worst_come_first() -> None:
    rows = head_health(
        record_of(
            {
                "entropy_normalized": [0.5, 0.01, 0.5, 0.5, 0.995],
                "max_abs_logit": [1.0, 2.0, 120.0, 900.0, 0.1],
            }
        )
    )
    assert [row.head for row in rows] == [3, 2, 1, 4, 0]
    order = [list(VERDICTS).index(row.verdict) for row in rows]
    assert order == sorted(order)


def test_of_nothing_there_is_nothing() -> None:
    assert head_health(RunRecord()) == []


def test_the_first_in_something() -> None:
    record = record_of(
        {"max_abs_logit": [1.0, 7.0, math.nan], "entropy_normalized": [0.5, 0.3, 0.9]},
        {"spectral_radius": [3.0, 1.0, math.inf]},
    )
    rows = {row.head: row.reason for row in extreme_heads(record)}
    assert rows == {
        1: "the largest |logit| of all heads, 7.00; the sharpest of all heads: normalized entropy 0.300",
        0: "the largest |eigenvalue| of all heads, 3.00",
    }
    assert extreme_heads(RunRecord()) == []
