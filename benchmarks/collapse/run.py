"""Early warning of collapse on real training runs: train, warn, and rescue.

    python benchmarks/collapse/run.py [--quick | --again] [--jobs 2] [--out FILE]

Trains what is not in the cache, shows the records to the guard's detectors, trains the failing runs once more with
a guard that helps, prints a table and writes JSON. What counts as an alarm was chosen on one half of the runs and
on earlier draws of the other; so is what the remedy is. The other half reports, with seeds of its own.
``--again`` shows the reporting half alone to the detectors as they are now, and puts that into the file beside
what was there: no test on unseen runs any more, but of whether a change lost something.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1]))

from evaluate import first_alarm, rescued, summary, told  # noqa: E402
from runs import DRIVEN, EVERY, REFERENCES, ROUGH, Run  # noqa: E402
from train import train  # noqa: E402
from truth import MARGIN, final, judge, reference  # noqa: E402

from lightning_qk.guard.detector import Sensitivity  # noqa: E402

REMEDIES: dict[str, dict[str, Any]] = {
    "0.1, 10, 40": {"factor": 0.1, "tau": 10.0, "warmup": 40},
    "0.2, 10, 40": {"factor": 0.2, "tau": 10.0, "warmup": 40},
    "0.3, 10, 40": {"factor": 0.3, "tau": 10.0, "warmup": 40},
}
"""Factor of the learning rate, τ of QK-Clip, and steps to the smaller rate where a run goes back to its start."""
BARS = {"share_warned_before": 0.9, "median_lead": 0.1, "false_alarms": 1, "share_rescued": 0.7}


def _path(run: Run, remedy: str | None, cache: Path) -> Path:
    key: dict[str, Any] = run.key()
    if remedy is not None:
        key["guard"] = {
            **REMEDIES[remedy],
            "rollback": "to what a whole window confirmed, or the start, always warmed up",
            "sensitivity": asdict(Sensitivity()),
        }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache / f"{run.name}.{digest}.json"


def is_recorded(run: Run, remedy: str | None, cache: Path) -> bool:
    """Whether the cache has a run."""
    return _path(run, remedy, cache).is_file()


def record(run: Run, remedy: str | None, cache: str) -> dict[str, Any]:
    """A run's record; with a remedy, of the run with a guard that helps. Trained if the cache does not have it."""
    path = _path(run, remedy, Path(cache))
    if not path.is_file():
        found = (
            train(run, cache, monitors=not run.reference)
            if remedy is None
            else _guarded(run, cache, **REMEDIES[remedy])
        )
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        partial.replace(path)
    return json.loads(path.read_text())


def _guarded(run: Run, cache: str, factor: float, tau: float, warmup: int) -> dict[str, Any]:
    from lightning_qk import CollapseGuard, QKClip

    guard = CollapseGuard(
        QKClip(tau),
        every_n_steps=EVERY,
        rollback=True,
        lr_factor=factor,
        lr_warmup=warmup,
        checkpoint_every=2 * EVERY,
    )
    found = train(run, cache, [guard], monitors=False)
    alarms = [{"step": verdict.step, "reason": verdict.reason} for verdict in guard.verdicts]
    return {**found, "alarms": alarms, "rolled_back_to": guard.rolled_back_to}


def in_parallel(
    calls: Sequence[tuple[Run, str | None]], cache: Path, jobs: int, label: str
) -> list[dict[str, Any]]:
    """Records of many runs, in order, in fresh processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they import torch
    out = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(record, run, remedy, str(cache)) for run, remedy in calls]
        for done, ((run, _), future) in enumerate(zip(calls, futures, strict=True), 1):
            out.append(future.result())
            print(f"  {label}: {done} of {len(calls)}, {run.name}", file=sys.stderr, flush=True)
    return out


def benchmark(families: Sequence[str], cache: Path, jobs: int) -> dict[str, Any]:
    """Everything, on some families."""
    cache.mkdir(parents=True, exist_ok=True)
    runs = [run for run in (*DRIVEN, *ROUGH) if run.family in families]
    plain = [run for run in REFERENCES if run.family in families]
    found = in_parallel([(run, None) for run in (*plain, *runs)], cache, jobs, "runs")
    records = dict(zip((*plain, *runs), found, strict=True))
    healthy = {
        family: reference([records[run]["loss"] for run in plain if run.family == family])
        for family in families
    }
    truths = {run: judge(records[run]["loss"], healthy[run.family]) for run in runs}
    rows = {run: told(run, truths[run], first_alarm(records[run])) for run in runs}
    failing = [run for run in runs if truths[run].fails]
    tried = [(run, remedy) for remedy in REMEDIES for run in failing if not run.reports]
    helped = dict(zip(tried, in_parallel(tried, cache, jobs, "helped"), strict=True))

    def ratio(run: Run, remedy: str) -> float:
        """Of the final loss to the healthy one; a loss that is no number is worse than any."""
        found = final(helped[run, remedy]["loss"]) / healthy[run.family].final
        return found if math.isfinite(found) else 1e3

    def worth(remedy: str) -> tuple[int, float]:
        ratios = [ratio(run, remedy) for run in failing if not run.reports]
        return sum(one <= MARGIN for one in ratios), -math.fsum(ratios)

    remedy = max(REMEDIES, key=worth)
    reports: list[tuple[Run, str | None]] = [(run, remedy) for run in failing if run.reports]
    helped |= dict(zip(reports, in_parallel(reports, cache, jobs, "helped"), strict=True))
    for run in failing:
        own = helped[run, remedy]
        rows[run]["helped_final"] = final(own["loss"])
        rows[run]["rescued"] = rescued(own["loss"], healthy[run.family])
        rows[run]["alarms"] = [alarm["step"] for alarm in own["alarms"]]
        rows[run]["rolled_back_to"] = own["rolled_back_to"]
    halves = {
        "chosen_on": [row for run, row in rows.items() if not run.reports],
        "reported_on": [row for run, row in rows.items() if run.reports],
    }
    out: dict[str, Any] = {
        "healthy_final": {name: one.final for name, one in healthy.items()},
        "remedy": REMEDIES[remedy],
        "remedies": {
            name: {
                "rescued": worth(name)[0],
                "mean_ratio": -worth(name)[1] / max(1, len(tried) // len(REMEDIES)),
            }
            for name in REMEDIES
        },
    }
    for name, half in halves.items():
        lost = [row for row in half if row["failure"] is not None]
        count = sum(row["rescued"] for row in lost)
        out[name] = {**summary(half), "rescued": count, "share_rescued": count / max(1, len(lost))}
    out["sensitivity"] = asdict(Sensitivity())
    out["runs"] = list(rows.values())
    out["training_seconds"] = sum(one["seconds"] for one in (*records.values(), *helped.values()))
    return out


def watched_again(cache: Path, jobs: int) -> dict[str, Any]:
    """What the detectors say now of the runs that reported."""
    cache.mkdir(parents=True, exist_ok=True)
    runs = [run for run in (*DRIVEN, *ROUGH) if run.reports]
    plain = [run for run in REFERENCES if run.family in {other.family for other in runs}]
    found = in_parallel([(run, None) for run in (*plain, *runs)], cache, jobs, "runs")
    records = dict(zip((*plain, *runs), found, strict=True))
    rows = []
    for run in runs:
        own = [records[one]["loss"] for one in plain if one.family == run.family]
        rows.append(told(run, judge(records[run]["loss"], reference(own)), first_alarm(records[run])))
    return {**summary(rows), "sensitivity": asdict(Sensitivity()), "runs": rows}


def met(half: Mapping[str, Any]) -> dict[str, bool]:
    """Which bars a half meets."""
    tests: dict[str, Callable[[float, float], bool]] = {"false_alarms": lambda value, bar: value <= bar}
    return {
        name: half[name] is not None and tests.get(name, lambda value, bar: value >= bar)(half[name], bar)
        for name, bar in BARS.items()
    }


def show(results: Mapping[str, Any]) -> None:
    """Print the runs and both halves."""
    print(
        f"{'run':24} {'outcome':9} {'failure':>7} {'warned':>6} {'lead':>5} {'final':>6} {'helped':>6}  why"
    )
    for row in results["runs"]:
        lead = "" if row["lead"] is None else f"{row['lead']:.2f}"
        helped = f"{row['helped_final']:.3f}{'' if row['rescued'] else ' no'}" if "rescued" in row else ""
        name = f"{row['name']} {row['seed']}"
        print(
            f"{name:24} {row['outcome']:9} {row['failure'] or '':>7} {row['warned'] or '':>6} {lead:>5} "
            f"{row['final']:6.3f} {helped:>6}  {row['reason'][:60]}"
        )
    for name in ("chosen_on", "reported_on"):
        half = results[name]
        print(
            f"{name}: warned before {half['warned_before']} of {half['failing']} failing runs, median lead "
            f"{half['median_lead']}, {half['false_alarms']} false alarms in {half['healthy']} healthy runs, "
            f"{half['rescued']} of {half['failing']} within {MARGIN - 1:.0%} of the healthy loss with a remedy"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the vision family, a few minutes")
    parser.add_argument("--again", action="store_true", help="only warnings, of the half that reports")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="folder of the runs' records")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: results.json or quick.json beside this script)"
    )
    given = parser.parse_args(argv)
    start = time.perf_counter()
    if given.again:
        path = given.out or HERE / "results.json"
        found = watched_again(given.cache, given.jobs)
        found["made"] = _made(given.jobs, start)
        told_before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(_plain({**told_before, "again": found}), indent=1) + "\n")
        print({name: value for name, value in found.items() if name not in ("runs", "sensitivity")})
        return 0
    results = benchmark(
        ["vit"] if given.quick else list(dict.fromkeys(run.family for run in DRIVEN)), given.cache, given.jobs
    )
    results["bars"] = {name: met(results[name]) for name in ("chosen_on", "reported_on")}
    results["made"] = {"quick": given.quick, **_made(given.jobs, start)}
    show(results)
    out = given.out or HERE / ("quick.json" if given.quick else "results.json")
    out.write_text(json.dumps(_plain(results), indent=1) + "\n")
    return 0 if all(results["bars"]["reported_on"].values()) else 1


def _made(jobs: int, start: float) -> dict[str, Any]:
    return {
        "jobs": jobs,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{os.cpu_count()} cores {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning")},
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN; numbers keep six digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    sys.exit(main())
