"""Verdicts, each on a layer that is sick in one way, and the table in narrow and wide terminals."""

import io
import math

import pytest
import torch
from rich.console import Console
from simulated_run import simulated_record

from lightning_qk.record.health import print_health
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.verdicts import format_value, layer_health


def attention_of(**values: list[float]) -> RunRecord:
    history = History(["layer_00"], [2])
    history.append(3, {name: torch.tensor(value) for name, value in values.items()})
    return RunRecord(attention=history)


HEALTHY = {"entropy_normalized": [0.5, 0.6], "max_abs_logit": [5.0, 6.0], "sink_first": [0.1, 0.1]}


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "ok", ""),
        ({"max_abs_logit": [5.0, 101.0]}, "saturated", "head 1 has an absolute logit of 101"),
        ({"max_abs_logit": [20000.0, 5.0]}, "saturated", "head 0 .* every run of Wortsman"),
        ({"entropy_normalized": [0.01, 0.002]}, "saturated", "least in head 1 .* entropy collapse"),
        ({"entropy_normalized": [0.01, 0.5]}, "ok", ""),
        ({"entropy_normalized": [0.985, 0.999]}, "uniform", "most in head 1 .0.999.$"),
        ({"sink_first": [0.31, 0.05]}, "sink", "1 of 2 heads .* most head 0"),
        ({"sink_first": [0.29, 0.29]}, "ok", ""),
        ({"max_abs_logit": [math.inf, 5.0]}, "non-finite", "max_abs_logit of head 0 is infinite"),
        ({"max_abs_logit": [5.0, math.nan]}, "non-finite", "logits of head 1 hold NaN"),
        ({name: [math.nan, math.nan] for name in HEALTHY}, "no data", "every attention statistic is NaN"),
        ({"sink_first": [math.nan, math.nan]}, "ok", ""),
    ],
)
def test_verdicts(changes: dict[str, list[float]], verdict: str, words: str) -> None:
    (row,) = layer_health(attention_of(**{**HEALTHY, **changes}))
    assert row.verdict == verdict
    if words:
        import re

        assert re.search(words, row.reason)
    else:
        assert row.reason == ""


def test_the_worst_verdict_wins() -> None:
    record = attention_of(
        entropy_normalized=[0.99, 0.99], max_abs_logit=[500.0, math.inf], sink_first=[0.9, 0.9]
    )
    assert layer_health(record)[0].verdict == "non-finite"


def test_nan_weights_are_named() -> None:
    record = simulated_record(layers=2, heads=2)
    record.spectrum.values["frobenius_sq"][-1][3] = math.nan
    verdicts = [(row.label, row.verdict, row.reason) for row in layer_health(record)]
    assert verdicts[0] == ("layer_00", "ok", "")
    assert verdicts[1] == ("layer_01", "non-finite", "the weights of head 1 hold NaN")


def test_cross_attention_without_eigenvalues_is_not_sick() -> None:
    history = History(["layer_00", "cross_layer_00"], [1, 1])
    history.append(0, {"frobenius_sq": torch.ones(2), "eig_mean": torch.tensor([0.1, math.nan])})
    rows = layer_health(RunRecord(spectrum=history))
    assert [row.verdict for row in rows] == ["not judged", "not judged"]
    assert math.isnan(rows[1].eig_mean)


def test_numbers_are_the_newest_and_layers_are_matched_by_label() -> None:
    record = simulated_record(layers=2, heads=2)
    extra = History(["layer_01", "other"], [2, 1])
    extra.append(0, {"entropy_normalized": torch.tensor([0.1, 0.1, 0.1])})
    extra.append(9, {"entropy_normalized": torch.tensor([0.4, 0.6, 0.7])})
    record.attention = extra
    rows = {row.label: row for row in layer_health(record)}
    assert list(rows) == ["layer_00", "layer_01", "other"]
    assert math.isnan(rows["layer_00"].entropy_normalized)
    assert rows["layer_01"].entropy_normalized == pytest.approx(0.5)
    expected = record.spectrum.values["eig_mean"][-1][2:].mean().item()
    assert rows["layer_01"].eig_mean == pytest.approx(expected)
    assert math.isnan(rows["other"].eig_mean)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_fits(width: int) -> None:
    record = simulated_record(layers=14, heads=4)
    record.attention.values["max_abs_logit"][-1][4 * 5 + 2] = 12345.0
    out = io.StringIO()
    print_health(record, Console(file=out, width=width))
    text = out.getvalue()
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= width
    for row in layer_health(record):
        assert any(row.label in line and row.verdict in line for line in lines)
    assert "head 2 has an absolute logit of 12345" in " ".join(text.split())
    assert "…" not in text
    assert ("eig mean" in text) == (width > 80)


LONG_NAMES = {
    80: ["encoder_layer_00", "decoder_layer_00", "decoder_cross_layer_00", "decoder_cross_layer_01"],
    60: ["decoder_cross_layer_00"],
    50: ["student_of_the_second_teacher_cross_layer_00", "layer_00"],
}


@pytest.mark.parametrize("width", LONG_NAMES)
def test_long_names_cut_no_number_and_no_verdict(width: int) -> None:
    """Those of an encoder and a decoder in a terminal of usual width, and narrower ones."""
    labels = LONG_NAMES[width]
    spectrum, attention = (History(labels, [2] * len(labels)) for _ in range(2))
    heads = 2 * len(labels)
    spectrum.append(5, {"sym_var": torch.full((heads,), 5.6e-4)})
    sick = {
        "entropy_normalized": 0.807,
        "sink_first": 4.1e-4,
        "max_abs_logit": 123456.0,
        "linear_share": 2e-4,
    }
    attention.append(5, {name: torch.full((heads,), value) for name, value in sick.items()})

    out = io.StringIO()
    print_health(RunRecord(spectrum=spectrum, attention=attention), Console(file=out, width=width))

    table = out.getvalue().split("┘")[0].splitlines()
    assert max(len(line) for line in table) <= width
    assert "…" not in "".join(table)
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in table if line.startswith("│")]
    assert "".join(row[0] for row in cells) == "".join(labels)
    whole = [row for row in cells if row[-1]]
    assert len(whole) == len(labels)
    for row in whole:
        assert {"0.807", "1.2e+05", "saturated"} <= set(row)


def test_many_reasons_are_cut_and_the_worst_come_first() -> None:
    record = simulated_record(layers=30, heads=2)
    record.attention.values["sink_first"][-1][:] = torch.linspace(0.4, 0.9, 60)
    record.attention.values["max_abs_logit"][-1][-1] = 150.0
    out = io.StringIO()
    print_health(record, Console(file=out, width=100))
    below = out.getvalue().split("┘")[1].strip().splitlines()
    while not below[0].startswith("layer_29"):
        del below[0]  # the legend
    assert below[0].startswith("layer_29: saturated")
    # What is no fault takes a few lines, and none hides a fault.
    assert [line.split(",")[0] for line in below[1:3]] == ["layer_00: sink", "layer_01: sink"]
    advice = below[below.index("and 27 more sink") + 1 :]
    assert advice[0].startswith("What to do (saturated): Lower the learning rate")
    assert advice[-1] == "What to do (sink): Nothing: common in language models."


def test_the_first_line_is_the_judgement() -> None:
    """Sinks are no fault; what was not measured is not said to be well; like reasons are one line."""
    record = simulated_record(layers=3, heads=2)
    attention = record.attention.values
    attention["sink_first"][-1][:2] = 0.9
    assert printed(record)[0] == "Attention health at step 40: none of 3 layers at fault: 1 sink, 2 ok"
    for values in attention.values():
        values[-1][2:] = math.nan
    lines = printed(record)
    assert lines[0] == "Attention health at step 40: 3 layers, 2 no data, 1 sink"
    assert any(line.startswith("layer_01, layer_02: no data, every attention") for line in lines)


def printed(record: RunRecord) -> list[str]:
    out = io.StringIO()
    print_health(record, Console(file=out, width=80))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("sick", [0, 3, 50])
def test_many_layers_take_no_more_than_a_screen(sick: int) -> None:
    """The worst layers have a row, and those that are well some over the whole depth."""
    record = simulated_record(layers=200, heads=2)
    logits = record.attention.values["max_abs_logit"][-1]
    for index in range(sick):
        logits[2 * (index * 3 + 7)] = 200.0 + index
    out = io.StringIO()
    print_health(record, Console(file=out, width=80))

    first, *table = out.getvalue().split("┘")[0].splitlines()
    judged = (
        f"{sick} of 200 layers at fault: {sick} saturated, {200 - sick} ok" if sick else "200 layers, all ok"
    )
    assert first == f"Attention health at step 40: {judged}"
    labels = [line.strip("│").split()[0] for line in table if line.startswith("│")]
    assert len(labels) == 20
    assert labels == sorted(labels, key=lambda label: int(label.split("_")[1]))
    at_fault = [f"layer_{index * 3 + 7:02d}" for index in range(sick)]
    assert set(at_fault[-20:]) <= set(labels)
    if sick < 20:
        assert {"layer_00", "layer_199"} <= set(labels)
    below = out.getvalue().split("┘")[1].strip().splitlines()
    assert below[0] == "180 layers more, " + ("30 saturated, 150 ok" if sick == 50 else "all ok")
    if sick:
        worst = next(line for line in below if line.startswith("layer_"))
        assert worst.startswith(f"{at_fault[-1]}: saturated, head 0 has an absolute logit of {199 + sick}")


def test_the_legend_has_the_unit_of_every_column() -> None:
    record = simulated_record(layers=2, heads=2)
    record.attention.values["linear_share"] = [
        values * 0 + 0.5 for values in record.attention.values["entropy"]
    ]
    for width in (60, 80, 200):
        out = io.StringIO()
        print_health(record, Console(file=out, width=width))
        table, below = out.getvalue().split("┘")
        titles = "".join(table.splitlines()[2:4])
        legend = below.strip().splitlines()
        assert max(map(len, legend)) <= width
        assert len(legend) <= (2 if width >= 80 else 3)
        parts = dict(part.split(": ") for part in " ".join(legend).split("; "))
        assert parts.items() <= UNITS.items()
        missing = {name for name in UNITS if name not in parts}
        assert not [name for name in missing if name in titles]
        assert ("eig mean" in parts) == (width == 200)
        assert "max|logit|" in parts
    assert parts == UNITS


UNITS = {
    "eig mean": "unscaled logits",
    "sym var": "unscaled logits²",
    "asym": "0 is symmetric, 1 antisymmetric",
    "entropy": "0 is one key, 1 all alike",
    "sink": "share of the first key",
    "max|logit|": "nats",
    "linear share": "of pairs",
}


def test_the_title_says_where_the_last_steps_were_not_measured() -> None:
    """A run that is shorter than two of its cadences is measured at the end of its first epoch alone."""
    record = attention_of(**HEALTHY)
    for state, title in {
        "finished at step 1,039 of 2,000": "Attention health at step 3 of 1,039: 1 layer, ok",
        "finished at step 4 of 4": "Attention health at step 3: 1 layer, ok",
        "": "Attention health at step 3: 1 layer, ok",
    }.items():
        record.info["State"] = state
        out = io.StringIO()
        print_health(record, Console(file=out, width=80))
        assert out.getvalue().splitlines()[0].strip() == title


def test_nothing_recorded_prints_nothing() -> None:
    out = io.StringIO()
    print_health(RunRecord(), Console(file=out))
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "-"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (0.0, "0.00"),
        (0.6, "0.600"),
        (99.99, "100"),
        (123456.0, "1.2e+05"),
        (-2e-5, "-2.0e-05"),
    ],
)
def test_format_value(value: float, text: str) -> None:
    assert format_value(value) == text
    assert len(text) <= 8


def test_a_run_that_ended_before_its_first_measurement_says_so():
    history = History(["layer_00"], [2])
    history.append(-1, {"eig_var": torch.tensor([0.1, 0.2])})
    out = io.StringIO()
    print_health(RunRecord(spectrum=history), Console(file=out, width=100))
    assert "Attention health before training" in out.getvalue()
