"""The functions alone: moments, and statistics of attention rows."""

import math
import statistics
import subprocess
import sys

import torch
from harness import Result, median_ratio, milliseconds, side_by_side, slope
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_qk.functional import attention_statistics, qk_moments

# Shapes of GPT-2-small.
HEADS, D_HEAD, D_MODEL, LAYERS = 12, 64, 768, 12


def moments() -> list[Result]:
    """Every head of a GPT-2-small: all moments against eigenvalues of its d_model × d_model matrices."""
    query, key = torch.randn(2, LAYERS, HEADS, D_HEAD, D_MODEL).unbind()
    # Dense eigenvalues of one layer, twelve times: each takes seconds.
    times = side_by_side(
        [lambda: qk_moments(query, key), lambda: torch.linalg.eigvals(query[0].mT @ key[0])], repeats=3
    )
    times[1] = [LAYERS * seconds for seconds in times[1]]
    return [
        Result(
            "moments",
            "moments / dense eigenvalues, every head of a GPT-2-small",
            median_ratio(times),
            1 / 300,
            f"{milliseconds(times)}; dense: one layer × 12",
        )
    ]


def qkv(n: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(2, batch, HEADS, n, D_HEAD).unbind()


def rows() -> list[Result]:
    """Sampled rows and all rows against one fused attention forward."""
    query, key = qkv(1024, batch=4)
    out = []
    for name, count, bar, repeats in (("rows_sampled", 64, 0.5, 61), ("rows_all", None, 3.0, 31)):
        times = side_by_side(
            [
                lambda count=count: attention_statistics(query, key, is_causal=True, rows=count),
                lambda: scaled_dot_product_attention(query, key, key, is_causal=True),
            ],
            repeats,
        )
        out.append(
            Result(
                name,
                f"statistics of {count or 'all'} rows / one sdpa forward; n 1024, 12 heads, batch 4, causal",
                median_ratio(times),
                bar,
                milliseconds(times),
            )
        )
    return out


def dense_statistics(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """The statistics of all rows from the whole n × n map, as one would write them."""
    n = query.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    logits = query @ key.mT * D_HEAD**-0.5
    p = logits.masked_fill(hidden, -math.inf).softmax(-1)
    count = torch.arange(1, n + 1.0)
    centred = logits.masked_fill(hidden, 0.0)
    mean = centred.sum(-1) / count
    deviation = (logits - mean[..., None]).masked_fill(hidden, 0.0)
    window = 1 / count[:, None] + deviation / count[:, None]
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs().float()
    entropy = torch.special.entr(p).sum(-1)
    travelled = (p * distance).sum(-1)
    received = p.sum(-2) / torch.arange(n, 0, -1)
    return {
        "entropy": entropy,
        "entropy_normalized": entropy[..., 1:] / count[1:].log(),
        "participation": 1 / p.square().sum(-1),
        "max_prob": p.amax(-1),
        "max_logit": logits.masked_fill(hidden, -math.inf).amax((-1, -2)),
        "max_abs_logit": centred.abs().amax((-1, -2)),
        "logit_std": (deviation.square().sum(-1) / count).sqrt(),
        "distance": travelled,
        "distance_spread": ((distance - travelled[..., None]).square() * p).sum(-1).sqrt(),
        "diagonal": p.diagonal(dim1=-2, dim2=-1),
        "sink_first": p[..., 0],
        "sink_rate": (received[..., : n * 3 // 4] > 0.3).float().mean(-1),
        "linear_share": ((window > 0) & (window < 1) & ~hidden).sum(-1) / count,
    }


# One process a measurement. Linux resets its record of the peak when 5 is written to clear_refs: the peak of
# the imports would hide what comes after.
_PEAK = """
import re, sys, torch
sys.path.insert(0, {here!r})
from functions import dense_statistics, qkv
from lightning_qk.functional import attention_statistics
query, key = qkv({n})
attention_statistics(query[:, :, :64], key[:, :, :64], is_causal=True)
open("/proc/self/clear_refs", "w").write("5")
kib = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = kib()
{call}
print(kib() - before)
"""
OURS, DENSE = "attention_statistics(query, key, is_causal=True)", "dense_statistics(query, key)"


def peak_mib(n: int, call: str) -> float:
    """Peak memory of a call beyond what was there, the median of three processes."""
    from pathlib import Path

    code = _PEAK.format(here=str(Path(__file__).parent), n=n, call=call)
    values = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        values.append(int(done.stdout) / 1024)
    return statistics.median(values)


def dense() -> list[Result]:
    """All rows against an eager softmax with the same statistics: time and memory."""
    query, key = qkv(2048)
    times = side_by_side(
        [
            lambda: attention_statistics(query, key, is_causal=True),
            lambda: dense_statistics(query, key),
        ],
        repeats=7,
    )
    ours, eager, twice = peak_mib(2048, OURS), peak_mib(2048, DENSE), peak_mib(4096, OURS)
    return [
        Result(
            "dense_time",
            "all rows / eager softmax with the same statistics; n 2048, 12 heads, causal: time",
            median_ratio(times),
            0.3,
            milliseconds(times),
        ),
        Result(
            "dense_memory",
            "the same: peak extra memory",
            ours / eager,
            0.1,
            f"{ours:.0f} MiB / {eager:.0f} MiB",
        ),
        Result(
            "memory_growth",
            "peak extra memory of all rows, n 4096 / n 2048 (linear: 2)",
            twice / ours,
            2.2,
            f"{twice:.0f} MiB / {ours:.0f} MiB",
        ),
    ]


def growth_in_length() -> list[Result]:
    """How the cost of all rows and of sampled rows grows from n = 512 to 4096."""
    lengths = (512, 1024, 2048, 4096)
    inputs = [qkv(n) for n in lengths]
    out = []
    for name, count, repeats, bar in (("all", None, 3, 2.1), ("sampled", 64, 15, 1.1)):
        actions = [
            lambda pair=pair, count=count: attention_statistics(*pair, is_causal=True, rows=count)
            for pair in inputs
        ]
        seconds = [statistics.median(times) for times in side_by_side(actions, repeats)]
        wanted = "2 is quadratic" if count is None else "1 is linear"
        out.append(
            Result(
                f"growth_n_{name}",
                f"exponent of time in n, {count or 'all'} rows, n 512 to 4096 ({wanted})",
                slope(lengths, seconds),
                bar,
                ", ".join(f"n {n}: {s * 1e3:.3g} ms" for n, s in zip(lengths, seconds, strict=True)),
            )
        )
    return out
