"""Cost on a GPU as ratios, measured in one run: statistics to one flash attention forward, training steps.

    python benchmarks/gpu.py [--json benchmarks/results_gpu.json] [--all] [--tune]

Prints a table, writes JSON, and exits with 1 when a bar is missed. Says so and exits with 0 where there is no CUDA
device. ``--all`` also runs the tests marked ``gpu``, measures other lengths and every callback alone, within ten
minutes, and writes ``docs/gpu.md``, whose first line says "not measured" where there is no device. ``--tune``
times every launch shape of a small table, for those who change the kernels.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import step_time_gpu, step_times_gpu

from lightning_qk.functional import _kernel, attention_statistics
from lightning_qk.functional import attention as localization

BATCH, HEADS, N, D_HEAD = 1, 32, 8192, 128
BAR, BAR_OF_SOME = 0.7, 0.05
SECONDS = 600
PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"


def tensors(n: int = N, kv_heads: int = HEADS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, as an attention call gets them."""

    def make(heads: int) -> torch.Tensor:
        return torch.randn(BATCH, heads, n, D_HEAD, device="cuda", dtype=torch.bfloat16)

    return make(HEADS), make(kv_heads), make(kv_heads)


def milliseconds(*actions: Callable[[], object], repeats: int = 30) -> list[float]:
    """Median time of each action, taken in turn so that clocks and heat are the same for all."""
    for action in actions:  # builds, and fills caches
        action()
        action()
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for action, taken in zip(actions, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            action()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
    return [statistics.median(taken) for taken in times]


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def by_chunks(query: torch.Tensor, key: torch.Tensor) -> object:
    """The statistics without the kernel."""
    original = localization.kernel_rows
    localization.kernel_rows = lambda *_, **__: None
    try:
        return attention_statistics(query, key, is_causal=True)
    finally:
        localization.kernel_rows = original


def peak_mib(action: Callable[[], object]) -> float:
    """Memory beyond the inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure() -> list[dict[str, Any]]:
    query, key, value = tensors()
    every, sampled, forward, chunks = milliseconds(
        lambda: attention_statistics(query, key, is_causal=True),
        lambda: attention_statistics(query, key, is_causal=True, rows=64),
        lambda: flash(query, key, value),
        lambda: by_chunks(query, key),
        repeats=30,
    )
    half = [tensor[:, :, : N // 2] for tensor in (query, key)]
    (shorter,) = milliseconds(lambda: attention_statistics(*half, is_causal=True))
    memory = peak_mib(lambda: attention_statistics(query, key, is_causal=True))
    where = f"n = {N}, {HEADS} heads of {D_HEAD}, bf16, causal"

    def entry(measure: str, value: float, detail: str, bar: float | None = None) -> dict[str, Any]:
        met = None if bar is None else value <= bar
        return {"measure": measure, "value": value, "bar": bar, "met": met, "detail": detail}

    return [
        entry(f"all rows / flash forward, {where}", every / forward, f"{every:.2f} / {forward:.2f} ms", BAR),
        entry(
            f"64 sampled rows / flash forward, {where}",
            sampled / forward,
            f"{sampled:.2f} / {forward:.2f} ms",
            BAR_OF_SOME,
        ),
        entry("all rows by the kernel / by chunks", every / chunks, f"{every:.2f} / {chunks:.2f} ms"),
        entry(
            f"growth of time, n {N // 2} to {N} (quadratic: 4)", every / shorter, f"{shorter:.2f} ms before"
        ),
        entry(
            "extra memory / one n × n map of one head in float32",
            memory / (4 * N * N / 2**20),
            f"{memory:.0f} MiB",
        ),
    ]


def by_length() -> list[dict[str, Any]]:
    """Statistics over a flash forward at other lengths."""
    found = []
    for n in (2048, 4096, 16_384, 32_768):
        query, key, value = tensors(n)
        times = milliseconds(
            lambda query=query, key=key: attention_statistics(query, key, is_causal=True),
            lambda query=query, key=key: attention_statistics(query, key, is_causal=True, rows=64),
            lambda query=query, key=key, value=value: flash(query, key, value),
            repeats=10,
        )
        for what, own in zip(("all rows", "64 sampled rows"), times, strict=False):
            ratio, detail = own / times[-1], f"{own:.2f} / {times[-1]:.2f} ms"
            measure = f"{what} / flash forward, n = {n}"
            found.append({"measure": measure, "value": ratio, "bar": None, "met": None, "detail": detail})
    return found


def correctness() -> list[dict[str, Any]]:
    """The tests that need a device: how many failed."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    last = (done.stdout.strip().splitlines() or ["nothing was said"])[-1]
    failed = float(done.returncode != 0)
    return [
        {
            "measure": "tests marked gpu: 0 is passed",
            "value": failed,
            "bar": 0,
            "met": not failed,
            "detail": last,
        }
    ]


def everything(deadline: float) -> list[dict[str, Any]]:
    """All measurements, the most important ones first, while time allows; what fails is a row that says so."""
    found: list[dict[str, Any]] = []
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "statistics at n 8192": measure,
        "the default cadence": lambda: [{**one._asdict(), "met": one.met} for one in step_time_gpu()],
        "every callback alone": lambda: [{**one._asdict(), "met": one.met} for one in step_times_gpu()],
        "other lengths": by_length,
        "tests marked gpu": correctness,
    }
    for name, action in parts.items():
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("the ten minutes were over")
            found += action()
        except Exception as error:
            reason = f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            found.append(
                {"measure": name, "value": float("nan"), "bar": None, "met": False, "detail": reason}
            )
        torch.cuda.empty_cache()
    return found


def page(results: list[dict[str, Any]], machine: dict[str, str] | None) -> str:
    """The page of the measurements."""
    where = "not measured" if machine is None else machine["device"]
    lines = [f"# On a GPU: {where}", ""]
    if machine is None:
        lines += [
            "No CUDA device was at hand. `python benchmarks/gpu.py --all` measures on one within ten minutes and",
            "writes this page. Asked for are all rows in at most 0.7 of a flash forward at n 8192 in bfloat16,",
            "64 rows in 0.05; a step of a Llama-like model of 1 B parameters with three callbacks by default",
            "in 1.01 of one without, with monitors on every step in 1.05, with LocAteR alone in 1.01.",
        ]
    else:
        lines += [f"By `python benchmarks/gpu.py --all`, torch {machine['torch']}.", ""]
        lines += ["| measure | ratio | bar | detail |", "|---|---:|---:|---|"]
        for one in results:
            bar = "" if one["bar"] is None else f"≤ {one['bar']}" + ("" if one["met"] else ", missed")
            lines.append(f"| {one['measure']} | {one['value']:.4g} | {bar} | {one['detail']} |")
    return "\n".join(lines) + "\n"


def tune() -> None:
    """Time of both kernels for launch shapes around those in use."""
    query, key, _ = tensors()
    source = localization.AttentionLogits.of(query, key, is_causal=True)
    used = torch.ones(BATCH, N, dtype=torch.bool, device="cuda")
    usual = _kernel.blocks(query.dtype, D_HEAD, query.device)
    grid = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    shapes = [_kernel.Blocks(*shape) for shape in grid]
    for place, name in enumerate(("rows", "keys")):
        for shape in shapes:
            chosen = (shape, usual[1]) if place == 0 else (usual[0], shape)
            try:
                (time,) = milliseconds(
                    lambda chosen=chosen: _kernel.launch(source, used, None, every=True, shapes=chosen),
                    repeats=10,
                )
            except Exception as error:
                print(f"{name} {tuple(shape)}: {type(error).__name__}")
            else:
                print(f"{name} {tuple(shape)}: {time:.3f} ms for both kernels", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results_gpu.json")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        if arguments.all:
            arguments.page.write_text(page([], None), encoding="utf-8")
        return 0
    torch.manual_seed(0)
    if arguments.tune:
        tune()
        return 0
    # Chunks in place of the kernel are no measurement of it.
    warnings.simplefilter("error")
    if arguments.all:
        warnings.simplefilter("default")
        return finish(everything(time.monotonic() + SECONDS - 120), arguments)
    results = measure()
    # Lightning warns of the machine: what a training says is no concern of the kernel.
    warnings.simplefilter("default")
    results += [{**result._asdict(), "met": result.met} for result in step_time_gpu()]
    return finish(results, arguments)


def finish(results: list[dict[str, Any]], arguments: argparse.Namespace) -> int:
    """Print and write; the exit status."""
    width = max(len(result["measure"]) for result in results)
    for result in results:
        bar = "" if result["bar"] is None else f"<= {result['bar']} {'met' if result['met'] else 'MISSED'}"
        print(f"{result['measure']:{width}}  {result['value']:8.3f}  {bar:14}  {result['detail']}")
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2))
    if arguments.all:
        arguments.page.write_text(page(results, machine), encoding="utf-8")
    return 0 if all(result["met"] is not False for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
