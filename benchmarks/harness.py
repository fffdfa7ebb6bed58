"""What the benchmarks share: timing side by side, verdicts, tables and JSON."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Result(NamedTuple):
    """One measured ratio.

    Attributes:
        name: short, for the command line and the JSON file.
        measure: what was divided by what, and on what.
        value: the ratio.
        bar: its upper bound.
        detail: both sides, and how they were measured.
    """

    name: str
    measure: str
    value: float
    bar: float
    detail: str

    @property
    def met(self) -> bool:
        return self.value <= self.bar


clock = time.perf_counter
"""What times are taken with; the processor's time bears other programs beside it."""


def side_by_side(actions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each call, the actions in turn, so that what slows the machine slows all of them.

    The first round warms up and is not counted.
    """
    times: list[list[float]] = [[] for _ in actions]
    for index in range(repeats + 1):
        for action, seen in zip(actions, times, strict=True):
            start = clock()
            action()
            if index:
                seen.append(clock() - start)
    return times


def median_ratio(times: Sequence[Sequence[float]]) -> float:
    """Median over rounds of the first over the second."""
    return statistics.median(a / b for a, b in zip(times[0], times[1], strict=True))


def milliseconds(times: Sequence[Sequence[float]]) -> str:
    return " / ".join(f"{statistics.median(seen) * 1e3:.3g} ms" for seen in times)


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent of the power law through points, by least squares on logarithms: 1 is linear, 2 quadratic."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    return statistics.linear_regression(x, y).slope


def processor() -> str:
    """Name of the processor, as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    facts: dict[str, str | int] = {
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def show(results: Sequence[Result]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    facts = machine()
    title = f"{facts['cores']} cores ({facts['processor']}), torch {facts['torch']}"
    if "gpu" in facts:
        title += f", {facts['gpu']}"
    table = Table(title=title, title_justify="left")
    for column in ("name", "measure", "ratio", "bar", "", "detail"):
        table.add_column(column, overflow="fold", justify="right" if column in ("ratio", "bar") else "left")
    for result in results:
        verdict = "[green]met[/]" if result.met else "[bold red]missed[/]"
        table.add_row(
            result.name, result.measure, f"{result.value:.4g}", f"≤ {result.bar:g}", verdict, result.detail
        )
    Console(width=None if os.isatty(1) else 200).print(table)


def write(path: Path, results: Sequence[Result]) -> None:
    """Write results as JSON; those of other benchmarks in the file stay where the machine is the same."""
    facts, merged = machine(), {}
    if path.exists():
        before = json.loads(path.read_text())
        if before.get("machine") == facts:
            merged = {entry["name"]: entry for entry in before["results"]}
    merged.update({result.name: {**result._asdict(), "met": result.met} for result in results})
    text = json.dumps({"machine": facts, "results": list(merged.values())}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n")
