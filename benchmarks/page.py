"""Write docs/performance.md from the measured figures.

    python benchmarks/page.py

The figures are those of ``docs/performance.json``, which ``benchmarks/run.py --json docs/performance.json``
writes. The page is never edited by hand; its text is in ``benchmarks/page.md.in``.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXT = HERE / "page.md.in"
FIGURES, PAGE = HERE.parent / "docs" / "performance.json", HERE.parent / "docs" / "performance.md"


def number(value: float) -> str:
    """Small ratios read better as a fraction."""
    return f"1/{1 / value:.0f}" if 0 < value < 0.01 else f"{value:.4g}"


def render(figures: dict[str, Any]) -> str:
    """The page's text."""
    rows = ["| measure | ratio | bar | detail |", "|---|---:|---:|---|"]
    for entry in figures["results"]:
        value = number(entry["value"]) if entry["met"] else f"**{number(entry['value'])}, missed**"
        rows.append(f"| {entry['measure']} | {value} | ≤ {number(entry['bar'])} | {entry['detail']} |")
    return TEXT.read_text().format(**figures["machine"], table="\n".join(rows))


if __name__ == "__main__":
    PAGE.write_text(render(json.loads(FIGURES.read_text())))
