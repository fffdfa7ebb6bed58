"""What every experiment of this folder shares: arguments, results, figures, intervals and parallel runs."""

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
_DIGITS = 6


@dataclass(frozen=True)
class Options:
    """What the command line of an experiment says.

    Attributes:
        quick: a reduced setting, for a check in minutes.
        out: folder for ``NAME.json`` and ``NAME*.png``.
        data: folder with ``wikitext-2/`` and ``sst2/``, or None: data comes from the hub.
        jobs: processes at a time, each with one thread.
        seeds: of the main comparison.
    """

    quick: bool
    out: Path
    data: Path | None
    jobs: int
    seeds: int

    def pick(self, full: Any, quick: Any) -> Any:
        """One of two values, by setting."""
        return quick if self.quick else full


def options(description: str, argv: Sequence[str] | None = None) -> Options:
    """Read an experiment's command line; full results go beside the scripts, quick ones to ``quick/``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a reduced setting that takes a minute or less")
    parser.add_argument("--out", type=Path, help="folder for results and figures (default: results or quick)")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with wikitext-2/ and sst2/ (default: ../shared/data, else the hub); or stdlib: text of "
        "this machine's Python, for a check that everything runs",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the main comparison (default: 5)")
    given = parser.parse_args(argv)
    if given.seeds < 2 or given.jobs < 1:
        parser.error(
            f"expected at least 2 seeds and 1 job, got {given.seeds} and {given.jobs}: raise the number"
        )
    out = given.out or HERE / ("quick" if given.quick else "results")
    out.mkdir(parents=True, exist_ok=True)
    if given.data == Path("stdlib"):
        from stand_in import stand_in

        given.data = stand_in(out / ".cache" / "stand_in")
    if given.data is not None and not given.data.is_dir():
        parser.error(
            f"expected --data to be a folder with wikitext-2/ and sst2/, or stdlib, got {given.data}: correct it"
        )
    nearby = HERE.parents[2] / "shared" / "data"
    data = given.data or (nearby if nearby.is_dir() else None)
    return Options(given.quick, out, data, given.jobs, given.seeds)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Elapsed."""
        return time.perf_counter() - self._start


def write(name: str, results: dict[str, Any], opts: Options, clock: Clock) -> Path:
    """Write an experiment's results as ``NAME.json`` with how they were made; numbers keep six digits."""
    made = {
        "quick": opts.quick,
        "jobs": opts.jobs,
        "seconds": round(clock.seconds(), 1),
        "machine": f"{os.cpu_count()} cores {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning")},
    }
    path = opts.out / f"{name}.json"
    path.write_text(json.dumps({"made": made, "results": _rounded(results)}, indent=1, sort_keys=True) + "\n")
    print(f"{path} ({made['seconds']} s)")
    return path


def read(name: str, folder: Path) -> dict[str, Any]:
    """The results that :func:`write` wrote."""
    return json.loads((folder / f"{name}.json").read_text())["results"]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if hasattr(value, "tolist"):
        return _rounded(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return value


def cached(folder: Path, key: Any, make: Callable[[], Any]) -> Any:
    """What ``make()`` gives as JSON, kept in a file under the key, so that an interrupted experiment goes on."""
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.json"
    if not path.is_file():
        found = make()
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        partial.replace(path)
    return json.loads(path.read_text())


class Interval(NamedTuple):
    """A mean and its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Mean over seeds with its interval; paired comparisons pass the differences of the pairs."""
    from scipy import stats

    numbers = [float(value) for value in values]
    mean = sum(numbers) / len(numbers)
    deviation = (sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)) ** 0.5
    half = float(stats.t.ppf((1 + confidence) / 2, len(numbers) - 1)) * deviation / len(numbers) ** 0.5
    return Interval(mean, mean - half, mean + half)


def in_parallel(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int, label: str = "runs"
) -> list[Any]:
    """``work(*call)`` for each call, in order, in fresh processes of one thread each."""
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they import torch
    results: list[Any] = []
    with ProcessPoolExecutor(min(jobs, len(calls)), mp_context=get_context("spawn")) as pool:
        for done, future in enumerate([pool.submit(work, *call) for call in calls], 1):
            results.append(future.result())
            print(f"  {label}: {done} of {len(calls)}, {time.perf_counter() - start:.0f} s", flush=True)
    return results


def figure(rows: int = 1, columns: int = 1, *, width: float = 4.0, height: float = 3.0) -> Any:
    """A figure and its grid of axes (always two-dimensional)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )


def save(fig: Any, name: str, opts: Options) -> Path:
    """Write a figure as ``NAME.png`` without a date in it, so that the same results give the same file."""
    import matplotlib.pyplot as plt
    from PIL import Image

    path = opts.out / f"{name}.png"
    fig.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(fig)
    with Image.open(path) as picture:  # a palette: a third of the size
        small = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(path)
    return path
