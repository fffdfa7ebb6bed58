"""The registry of statistics: everything that is drawn or logged has a meaning, and nothing is named twice."""

import re
from pathlib import Path

import pytest

from lightning_qk import (
    AttentionMonitor,
    AttentionProbes,
    HiddenStateMonitor,
    PositionMonitor,
    QKSpectrumMonitor,
    SinkMonitor,
    TokenMonitor,
)
from lightning_qk.loggers.workspace import GROUPS
from lightning_qk.record.statistics import (
    ALWAYS,
    STATISTICS,
    describe,
    drawn_statistics,
    logged_as_heatmap,
    logged_by_layer,
    logged_extremes,
    of_key,
)
from lightning_qk.record.verdicts import VERDICTS

MONITORS = [
    QKSpectrumMonitor(offsets=(0, 16), singular=True),
    AttentionMonitor(),
    SinkMonitor(),
    PositionMonitor(),
    HiddenStateMonitor(),
    AttentionProbes(),
    TokenMonitor(offsets=(0, 16)),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("monitor", MONITORS, ids=lambda monitor: type(monitor).__name__)
def test_everything_that_a_monitor_logs_has_a_meaning(monitor) -> None:
    for name in monitor.statistics:
        one = describe(name, monitor.group)
        assert one.meaning, name
        assert one.group == monitor.group
        assert of_key(f"{monitor.group}/layer_03/head_05/{name}") is not None
        assert of_key(f"{monitor.group}/val/{name}/mean") is not None


@pytest.mark.parametrize("monitor", MONITORS, ids=lambda monitor: type(monitor).__name__)
def test_what_a_monitor_logs_by_default_is_that_of_the_registry(monitor) -> None:
    kind = type(monitor)
    names = [name for name in monitor.statistics if not name.startswith("offset_")]
    assert dict(monitor.extremes).items() >= logged_extremes(kind.group, names).items()
    assert set(logged_by_layer(kind.group, names)) <= set(monitor.layer_statistics)
    assert set(getattr(monitor, "figure_statistics", ())) == set(logged_as_heatmap(kind.group, names))


def test_everything_that_is_drawn_has_a_meaning() -> None:
    keys = [
        key
        for group in GROUPS
        for chart in group.charts
        for key in (*chart.keys, (chart.regex or "").strip("^$"))
    ]
    for key in keys:
        if key and not key.startswith("qk/eigenvalues/"):
            one = of_key(key)
            assert one is not None, key
            assert one.meaning
    for one in STATISTICS.values():
        assert one.meaning.endswith("."), one.name
        assert not one.worry or one.worry.endswith(".")
        assert one.title
        assert not one.instead_of or STATISTICS[f"{one.group}/{one.instead_of}"].drawn == ALWAYS


def test_scalars_of_interventions_have_a_meaning() -> None:
    """Keys as they stand in the source of the callbacks, in what it logs or what it says that it logs."""
    groups = {one.group for one in STATISTICS.values()} - {"attn", "qk", "hidden", "probe"}
    pattern = re.compile(rf"[\"`](({'|'.join(sorted(groups))})/[a-z_0-9]+)")
    found = set()
    for path in (ROOT / "lightning_qk" / "callbacks").rglob("*.py"):
        found |= {match[1] for match in pattern.finditer(path.read_text())}
    assert {"clip/gamma", "guard/score", "update_cap/ratio"} <= found
    for key in found:
        if re.search(r"/(layer|head|offset)_", key):
            continue
        assert of_key(key) is not None, key


def test_the_docs_name_statistics_of_the_registry() -> None:
    text = (ROOT / "docs" / "numbers.md").read_text()
    assert set(re.findall(r"^\| \*(.+?)\* \|", text, re.M)) == set(VERDICTS)
    names = {one.name for one in STATISTICS.values()}
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        assert set(re.findall(r"`([a-z_0-9]+)`", row)) <= names, row


def test_a_name_in_two_groups_is_two_statistics() -> None:
    assert describe("effective_rank", "spectrum").title != describe("effective_rank", "hidden").title
    assert describe("singular_max", "hidden").group == "hidden"


def test_the_report_takes_what_was_recorded() -> None:
    assert drawn_statistics("spectrum", ["eig_var", "trace"]) == ["eig_var"]
    assert drawn_statistics("spectrum", ["eig_var", "sym_var"]) == ["sym_var", "eig_var"]
    assert drawn_statistics("spectrum", ["eig_var", "sym_var"], with_room=False) == ["sym_var"]
    assert drawn_statistics("of_a_new_monitor", ["b", "a"]) == ["b", "a"]
    assert describe("entropy_se", "attention").title == "standard error of attention entropy"
    assert describe("what_is_new").title == "what is new"
