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
        kernels=kernels(figures["kernels"]),
        triton=figures["kernels"]["triton"],
        wide=wide(figures["wide"]["shapes"]),
        exponents=exponents(figures["wide"]["exponents"]),
        whole_run=whole_run(figures["whole_run"]["results"]),
        whole_steps=figures["whole_run"]["steps"],
        inspected=f"{found['layers']} layers, {found['bytes'] / 1e9:.2f} GB of query and key weights",
        repeats=found["repeats"],
        inspect_threads=found["threads"],
        peak=f"{found['peak']['inspect'] / 1e9:.2f}",
        load=f"{found['load']:g}",
        **{name: f"{found[name]:.2g}" for name in ("ratio_work", "bare_work", "moments_read_work")},
    )


def kernels(found: dict[str, Any]) -> str:
    """The table of what the compiled kernels take."""
    chips = list(next(iter(found["kernels"].values())))
    rows = [f"| | {' | '.join(chips)} |", "|---|" + "---:|" * len(chips)]
    for name, by in found["kernels"].items():
        used = (f"{registers} / {spilt} / {shared / 1024:.0f} K" for registers, spilt, shared in by.values())
        rows.append(f"| {name} | {' | '.join(used)} |")
    return "\n".join(rows)


_VARIANTS = {
    "none": "none",
    "spectrum": "QKSpectrumMonitor",
    "attention": "AttentionMonitor",
    "locater": "LocAteR",
    "all": "all three",
}


def wide(shapes: dict[str, Any]) -> str:
    """The table of many layers and many heads."""
    rows = [
        "| layers × heads | callbacks | a step | first step | end | memory | keys | report | record |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape, by in shapes.items():
        kind, layers, heads = shape.split(":")
        for variant, title in _VARIANTS.items():
            own, base = by[variant], by["none"]
            seconds = (f"{own[part]:.2f} s" for part in ("step", "first", "end"))
            more = "" if own is base else f"+{own['memory'] - base['memory']:.0f} MB"
            sizes = (f"{own[part]:.1f} MB" if own[part] else "" for part in ("report", "record"))
            place = f"{layers} × {heads}, {kind}" if own is base else ""
            keys = own["keys"] or ""
            rows.append(
                f"| {place} | {title} | {' | '.join(seconds)} | {more} | {keys} | {' | '.join(sizes)} |"
            )
    return "\n".join(rows)


def exponents(found: dict[str, dict[str, float]]) -> str:
    """How what is added to a step grows, in words."""
    return "; ".join(
        f"in {along} " + ", ".join(f"{_VARIANTS[name]} {value:.2f}" for name, value in by.items())
        for along, by in found.items()
    )


def whole_run(found: dict[str, Any]) -> str:
    """The table of whole runs of a small model."""
    titles = {
        "default": "three callbacks at the default cadence",
        "every": "monitors on every step",
        "locater": "LocAteR alone",
    }
    rows = ["| | ratio | bar | detail |", "|---|---:|---:|---|"]
    for name, own in found.items():
        value = f"{own['value']:.3f}" if own["value"] <= own["bar"] else f"**{own['value']:.3f}, missed**"
        rows.append(f"| {titles[name]} | {value} | ≤ {own['bar']} | {own['detail']} |")
    return "\n".join(rows)


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
