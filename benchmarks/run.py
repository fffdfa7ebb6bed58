"""Cost of the measurements as ratios, each taken in one run, the median of several.

    python benchmarks/run.py [names ...] [--json benchmarks/results.json]

Prints a table, writes JSON beside it, and exits with 1 when a bar is missed. Without names all are run.
"""

import argparse
import sys
import time
from pathlib import Path

import harness
import torch
from functions import dense, growth_in_length, moments, rows
from harness import Result, show, write
from token_moments import token_moments
from training import growth_in_layers, locater_time, self_check, step_time, suite_time

BENCHMARKS = {
    "step_time": step_time,
    "locater_time": locater_time,
    "suite_time": suite_time,
    "self_check": self_check,
    "rows": rows,
    "dense": dense,
    "moments": moments,
    "token_moments": token_moments,
    "growth_in_length": growth_in_length,
    "growth_in_layers": growth_in_layers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--processor", action="store_true", help="times of the processor, not of the clock")
    arguments = parser.parse_args()
    if arguments.processor:
        harness.clock = time.process_time
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"expected names among {', '.join(BENCHMARKS)}, got {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    results: list[Result] = []
    for name in arguments.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results += BENCHMARKS[name]()
    show(results)
    write(arguments.json, results)
    return 0 if all(result.met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
