"""Alarms of single statistics, compared: lead time and false alarms of each family, in one table.

    python benchmarks/collapse/alarms.py [--jobs 2] [--trained] [--cache FOLDER] [--out FILE]

Trains what is not in the cache, once a run with all statistics recorded, and evaluates alarms on the records.
Every statistic gets the same simple rules; its threshold and which of the rules are chosen on runs that were known
while rules were made, and reported on runs of fresh seeds, of the same recipes and of others. Last comes a slow
failure beside its healthy twin, on which nothing is chosen.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from evaluate import by_step, first_alarm  # noqa: E402
from run import _plain, in_parallel, is_recorded  # noqa: E402
from runs import CHOSEN_ON, FRESH, REFERENCES, SLOW, Run  # noqa: E402
from torch import Tensor  # noqa: E402
from truth import Truth, judge, reference  # noqa: E402

from lightning_qk.guard.detector import Sensitivity  # noqa: E402

DOC = HERE.parents[1] / "docs" / "attention-health.md"
OUT = HERE.parents[1] / "docs" / "alarms.json"
MARKS = "<!-- alarms: begin -->", "<!-- alarms: end -->"

MEASURED, EIGENVALUES, SINGULAR, UPDATES = "measurement", "eigenvalues", "singular values", "updates"
STATISTICS: dict[str, tuple[str, str, int]] = {
    # name: family, how it is computed from what was recorded, direction of an alarm
    "entropy_normalized": (MEASURED, "entropy_normalized", -1),
    "max_abs_logit": (MEASURED, "max_abs_logit", 1),
    "logit_std": (MEASURED, "logit_std", 1),
    "spectral_radius": (EIGENVALUES, "spectral_radius", 1),
    "sym_var": (EIGENVALUES, "sym_var", 1),
    "sigma_1": (SINGULAR, "sigma_1", 1),
    "energy_top_1": (SINGULAR, "energy_top_1", 1),
    "effective_rank": (SINGULAR, "effective_rank", -1),
    "stable rank of W_QK": (SINGULAR, "frobenius_sq / sigma_1 / sigma_1", -1),
    "update_ratio": (UPDATES, "update_ratio", 1),
    "update_delta2_norm": (UPDATES, "update_delta2_norm", 1),
    "update_delta2_stable_rank": (UPDATES, "update_delta2_stable_rank", -1),
    "update_delta2_effective_rank": (UPDATES, "update_delta2_effective_rank", -1),
    "update_delta3_norm": (UPDATES, "update_delta3_norm", 1),
    "update_delta3_stable_rank": (UPDATES, "update_delta3_stable_rank", -1),
    "update_delta3_effective_rank": (UPDATES, "update_delta3_effective_rank", -1),
    "Δ₃ over Δ₂, norms": (UPDATES, "update_delta3_norm / update_delta2_norm", 1),
}
RULES = ("level", "since start", "jump")
"""The level itself; against the first readings; against the readings of a window before."""
FACTORS = (256.0, 128.0, 64.0, 32.0, 16.0, 8.0, 4.0)
"""Growths of updates over a window of which the guard's is chosen; the largest of those that do as well."""
WINDOW, SMOOTH, PATIENCE = 8, 3, 2
"""Readings of a window; of which a median is taken; that have to be alarming in a row: as the guard has them."""
MOST_FALSE = 0.05
"""Share of the healthy runs to choose on in which a threshold may alarm."""


@dataclass(frozen=True)
class Rule:
    """When a statistic is alarming.

    Attributes:
        kind: one of :data:`RULES`.
        threshold: of the score, the logarithm of the statistic in the alarm's direction.
    """

    kind: str
    threshold: float


def scores(record: Mapping[str, Any], name: str, kind: str) -> tuple[list[int], Tensor]:
    """Steps of the readings, from 1, and the score at each: the worst layer's, a number that is none has −∞."""
    _, formula, sign = STATISTICS[name]
    first, *others = formula.split(" / ")
    steps, values, layers = by_step(record, first)
    for other in others:
        values = values / by_step(record, other)[1]
    # A number that overflows is as alarming as can be; one that is NaN (a head without rows) says nothing.
    means = torch.stack([part.nanmean(1) for part in values.split(layers, 1)], 1)
    logs = sign * means.clamp_min(1e-30).log()
    rows = [logs[max(0, i + 1 - SMOOTH) : i + 1].nanmedian(0).values for i in range(len(logs))]
    smooth = torch.stack(rows)
    if kind == "since start":
        smooth = smooth - logs[:SMOOTH].nanmedian(0).values
    elif kind == "jump":
        before = [
            logs[max(0, i + 1 - SMOOTH - WINDOW) : max(1, i + 1 - SMOOTH)].nanmedian(0).values
            for i in range(len(logs))
        ]
        smooth = smooth - torch.stack(before)
    worst = smooth.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(1)
    worst[: SMOOTH - 1] = -math.inf
    # Patience: as alarming as the least of the newest readings.
    lasting = torch.stack([worst[max(0, i + 1 - PATIENCE) : i + 1].amin() for i in range(len(worst))])
    return steps, lasting


def alarm(steps: Sequence[int], score: Tensor, threshold: float) -> int | None:
    """Step of the first alarm."""
    found = (score > threshold).nonzero()
    return steps[int(found[0])] if len(found) else None


@dataclass(frozen=True)
class Count:
    """What an alarm is worth on some runs.

    Attributes:
        warned: failing runs with an alarm before the step of failure.
        failing: failing runs.
        lead: median over all failing runs of the share of the steps to failure that the alarm left; 0 without one.
        false: healthy runs with an alarm.
        healthy: healthy runs.
    """

    warned: int
    failing: int
    lead: float
    false: int
    healthy: int


def count(alarms: Sequence[int | None], truths: Sequence[Truth]) -> Count:
    """Of alarms on runs."""
    leads, false = [], 0
    for step, truth in zip(alarms, truths, strict=True):
        if truth.failure is None:
            false += step is not None
        else:
            leads.append(max(0.0, 1 - step / truth.failure) if step is not None else 0.0)
    return Count(
        sum(lead > 0 for lead in leads),
        len(leads),
        statistics.median(leads) if leads else math.nan,
        false,
        len(truths) - len(leads),
    )


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), that of nothing at all is from 0 to 1."""
    if not total:
        return 0.0, 1.0
    share, part = count / total, z * z / total
    middle = (share + part / 2) / (1 + part)
    half = z / (1 + part) * math.sqrt(share * (1 - share) / total + part / total / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def choose(records: Sequence[Mapping[str, Any]], truths: Sequence[Truth], name: str) -> tuple[Rule, Count]:
    """The rule of a statistic that warns of most failures with few enough false alarms.

    Of all thresholds that do so equally well the middle is taken, so that runs a little louder than those at hand
    are no alarm; of the kinds of rule that warn of as many, the earliest.
    """
    allowed = MOST_FALSE * sum(truth.failure is None for truth in truths)
    best: tuple[tuple[float, ...], Rule, Count] | None = None
    for kind in RULES:
        series = [scores(record, name, kind) for record in records]
        reached = sorted({float(x) for _, score in series for x in score if math.isfinite(x)})
        tried: dict[int, list[float]] = {}
        for low, high in itertools.pairwise(reached[:: max(1, len(reached) // 1000)]):
            threshold = (low + high) / 2
            found = count([alarm(*one, threshold) for one in series], truths)
            if found.false <= allowed:
                tried.setdefault(found.warned, []).append(threshold)
        if not tried:
            continue
        most = tried[max(tried)]
        rule = Rule(kind, (most[0] + most[-1]) / 2)
        found = count([alarm(*one, rule.threshold) for one in series], truths)
        worth = (found.warned, found.lead)
        if found.false <= allowed and (best is None or worth > best[0]):
            best = worth, rule, found
    if best is None:
        raise ValueError(f"expected runs that have {name}, got none with numbers that differ: record it")
    return best[1], best[2]


def rows(records: Mapping[Run, Mapping[str, Any]], truths: Mapping[Run, Truth]) -> Iterator[dict[str, Any]]:
    """One row a statistic, and the guard's."""
    known, fresh, slow = ([run for run in runs if run in truths] for runs in (CHOSEN_ON, FRESH, SLOW))
    names = {run.name for run in known}
    parts = {
        "chosen_on": known,
        "reported_on": fresh,
        "reported_on_other_recipes": [run for run in fresh if run.name not in names],
        "slow": slow,
    }
    everything = [*known, *fresh, *slow]

    def row(family: str, name: str, rule: Rule | None, alarms: Mapping[Run, int | None]) -> dict[str, Any]:
        counted = {
            part: vars(count([alarms[run] for run in runs], [truths[run] for run in runs]))
            for part, runs in parts.items()
        }
        return {
            "family": family,
            "statistic": name,
            "rule": None if rule is None else vars(rule),
            **counted,
            "alarms": [
                {"run": run.name, "seed": run.seed, "step": alarms[run], "failure": truths[run].failure}
                for run in everything
            ],
        }

    for name, (family, _, _) in STATISTICS.items():
        rule, _ = choose([records[run] for run in known], [truths[run] for run in known], name)
        found = {run: alarm(*scores(records[run], name, rule.kind), rule.threshold) for run in everything}
        yield row(family, name, rule, found)
    for name, sensitivity in (
        ("CollapseGuard as it is", Sensitivity()),
        ("CollapseGuard with Sensitivity(update={:g})", _with_updates(records, truths, known)),
    ):
        guard = {run: first_alarm(records[run], sensitivity) for run in everything}
        yield row(
            "guard",
            name.format(sensitivity.update),
            None,
            {run: one and one.step for run, one in guard.items()},
        )


def _with_updates(
    records: Mapping[Run, Mapping[str, Any]], truths: Mapping[Run, Truth], runs: Sequence[Run]
) -> Sensitivity:
    """The guard with the factor that warns of most and earliest, with no more false alarms than without."""

    def judged(update: float) -> Count:
        found = [first_alarm(records[run], Sensitivity(update=update)) for run in runs]
        return count([one and one.step for one in found], [truths[run] for run in runs])

    plain = judged(0.0)
    kept = {update: found for update in FACTORS if (found := judged(update)).false <= plain.false}
    best = max(kept, key=lambda update: (kept[update].warned, kept[update].lead), default=FACTORS[0])
    return Sensitivity(update=best)


def benchmark(cache: Path, jobs: int, *, trained: bool = False) -> dict[str, Any]:
    """Train what is missing, and evaluate; or leave out what was not trained of the runs that report."""
    cache.mkdir(parents=True, exist_ok=True)
    plain = REFERENCES
    kept = [run for run in (*FRESH, *SLOW) if not trained or is_recorded(run, None, cache)]
    runs = [*CHOSEN_ON, *kept]
    found = in_parallel([(run, None) for run in (*plain, *runs)], cache, jobs, "runs")
    records = dict(zip((*plain, *runs), found, strict=True))
    healthy = {
        family: reference([records[run]["loss"] for run in plain if run.family == family])
        for family in {run.family for run in plain}
    }
    truths = {run: judge(records[run]["loss"], healthy[run.family]) for run in runs}
    return {
        "rows": list(rows(records, truths)),
        "runs": [
            {
                "name": run.name,
                "seed": run.seed,
                "part": "slow" if run in SLOW else "reported_on" if run.reports else "chosen_on",
                "outcome": truths[run].outcome,
                "failure": truths[run].failure,
                "final": truths[run].final,
                "steps": run.steps,
                "every": run.every,
            }
            for run in runs
        ],
        "seconds_of_training": sum(records[run]["seconds"] for run in (*plain, *runs)),
    }


def _of(number: int, total: int) -> str:
    low, high = wilson(number, total)
    return f"{number} of {total} ({low:.2f}–{high:.2f})"


def table(results: Mapping[str, Any]) -> str:
    """As Markdown."""
    heads = ["alarm", "rule", "chosen on: warned", "false", "fresh seeds: warned", "median lead", "false"]
    heads += ["of recipes not chosen on: warned", "slow failure: warned", "slow, healthy: false"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in results["rows"]:
        chosen, fresh, rule = row["chosen_on"], row["reported_on"], row["rule"]
        other, slow = row["reported_on_other_recipes"], row["slow"]
        sign = STATISTICS[row["statistic"]][2] if rule else 0
        limit = math.exp(sign * rule["threshold"]) if rule else 0.0
        words = f"{rule['kind']} {'>' if sign > 0 else '<'} {limit:.3g}" if rule else "its own"
        cells = [f"{row['family']}: {row['statistic']}", words]
        cells += [f"{chosen['warned']} of {chosen['failing']}", f"{chosen['false']} of {chosen['healthy']}"]
        cells += [_of(fresh["warned"], fresh["failing"]), f"{fresh['lead']:.2f}"]
        cells += [_of(fresh["false"], fresh["healthy"]), f"{other['warned']} of {other['failing']}"]
        slow_runs = {(run["name"], run["seed"]) for run in results["runs"] if run["part"] == "slow"}
        early = [
            f"{one['step']} before {one['failure']}"
            for one in row["alarms"]
            if (one["run"], one["seed"]) in slow_runs
            and None not in (one["step"], one["failure"])
            and one["step"] < one["failure"]
        ]
        cells.append(f"{slow['warned']} of {slow['failing']}" + (f": {', '.join(early)}" if early else ""))
        cells.append(f"{slow['false']} of {slow['healthy']}")
        lines.append("| " + " | ".join(cells) + " |")
    parts: dict[str, dict[str, list[str]]] = {}
    for run in results["runs"]:
        parts.setdefault(run["part"], {}).setdefault(run["name"], []).append(str(run["seed"]))
    told = {
        part: ", ".join(f"{name} {'/'.join(seeds)}" for name, seeds in runs.items())
        for part, runs in parts.items()
    }
    made = results["made"]
    lines += [
        "",
        "In brackets: the 95 % interval of the share (Wilson); too narrow if anything, as runs of one recipe are "
        "alike.",
        "",
        f"Made on {made['machine']} with torch {made['versions']['torch']}; `docs/alarms.json` has every run's "
        f"alarms. Runs with their seeds, chosen on: {told['chosen_on']}. Fresh: {told['reported_on']}. "
        f"Slow: {told['slow']}.",
    ]
    return "\n".join(lines)


def into_page(page: str, text: str) -> str:
    """The page with the table between its marks."""
    begin, end = MARKS
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument(
        "--trained", action="store_true", help="leave out runs that report and are not in the cache"
    )
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="folder of the runs' records")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="JSON file; the page gets its table beside docs'"
    )
    given = parser.parse_args(argv)
    start = time.perf_counter()
    results = benchmark(given.cache, given.jobs, trained=given.trained)
    results["made"] = {
        "seconds": round(time.perf_counter() - start, 1),
        "machine": f"{os.cpu_count()} cores {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning")},
    }
    text = table(results)
    print(text)
    given.out.write_text(json.dumps(_plain(results), indent=1, ensure_ascii=False) + "\n")
    if given.out == OUT:
        DOC.write_text(into_page(DOC.read_text(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
