"""The logic of examples/paper/carry_over.py, on runs whose numbers are given."""

import math
from pathlib import Path
from typing import Any

import carry_over
import pytest
from carry_over import SEEDS, SHARES, Results, decades, described, parts, stable, sweep
from common import Clock, Options, read
from train import configuration


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Losses of 5, less what a parabola in decades gives about a best coefficient of each setting and method."""
    opts = Options(quick=False, out=tmp_path, data=None, jobs=1, seeds=2)
    made = Results(opts, ["paper", "vit"])
    best = {
        ("paper", "tokens"): 1.0,
        ("vit", "tokens"): 10.0,
        ("paper", "variance"): 0.01,
        ("vit", "variance"): 10.0,
    }

    def run(setting: str, key: Any, seed: int, rate: float | None = None) -> None:
        method, value = key
        gain = 0.0
        if (setting, method) in best:
            gain = 0.3 - 0.1 * abs(math.log10(value / best[setting, method]))
        elif method == "share":
            gain = {100: 0.1, 0: 0.2, 1: 0.3}[seed]
        loss = 5.0 + 0.01 * seed - gain + (0.0 if rate is None else {1e-2: 0.0, 3e-2: 0.4, 1e-1: 0.6}[rate])
        if rate == 1e-1 and method == "share":
            loss = math.nan
        found = {"test": {"loss": loss}, "entropy": 0.5 + gain, "sink": 0.1, "max_logit": 4.0}
        made.runs[setting, key, seed, rate] = found | ({"weight": 2.0 + seed} if method == "share" else {})

    made.run = run  # type: ignore[method-assign]
    return made


def make_all(results: Results) -> None:
    for part in parts(results):
        for setting, key, seed, rate in part:
            if setting in results.settings:
                results.run(setting, key, seed, rate)


def test_coefficients_come_from_one_setting(results: Results) -> None:
    assert results.chosen() == {}
    make_all(results)
    assert results.chosen()["tokens"] == ("tokens", 1.0)
    assert results.chosen()["variance"] == ("variance", 0.01)
    assert max(results.tried("vit", "tokens"), key=results.tried("vit", "tokens").__getitem__) == 10.0


def test_gains_are_paired_by_seed_and_have_students_interval(results: Results) -> None:
    make_all(results)
    row = described(results, "paper", SHARES["share"])
    assert row["seeds"] == len(SEEDS) == 3
    half = 4.302653 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom, deviation 0.1
    assert row["gain"] == pytest.approx([0.2, 0.2 - half, 0.2 + half], rel=1e-5)
    assert row["weight"] == [2.0, 102.0]
    assert row["entropy"] - row["entropy_without"] == pytest.approx(0.2)


def test_what_is_published_has_the_decades_between_settings(results: Results) -> None:
    make_all(results)
    carry_over.publish(results, Clock())
    found = read("carry_over", results.opts.out)
    carry_over.draw(found, results.opts)
    assert found["decades"]["tokens"] == pytest.approx(1.0)
    assert found["decades"]["variance"] == pytest.approx(3.0)
    vit = next(row for row in found["settings"] if row["setting"] == "vit")
    assert vit["variance"]["best"] == 10.0
    assert vit["variance"]["lost"] == pytest.approx(0.3)  # against the one-layer setting's 0.01
    assert (results.opts.out / "carry_over.png").is_file()


def test_decades_of_nothing_are_none() -> None:
    assert decades([{"tokens": {}}], "tokens") is None


def test_the_largest_rate_that_trains(results: Results) -> None:
    for rate in (1e-2, 3e-2, 1e-1):
        for key in (("baseline", None), SHARES["share"]):
            results.run("llama", key, SEEDS[0], rate)
    found = stable(results)["llama"]
    assert found["baseline"]["largest"] == 3e-2  # 0.6 above the best is more than TRAINS
    assert found["share"]["largest"] == 3e-2
    assert found["share"]["losses"][2] == math.inf


def test_a_sweep_that_is_not_whole_chooses_nothing(results: Results) -> None:
    for key in sweep()[:3]:
        results.run("paper", key, SEEDS[0])
    assert results.tried("paper", "tokens") == {}
    assert "tokens" not in results.chosen()


def test_every_run_has_a_configuration() -> None:
    for setting, changed in carry_over.SHORT.items():
        for key in sweep():
            assert configuration(setting, *key, 0, **changed)["steps"] == changed["steps"]


@pytest.mark.slow
def test_the_reduced_run(tmp_path: Path) -> None:
    carry_over.main(["--quick", "--data", "stdlib", "--out", str(tmp_path)])
    found = read("carry_over", tmp_path)
    assert {row["setting"] for row in found["settings"]} == {"paper", "vit"}
    for row in found["settings"]:
        assert row["tokens"]["sweep"]
        assert row["share"]["seeds"] == 1
    before = found["runs"]
    carry_over.main(["--quick", "--data", "stdlib", "--out", str(tmp_path)])
    assert read("carry_over", tmp_path)["runs"] == before
