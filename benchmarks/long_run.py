"""What a long run leaves in memory and on disk, without training: histories are given the numbers of its steps.

    python benchmarks/long_run.py [--steps 100000 --every 10 --layers 12 --heads 12] [--json OUT.json]

Prints a table: resident memory at a tenth of the run and at its end; time and size of the record, the checkpoint's
state and the report at a hundredth of the run and at its end; time, size and memory of the table of every head.
"""

import argparse
import json
import pickle
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_qk.record.forgotten import Forgotten
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.parquet import history_size, write_history
from lightning_qk.report.report import write_report

_STATISTICS = {
    "spectrum": ("sym_var", "eig_mean", "eig_var", "spectral_radius", "asymmetry", "concentration"),
    "attention": (
        "entropy_normalized",
        "entropy",
        "max_abs_logit",
        "sink_first",
        "linear_share",
        "entropy_se",
    ),
}


def resident() -> float:
    """MB of memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def begin(layers: int, heads: int) -> RunRecord:
    """A run of which nothing was measured yet."""
    record = RunRecord(info={"Model": "simulated"})
    for group in _STATISTICS:
        history = History([f"layer_{index:02d}" for index in range(layers)], [heads] * layers)
        history.forgotten = Forgotten()
        setattr(record, group, history)
    return record


def measure(record: RunRecord, step: int, generator: torch.Generator) -> None:
    """One measured step of both monitors."""
    for group, names in _STATISTICS.items():
        history: History = getattr(record, group)
        values = torch.rand(len(names), sum(history.heads), generator=generator)
        states = torch.zeros(sum(history.heads), dtype=torch.int8)
        history.append(step, dict(zip(names, values.unbind(), strict=True)), states)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of an action, the least of three, and what it gave."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        found = action()
        best = min(best, time.process_time() - start)
    return best, found


def saved(record: RunRecord, folder: Path) -> dict[str, float]:
    """Seconds and MB of what is written while a run goes on."""
    seconds, path = timed(lambda: record.save(folder / "record.safetensors"))
    state_seconds, state = timed(
        lambda: pickle.dumps([history.state_dict() for history in record.histories.values()])
    )
    load_seconds, _ = timed(lambda: RunRecord.load(path))
    page_seconds, page = timed(lambda: write_report(record, folder / "report.html"))
    return {
        "record_s": seconds,
        "record_mb": path.stat().st_size / 1e6,
        "state_s": state_seconds,
        "state_mb": len(state) / 1e6,
        "resume_s": load_seconds,
        "report_s": page_seconds,
        "report_mb": page.stat().st_size / 1e6,
    }


def simulate(steps: int, every: int, layers: int, heads: int) -> dict[str, Any]:
    """All figures of one run."""
    record, generator = begin(layers, heads), torch.Generator().manual_seed(0)
    memory: dict[str, float] = {}
    found: dict[str, Any] = {"memory_mb": memory}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock = time.process_time()
        for step in range(0, steps, every):
            measure(record, step, generator)
            if step == steps // 100:
                found["early"] = saved(record, folder)
            if step == steps // 10:
                memory["a tenth"] = resident()
        memory["end"] = resident()
        found["appending_s"] = time.process_time() - clock
        found["late"] = saved(record, folder)
        expected, before = history_size(record), resident()
        clock = time.process_time()
        path = write_history(record, folder / "history.parquet")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        found["table"] = {
            "s": time.process_time() - clock,
            "mb": path.stat().st_size / 1e6,
            "told_mb": expected / 1e6,
            "peak_over_before_mb": peak - before,
        }
    return found


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("steps", 100_000), ("every", 10), ("layers", 12), ("heads", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = simulate(options.steps, options.every, options.layers, options.heads)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    early, late, table = found["early"], found["late"], found["table"]
    memory = found["memory_mb"]
    print("| measure | figure | detail |\n|---|---:|---|")
    growth = memory["end"] / memory["a tenth"] - 1
    print(f"| memory at the end over that at a tenth | {growth:+.1%} | {memory['end']:.0f} MB |")
    for what in ("record", "state", "report"):
        ratio = late[f"{what}_s"] / early[f"{what}_s"]
        size = f"{late[what + '_s']:.2f} s, {late[what + '_mb']:.2f} MB"
        print(f"| {what}: time at the end over that at a hundredth | {ratio:.2f} | {size} |")
    print(f"| reading the record | {late['resume_s']:.3f} s | |")
    taken = f"{table['s']:.1f} s, {table['peak_over_before_mb']:.0f} MB of memory"
    print(f"| table of every head | {table['mb']:.0f} MB | {taken}; told before: {table['told_mb']:.0f} MB |")


if __name__ == "__main__":
    main()
