"""What the report of a run that goes on costs: the thread that trains, and the one that writes.

    python benchmarks/live_report.py [--layers 32 --heads 32 --points 60]

Prints, for a record of random numbers (the worst case for the page's size): what gathering takes of the training's
thread; what a writing takes, of record and page; how much of every 30 seconds that is in processor time, which
does not depend on what else the machine does and is the most that a training on one core can lose; and how much
longer Python code beside it takes meanwhile, by the clock, which a training that is bound by Python would feel.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from lightning_qk.callbacks.monitors._live import LivePage, frozen
from lightning_qk.record.history import History, RunRecord

_STATISTICS = {
    "spectrum": ("sym_var", "eig_mean", "eig_var", "spectral_radius", "asymmetry", "trace", "frobenius_sq"),
    "attention": (
        "entropy_normalized", "entropy", "max_abs_logit", "sink_first", "linear_share", "max_prob", "distance",
    ),
}  # fmt: skip


def random_record(layers: int, heads: int, points: int) -> RunRecord:
    """Histories of both monitors with random numbers."""
    record = RunRecord(info={"Model": "random"})
    for group, names in _STATISTICS.items():
        history = History([f"layer_{i:02d}" for i in range(layers)], [heads] * layers)
        for step in range(points):
            history.append(step, {name: torch.rand(layers * heads) for name in names})
        setattr(record, group, history)
    return record


def busy(seconds: float) -> int:
    """How often a loop of plain Python goes round."""
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        rounds += 1
    return rounds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("layers", 32), ("heads", 32), ("points", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    record = random_record(options.layers, options.heads, options.points)
    begin = time.thread_time()
    still = frozen(record)
    gathering = time.thread_time() - begin
    with tempfile.TemporaryDirectory() as folder:
        page = LivePage(1.0)
        page._write(still, Path(folder))  # what is imported and compiled once
        begin, cpu = time.perf_counter(), time.process_time()
        page._write(still, Path(folder))
        writing, cpu = time.perf_counter() - begin, time.process_time() - cpu
        alone = busy(2.0)
        page.start(still, Path(folder))
        rounds, begin = 0, time.perf_counter()
        while page.is_busy:
            rounds += busy(0.01)
        beside = time.perf_counter() - begin
        sizes = {path.suffix: path.stat().st_size for path in Path(folder).iterdir()}
    slower = 1 - rounds / beside / (alone / 2.0)
    print(
        f"{options.layers} × {options.heads} heads, {options.points} steps: page {sizes['.html'] / 1e6:.2f} MB, ",
        end="",
    )
    print(f"record {sizes['.safetensors'] / 1e6:.2f} MB")
    print(f"gathering, in the training's thread: {1e3 * gathering:.1f} ms of CPU")
    print(f"writing, in a thread of its own: {writing:.2f} s, {cpu:.2f} s of CPU")
    print(f"of every 30 s, in processor time: {100 * (gathering + cpu) / 30:.2f} %")
    print(f"Python code beside it: {100 * slower:.0f} % slower for {beside:.1f} s")
    print(f"of every 30 s, by the clock: {100 * slower * beside / 30:.2f} %")


if __name__ == "__main__":
    main()
