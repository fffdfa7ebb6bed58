"""Alarms of single statistics on records that were made up, and the page that has their table."""

import json
import math
from pathlib import Path

import pytest
import scipy.stats

ROOT = Path(__file__).parents[2]


@pytest.fixture
def alarms(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "collapse"))
    import alarms

    return alarms


def record(course, *, layers=2, heads=2, readings=20, broken=False):
    """Of a run whose last layer's spectral norm has a course; weights are also remembered at the start."""

    def row(index):
        values = [1.0] * heads * (layers - 1) + [course(index)] * heads
        return [math.nan, *values[1:]] if broken else values

    steps = [4 * (index + 1) for index in range(readings)]
    return {
        "cosine": {"steps": steps},
        "attention": {"values": {}},
        "spectrum": {
            "steps": [-1, *(step - 1 for step in steps)],
            "heads": [heads] * layers,
            "values": {"sigma_1": [row(-1), *map(row, range(readings))]},
        },
    }


@pytest.mark.parametrize("broken", [False, True])
def test_an_alarm_needs_a_median_and_patience(alarms, broken):
    """A step at reading 10: the median of three has it one reading later, patience another."""
    risen = record(lambda index: 10.0 if index >= 10 else 1.0, broken=broken)
    for kind, from_below in (("level", 0.0), ("since start", 0.0), ("jump", 0.0)):
        steps, score = alarms.scores(risen, "sigma_1", kind)
        assert score[:11].max() <= from_below
        assert alarms.alarm(steps, score, math.log(5.0)) == 4 * (10 + 3)
        assert alarms.alarm(steps, score, math.log(20.0)) is None
    outlier = record(lambda index: 1e9 if index == 10 else 1.0)
    assert alarms.alarm(*alarms.scores(outlier, "sigma_1", "level"), math.log(5.0)) is None
    slow = record(lambda index: 1.05**index)
    assert alarms.scores(slow, "sigma_1", "jump")[1].max() < math.log(1.05) * 12


def test_a_threshold_is_the_best_one_without_false_alarms(alarms):
    from truth import Truth

    runs = [record(lambda index, rate=rate: math.exp(rate * index)) for rate in (0.0, 0.02, 0.1, 0.3, 0.3)]
    fine, sick = Truth("fine", 1.0, None), Truth("diverged", 9.0, 60)
    truths = [fine, fine, sick, sick, Truth("diverged", 9.0, 4)]
    rule, found = alarms.choose(runs, truths, "sigma_1")
    # The last one fails before anything can be told.
    assert (found.warned, found.failing, found.false, found.healthy) == (2, 3, 0, 2)
    peak = max(float(alarms.scores(run, "sigma_1", rule.kind)[1].max()) for run in runs[:2])
    assert rule.threshold > peak
    assert 0 < found.lead < 1
    late = alarms.count([64, None, None, 10, 5], truths)
    assert (late.warned, late.false) == (1, 1)


def test_intervals_are_wilsons(alarms):
    for count, total in ((0, 9), (3, 10), (9, 9)):
        want = scipy.stats.binomtest(count, total).proportion_ci(method="wilson")
        assert alarms.wilson(count, total) == pytest.approx((want.low, want.high), abs=1e-4)
    assert alarms.wilson(0, 0) == (0.0, 1.0)


def test_no_run_that_chooses_reports(alarms):
    def keys(runs):
        return {(run.name, run.seed) for run in runs}

    assert not keys(alarms.CHOSEN_ON) & keys(alarms.FRESH)
    from runs import DRIVEN, ROUGH

    assert not keys([*DRIVEN, *ROUGH]) & keys(alarms.FRESH)
    assert any(run.name.startswith("bert") and run.seed > 520 for run in alarms.FRESH)


def test_the_page_has_the_table_of_the_json(alarms):
    found = json.loads((ROOT / "docs" / "alarms.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "attention-health.md").read_text(encoding="utf-8")
    assert alarms.into_page(page, alarms.table(found)) == page
    names = {row["statistic"] for row in found["rows"]}
    assert names >= set(alarms.STATISTICS)
