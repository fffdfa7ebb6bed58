"""docs/atlas.md: what the heads of healthy real models do, and the numbers that ``inspect --against`` takes.

    python benchmarks/atlas.py --measure [--packages FOLDER]   # both models, some minutes; then the page
    python benchmarks/atlas.py                                 # the page and its pictures alone

The numbers are those of ``lightning-qk inspect MODEL --text stdlib`` with the defaults but for more batches, and
the token-aware spectra of the same text. They are written to lightning_qk/inspect/references, which the package
carries; the page's comparison of predicted with measured attention is that of benchmarks/predictions.py --page.
"""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from predictions import PACKAGES, PAGE, ROOT, package_folder, spearman
from torch import Tensor

from lightning_qk import head_projections, token_moments
from lightning_qk.inspect import Options, open_source
from lightning_qk.inspect.healthy import Reference, reference
from lightning_qk.inspect.read import Reading, read_checkpoint
from lightning_qk.inspect.text import measure, text_blocks, tokenizer_of
from lightning_qk.record.atomic_write import whole_file

HERE = Path(__file__).parent
TEXT = HERE / "atlas.md.in"
ATLAS, IMAGES = ROOT / "docs" / "atlas.md", ROOT / "docs" / "images"
REFERENCES = ROOT / "lightning_qk" / "inspect" / "references"
TITLES = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
SPECTRA = ("eig_mean", "eig_var", "sym_var", "trace", "trace_sq", "frobenius_sq")
SHOWN = (
    "entropy_normalized",
    "max_prob",
    "sink_first",
    "linear_share",
    "logit_std",
    "distance",
    "diagonal",
    "predicted/entropy_normalized",
    "predicted/sink_first",
    "tokens/eig_mean",
    "tokens/eig_var",
    "logit_eig_mean",
    "logit_eig_var",
    "symmetry",
    "positivity",
    "circle_ratio",
    "stable_rank",
    "effective_rank_energy",
)
LENGTH, BATCHES = 128, 8
CLOSED = ", closed form"


def source(name: str) -> str:
    """What inspect is given."""
    folder = package_folder(name)
    if folder is None:
        raise SystemExit(
            f"expected the package {PACKAGES[name]}, found none: make models, or pass --packages"
        )
    return str(folder / "model" if name == "minilm" else next(folder.glob("*.gguf")))


def measured(name: str) -> None:
    """Read a model as inspect does, and write the reference."""
    (checkpoint,) = open_source(source(name), Options())
    reading, model, weights = read_checkpoint(checkpoint)
    measure(model, weights, checkpoint, reading, source="stdlib", length=LENGTH, batches=BATCHES)
    ids = text_blocks(model, tokenizer_of(checkpoint, None), "stdlib", LENGTH, 4 * BATCHES)
    moments = token_moments(model, [{"input_ids": part} for part in ids.split(4)])
    heads = head_projections(model)
    spectra = [moments[own].spectrum(heads[own].scaling, n=heads[own].d_head) for own in reading.names]
    more = {f"tokens/{key}": torch.cat([one[key] for one in spectra]) for key in SPECTRA}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    facts = {
        "Title": TITLES[name],
        "Length": str(LENGTH),
        "Versions": versions,
        "Machine": f"{platform.machine()}, CPU, float32",
    }
    REFERENCES.mkdir(exist_ok=True)
    write_reference(reading, REFERENCES / f"{name}.parquet", more=more, facts=facts)


def write_reference(
    reading: Reading, path: Path, *, more: Mapping[str, Tensor] | None = None, facts: Mapping[str, str]
) -> None:
    """Write what was read as a table of one row a head.

    Args:
        reading: of the model.
        path: of the file.
        more: further numbers, one a head.
        facts: beside those of the reading.
    """
    labels = [label for label, count in zip(reading.labels, reading.heads, strict=True) for _ in range(count)]
    columns: dict[str, object] = {
        "layer": pa.array(labels).dictionary_encode(),
        "head": pa.array([head for count in reading.heads for head in range(count)], pa.int32()),
    }
    numbers = {
        **reading.values,
        **reading.attention,
        **{f"predicted/{name}": flat for name, flat in reading.predicted.items()},
        **{
            name: flat.repeat_interleave(torch.tensor(reading.heads))
            for name, flat in reading.layer_values.items()
        },
        **(more or {}),
    }
    for name, flat in numbers.items():
        values = [None if one != one else one for one in flat.double().tolist()]
        if any(value is not None for value in values):
            columns[name] = pa.array(values, pa.float32())
    table = pa.table(columns)
    about = json.dumps({**reading.facts, **facts})
    table = table.replace_schema_metadata({"lightning_qk": about})
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd", use_dictionary=["layer"])


def render(references: Sequence[Reference], comparisons: Sequence[dict[str, Any]]) -> str:
    """The page's text."""
    found: dict[str, str] = {}
    for known in references:
        sinks = known.by_layer("sink_heads")
        found |= {
            f"{known.name}_sinks": f"{float((known.values['sink_first'] > 0.3).double().mean()):.0%}",
            f"{known.name}_most": f"{float(sinks.max()):.0%}",
            f"{known.name}_semantic": _far(known),
        }
    return TEXT.read_text("utf-8").format(
        machine=references[0].facts["Machine"],
        versions=references[0].facts["Versions"],
        text=references[0].facts["Text"],
        quantiles=_quantiles(references),
        predictions=_comparisons(comparisons),
        **found,
    )


def _quantiles(references: Sequence[Reference]) -> str:
    """A row for each statistic: the middle and the outer twentieths of all heads."""
    titles = " | ".join(f"{known.facts['Title']}: 5 % | 50 % | 95 %" for known in references)
    rows = [f"| statistic | {titles} |", "|---|" + "---:|" * 3 * len(references)]
    points = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    for name in SHOWN:
        cells = []
        for known in references:
            flat = known.values[name]
            cells += [f"{value:.3g}" for value in flat[~flat.isnan()].quantile(points).tolist()]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _comparisons(comparisons: Sequence[dict[str, Any]]) -> str:
    """A row for drawn tokens, one for the closed form, and one for what was asked."""
    names = list(dict.fromkeys(row["statistic"] for one in comparisons for row in one["rows"]))
    names = [name for name in names if not name.endswith(CLOSED)]
    rows = [
        "| model, moments → measured | tokens | by | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---|---:|---|" + "---:|" * len(names),
    ]
    for one in comparisons:
        title = TITLES.get(one["model"], one["model"])
        where = f"{title}, {one['heads']} heads, {one['moments']} → {one['measured']} | {one['length']}"
        known = {row["statistic"]: row for row in one["rows"]}
        cells: dict[str, list[str]] = {"drawn tokens": [], "closed form": [], "asked": []}
        for name in names:
            row, closed = known.get(name), known.get(name + CLOSED)
            asked = None if row is None else row["asked"]
            missed = row is not None and asked is not None and row["spearman"] < asked
            cells["drawn tokens"].append(_figures(row) + ", **missed**" * missed)
            cells["closed form"].append(_figures(closed))
            cells["asked"].append("" if asked is None else f"{asked:.2f}")
        for by, values in cells.items():
            if any(values):
                rows.append(f"| {where} | {by} | {' | '.join(values)} |")
    return "\n".join(rows)


def _figures(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['spearman']:.3f} / {row['error']:.3g}"


def _far(known: Reference) -> str:
    """Share of heads whose entropy lies further than 0.1 from what moments predict."""
    off = known.values["entropy_normalized"] - known.values["predicted/entropy_normalized"]
    return f"{float((off.abs() > 0.1).double().mean()):.0%}"


def draw(references: Sequence[Reference]) -> None:
    """The pictures: a row for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(references)
    figure, axes = plt.subplots(count, 4, figsize=(11, 2.9 * count), layout="constrained")
    for line, known in zip(axes, references, strict=True):
        for axis, name in zip(
            line, ("entropy_normalized", "sink_first", "logit_std", "distance"), strict=True
        ):
            got, want = known.values[f"predicted/{name}"], known.values[name]
            both = torch.cat([got, want])
            ends = [float(both.min()), float(both.max())]
            axis.plot(ends, ends, color="0.7", linewidth=1)
            axis.scatter(got, want, s=6, c=_places(known), cmap="viridis")
            axis.set(title=f"{name}, ρ = {spearman(got, want):.2f}", xlabel="predicted", ylabel="measured")
        line[0].set_ylabel(f"{known.facts['Title']}\nmeasured")
    _save(figure, "atlas-predicted.png")

    figure, axes = plt.subplots(count, 4, figsize=(11, 2.9 * count), layout="constrained")
    for line, known in zip(axes, references, strict=True):
        for axis, name in zip(
            line, ("sink_first", "entropy_normalized", "distance", "diagonal"), strict=True
        ):
            axis.scatter(_places(known), known.values[name], s=6)
            axis.set(title=name, xlabel="layer")
        line[0].axhline(0.3, color="0.7", linewidth=1)
        line[0].set_ylabel(known.facts["Title"])
    _save(figure, "atlas-layers.png")

    figure, axes = plt.subplots(count, 3, figsize=(10, 2.9 * count), layout="constrained")
    for line, known in zip(axes, references, strict=True):
        places = _places(known)
        pairs = (
            ("tokens/eig_mean", known.values["tokens/eig_mean"], "mean eigenvalue, tokens"),
            (
                "tokens/eig_var",
                known.values["tokens/frobenius_sq"].sqrt(),
                "Frobenius norm, tokens: std of logits",
            ),
            ("logit_eig_mean", known.values["logit_eig_mean"], "mean eigenvalue, weights"),
        )
        for axis, (_, values, title) in zip(line, pairs, strict=True):
            axis.scatter(places, values, s=6)
            axis.axhline(0, color="0.7", linewidth=1)
            axis.set(title=title, xlabel="layer")
        line[0].set_ylabel(known.facts["Title"])
    _save(figure, "atlas-spectra.png")


def _places(known: Reference) -> list[int]:
    labels = list(dict.fromkeys(known.layers))
    return [labels.index(label) for label in known.layers]


def _save(figure: Any, name: str) -> None:
    figure.savefig(IMAGES / name, dpi=80, metadata={"Software": None})


def main() -> None:
    """Measure, where that is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", nargs="*", choices=sorted(TITLES), metavar="MODEL")
    parser.add_argument("--packages", type=Path)
    given = parser.parse_args()
    if given.packages is not None:
        sys.path.insert(0, str(given.packages))
    if given.measure is not None:
        for name in given.measure or sorted(TITLES):
            measured(name)
    references = [reference(name) for name in sorted(TITLES)]
    draw(references)
    comparisons = json.loads(PAGE.read_text("utf-8")) if PAGE.exists() else []
    ATLAS.write_text(render(references, comparisons), "utf-8")


if __name__ == "__main__":
    main()
