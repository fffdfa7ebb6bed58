"""Cost of the measurements as ratios, each taken in one run, the median of several.

    python benchmarks/run.py [--json benchmarks/results.json]

Prints a table, writes JSON beside it, and exits with 1 when a bar is missed.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qk.functional import attention_statistics, qk_moments


class Result(NamedTuple):
    measure: str
    value: float
    bar: str
    met: bool
    detail: str


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median time of a call after one that is not counted."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def moments_against_eigenvalues() -> Result:
    """Every head of one layer of a GPT-2-small: moments against eigenvalues of d_model × d_model matrices."""
    heads, d_head, d_model = 12, 64, 768
    query, key = torch.randn(2, heads, d_head, d_model).unbind()
    ours = seconds(lambda: qk_moments(query, key), repeats=15)
    dense = seconds(lambda: torch.linalg.eigvals(query.mT @ key), repeats=3)
    return Result(
        "dense eigenvalues / moments, d_model 768, 12 heads",
        dense / ours,
        ">= 100",
        dense / ours >= 100,
        f"{dense * 1e3:.0f} ms / {ours * 1e3:.2f} ms",
    )


# One process a measurement. Linux resets its record of the peak when 5 is written to clear_refs: the peak of
# the imports would hide what comes after.
_PEAK = """
import re, torch
from lightning_qk.functional import attention_statistics
torch.manual_seed(0)
query, key = torch.randn(1, 12, {n}, 64), torch.randn(1, 12, {n}, 64)
attention_statistics(query[:, :, :64], key[:, :, :64], is_causal=True)
open("/proc/self/clear_refs", "w").write("5")
kib = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = kib()
if {ours}:
    attention_statistics(query, key, is_causal=True, rows={rows})
else:
    logits = query @ key.mT * 64**-0.5
    hidden = torch.ones({n}, {n}, dtype=torch.bool).triu(1)
    p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
print(kib() - before)
"""


def peak_mib(n: int, *, ours: bool, rows: int | None) -> float:
    code = _PEAK.format(n=n, ours=ours, rows=rows)
    values = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        values.append(int(done.stdout) / 1024)
    return statistics.median(values)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                # Broadcast dimensions take no memory.
                sizes = [s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
                self.elements = max(self.elements, math.prod(sizes))
        return out


def largest_tensor(heads: int) -> Result:
    n = 2048
    query, key = torch.randn(2, 1, heads, n, 64).unbind()
    with LargestTensor() as largest:
        attention_statistics(query, key, is_causal=True)
    share = largest.elements / n**2
    return Result(
        f"largest tensor that is made / one n × n map of one head, n = 2048, {heads} heads",
        share,
        "< 1",
        share < 1,
        f"{largest.elements:,} / {n**2:,} elements",
    )


def peak_memory() -> list[Result]:
    """Peak memory of the statistics beyond their inputs, against softmax on the whole map, and its growth."""
    n = 2048
    ours = peak_mib(n, ours=True, rows=None)
    eager = peak_mib(n, ours=False, rows=None)
    twice = peak_mib(2 * n, ours=True, rows=None)
    return [
        Result(
            "peak memory of statistics / of eager softmax and entropy, n = 2048, 12 heads",
            ours / eager,
            "<= 0.1",
            ours / eager <= 0.1,
            f"{ours:.0f} MiB / {eager:.0f} MiB",
        ),
        Result(
            "growth of peak memory, n 2048 to 4096 (linear: 2, quadratic: 4)",
            twice / ours,
            "<= 2.2",
            twice / ours <= 2.2,
            f"{twice:.0f} MiB / {ours:.0f} MiB",
        ),
    ]


def against_fused_attention(rows: int | None, bar: float) -> Result:
    """The statistics of sampled or all rows against one fused attention forward, n = 1024."""
    query, key = torch.randn(2, 4, 12, 1024, 64).unbind()
    forward = seconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True), 15
    )
    ours = seconds(lambda: attention_statistics(query, key, is_causal=True, rows=rows), 15)
    return Result(
        f"statistics of {rows or 'all'} rows / one sdpa forward, n = 1024, 12 heads, batch 4",
        ours / forward,
        f"<= {bar}",
        ours / forward <= bar,
        f"{ours * 1e3:.0f} ms / {forward * 1e3:.0f} ms",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results.json"))
    path = parser.parse_args().json
    torch.manual_seed(0)
    results = [
        moments_against_eigenvalues(),
        largest_tensor(1),
        largest_tensor(12),
        *peak_memory(),
        against_fused_attention(64, 0.5),
        against_fused_attention(None, 3.0),
    ]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    width = max(len(result.measure) for result in results)
    print(f"{machine['cores']} cores ({machine['processor']}), torch {machine['torch']}")
    for result in results:
        verdict = "ok" if result.met else "MISSED"
        print(
            f"{result.measure:<{width}}  {result.value:8.3g}  {result.bar:>8}  {verdict:>6}  {result.detail}"
        )
    path.write_text(
        json.dumps({"machine": machine, "results": [r._asdict() for r in results]}, indent=2) + "\n"
    )
    return 0 if all(result.met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
