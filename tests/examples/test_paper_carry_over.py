"""The logic of examples/paper/carry_over.py, on runs whose numbers are given."""

import math
from pathlib import Path
from typing import Any

import carry_over
import pytest
from carry_over import (
    COMPARED,
    SEEDS,
    SWEPT,
    Results,
    as_good,
    described,
    parts,
    ratio,
    smallest_ratio,
    stable,
)
from common import Clock, Options, read
from settings import configuration

NONE = ("baseline", None)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Losses of 5, less what a parabola in decades gives about a best coefficient of each setting and method."""
    opts = Options(quick=False, out=tmp_path, data=None, jobs=1, seeds=2)
    made = Results(opts, ["rough", "paper", "llama"])
    best = {("rough", "tokens"): 1.0, ("llama", "tokens"): 10.0, ("paper", "tokens"): 100.0}

    def train(setting: str, key: Any, seed: int, rate: float | None) -> dict[str, Any]:
        method, value = key
        gain = 0.0
        if (setting, method) in best:
            gain = 0.3 - 0.1 * abs(math.log10(value / best[setting, method])) + 0.01 * seed
        elif method == "limit" and setting == "rough":
            gain = 0.1 * (seed + 1)
        broken = {
            0.01: 0.0,
            0.03: 0.0,
            0.1: 0.0,
            0.3: 0.4,
            0.5: 0.6,
            1.0: math.nan if method == "baseline" else 0.6,
        }
        loss = 5.0 + 0.01 * seed - gain + (0.0 if rate is None else broken[rate])
        found = {"test": {"loss": loss}, "entropy": 0.5 + gain, "sink": 0.1, "max_logit": 4.0}
        return found | ({"weight": 1.0} if method == "limit" else {})

    def make(runs: list[Any]) -> None:
        made.runs |= {run: train(*run) for run in runs}

    made.make = make  # type: ignore[method-assign, assignment]
    return made


def make_all(results: Results) -> None:
    for part in parts(results):
        results.make([run for run in part if run[0] in results.settings])


def test_gains_are_paired_by_seed_and_have_students_interval(results: Results) -> None:
    make_all(results)
    row = described(results, "rough", COMPARED["limit"])
    assert row["seeds"] == len(SEEDS) == 5
    half = 2.776445 * 0.1 * math.sqrt(2.5) / math.sqrt(5)  # t of 4 degrees of freedom, gains 0.1 to 0.5
    assert row["gain"] == pytest.approx([0.3, 0.3 - half, 0.3 + half], rel=1e-5)
    assert row["same"] == 0
    assert row["entropy"] - row["entropy_without"] == pytest.approx(0.3)
    assert described(results, "paper", COMPARED["limit"])["same"] == 3


def test_coefficients_that_are_as_good_as_the_best() -> None:
    gains = {0.1: [0.1, 0.3, 0.2], 1.0: [0.3, 0.3, 0.3], 10.0: [0.0, 0.1, 0.0]}
    # 1 − 0.1: 0.2, 0, 0.1, whose interval is 0.1 ± 0.25; 1 − 10: 0.27 ± 0.14.
    assert as_good(gains) == (1.0, [0.1, 1.0])
    assert as_good({0.1: [0.0], 1.0: [0.0], 10.0: [-0.1]}) == (0.1, [0.1, 1.0])


def test_decades_between_settings() -> None:
    assert ratio([0.1, 10.0, 1.0]) == pytest.approx(2.0)
    assert smallest_ratio([[0.1, 1.0], [10.0, 100.0], [0.01, 100.0, 1.0]]) == pytest.approx(1.0)
    assert smallest_ratio([[0.1, 1.0], [1.0]]) == 0.0


def test_what_is_published(results: Results) -> None:
    make_all(results)
    carry_over.publish(results, Clock(), unigram=4.7)
    found = read("carry_over", results.opts.out)
    carry_over.draw(found, results.opts)
    assert found["decades"]["tokens"] == {"of_best": 2.0, "smallest": 2.0, "settings": 3}
    rough = next(row for row in found["settings"] if row["setting"] == "rough")
    assert rough["tokens_sweep"]["as_good"] == [1.0]
    assert rough["tokens_sweep"]["seeds"] == len(SWEPT["tokens"])
    assert {row["method"] for row in rough["others"]} >= {"qk_norm", "qk_clip"}
    assert (results.opts.out / "carry_over.png").is_file()


def test_the_largest_rate_up_to_which_all_trains(results: Results) -> None:
    for rate in carry_over.RATES:
        for key in (NONE, COMPARED["limit"]):
            results.make([("llama", key, 0, rate), ("llama", key, 1, rate)])
    found = stable(results, 5.2 - carry_over.TRAINS)["llama"]
    assert found["baseline"]["largest"] == 0.1  # 5.4 at 0.3 is too much
    assert found["baseline"]["learns"] is None  # 5.0 at 0.01
    assert stable(results, 5.02)["llama"]["baseline"]["learns"] == 0.1
    assert stable(results, 5.005)["llama"]["baseline"]["learns"] is None  # one seed of two
    assert found["baseline"]["losses"][0] == pytest.approx(5.005)
    assert found["baseline"]["losses"][-1] == math.inf
    assert stable(results, 5.5 - carry_over.TRAINS)["llama"]["limit"]["largest"] == 0.3
    assert stable(results, 4.9 - carry_over.TRAINS)["llama"]["limit"]["largest"] is None


def test_a_sweep_that_is_not_whole_is_left_out(results: Results) -> None:
    results.make([("rough", key, 0, None) for key in carry_over.sweep("tokens")[:3]])
    assert results.swept("rough", "tokens") == {}


def test_every_run_has_a_configuration() -> None:
    for setting, changed in carry_over.SHORT.items():
        for method in carry_over.SWEEP:
            for key in carry_over.sweep(method):
                assert configuration(setting, *key, 0, **changed)["steps"] == changed["steps"]


@pytest.mark.slow
def test_the_reduced_run(tmp_path: Path) -> None:
    carry_over.main(["--quick", "--data", "stdlib", "--out", str(tmp_path)])
    found = read("carry_over", tmp_path)
    assert {row["setting"] for row in found["settings"]} == {"paper", "vit"}
    assert all(row["limit"]["seeds"] == 1 for row in found["settings"])
    before = found["runs"]
    carry_over.main(["--quick", "--data", "stdlib", "--out", str(tmp_path)])
    assert read("carry_over", tmp_path)["runs"] == before
