"""Write docs/performance.md from the measured figures.

    python benchmarks/page.py

The figures are those of ``docs/performance.json``, which ``benchmarks/run.py --json docs/performance.json``
writes, and of ``docs/inspection.json``, which ``benchmarks/inspection.py --json docs/inspection.json`` writes. The
page is never edited by hand; its text is in ``benchmarks/page.md.in``.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXT = HERE / "page.md.in"
FIGURES, PAGE = HERE.parent / "docs" / "performance.json", HERE.parent / "docs" / "performance.md"
INSPECTION = HERE.parent / "docs" / "inspection.json"


def number(value: float) -> str:
    """Small ratios read better as a fraction."""
    return f"1/{1 / value:.0f}" if 0 < value < 0.01 else f"{value:.4g}"


def render(figures: dict[str, Any]) -> str:
    """The page's text."""
    rows = ["| measure | ratio | bar | detail |", "|---|---:|---:|---|"]
    for entry in figures["results"]:
        value = number(entry["value"]) if entry["met"] else f"**{number(entry['value'])}, missed**"
        rows.append(f"| {entry['measure']} | {value} | ≤ {number(entry['bar'])} | {entry['detail']} |")
    found = json.loads(INSPECTION.read_text())
    return TEXT.read_text().format(
        **figures["machine"],
        table="\n".join(rows),
        inspection=inspection(found),
        inspected=f"{found['layers']} layers, {found['bytes'] / 1e9:.2f} GB of query and key weights",
        repeats=found["repeats"],
        inspect_threads=found["threads"],
        peak=f"{found['peak']['inspect'] / 1e9:.2f}",
        load=f"{found['load']:g}",
        **{name: f"{found[name]:.2g}" for name in ("ratio_work", "bare_work", "moments_read_work")},
    )


def inspection(found: dict[str, Any]) -> str:
    """The table of what ``lightning-qk inspect`` takes."""
    kinds = {
        "bytes": "read the files' bytes",
        "lapack": "LAPACK's eigenvalues of matrices of a head's width",
        "read": "read the weights as float32",
        "eigenvalues": "multiply `W_k W_q^T` and solve",
        "moments": "`lightning-qk inspect --moments-only`",
        "inspect": "`lightning-qk inspect`",
    }
    rows = ["| | clock | processor | peak memory |", "|---|---:|---:|---:|"]
    for kind, what in kinds.items():
        work, seconds, peak = (found[part][kind] for part in ("work", "seconds", "peak"))
        rows.append(f"| {what} | {seconds:.2f} s | {work:.2f} s | {peak / 1e9:.2f} GB |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(render(json.loads(FIGURES.read_text())))
