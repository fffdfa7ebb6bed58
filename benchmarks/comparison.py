"""lightning-qk beside TransformerLens and WeightWatcher on one GPT-2-shaped model: same spectra, and times.

    make comparison        # .venv-comparison for the two, then this script and docs/comparison.md

A model of 12 layers, 12 heads and width 768 is written to a temporary folder. Each package reads it in a process
of its own, with one thread, the packages in turn. Times are seconds of the processor, which say little of what
else the machine does; of repeated ones the smallest counts. The spectra are compared here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import machine
from torch import Tensor

HERE = Path(__file__).parent
THEIRS = HERE.parent / ".venv-comparison" / "bin" / "python"
FIGURES, PAGE, TEXT = (
    HERE.parent / "docs" / "comparison.json",
    HERE.parent / "docs" / "comparison.md",
    HERE / "comparison.md.in",
)
BAR = 1e-3


def write_model(folder: Path, layers: int, heads: int, width: int) -> None:
    """A GPT-2 whose spectra range from the disc of a random matrix to the line of a symmetric one.

    Random weights; ``W_q`` and ``W_k`` share a part that grows from layer to layer. Norms have gains and
    biases, so that folding them makes a difference.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": 64, "vocab_size": 1000}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            query, key, _ = block.attn.c_attn.weight.T.split(width)
            share = layer / max(1, layers - 1)
            key.mul_(1 - share).add_(query, alpha=share)
            block.attn.c_attn.bias.normal_(std=0.02)
            block.ln_1.weight.normal_(1.0, 0.2)
            block.ln_1.bias.normal_(std=0.1)
    model.save_pretrained(folder)


def ours(folder: Path) -> dict[str, Any]:
    """Seconds of each stage and spectra, as ``comparison_theirs.py`` prints those of the others."""
    from transformers import GPT2LMHeadModel

    from lightning_qk import head_projections
    from lightning_qk.functional import qk_eigenvalues, qk_moments, qk_singular_values

    seconds = {}

    def timed(stage: str, begin: float) -> None:
        seconds[stage] = time.process_time() - begin

    begin = time.process_time()
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    timed("load", begin)
    with torch.no_grad():
        begin = time.process_time()
        layers = list(head_projections(model).values())
        eigenvalues = torch.stack([qk_eigenvalues(layer.query, layer.key) for layer in layers])
        timed("eigenvalues", begin)
        begin = time.process_time()
        singular = torch.stack([qk_singular_values(layer.query, layer.key) for layer in layers])
        timed("singular values", begin)
        begin = time.process_time()
        for layer in layers:
            qk_moments(layer.query, layer.key)
        timed("moments", begin)
        begin = time.process_time()
        folded = [
            qk_eigenvalues(one.query, one.key) for one in head_projections(model, fold_norm=True).values()
        ]
        timed("fold and eigenvalues", begin)
        sides = [
            torch.linalg.svdvals(side.flatten(0, 1)).square().tolist()
            for layer in layers
            for side in (layer.query, layer.key)
        ]
    return {
        "versions": {"lightning-qk": version("lightning-qk"), "transformers": version("transformers")},
        "seconds": seconds,
        "spectra": {
            "eigenvalues": torch.view_as_real(eigenvalues).tolist(),
            "singular values": singular.tolist(),
            "folded eigenvalues": torch.view_as_real(torch.stack(folded)).tolist(),
            "query and key weights": sides,
            "forms": singular.square().flatten(0, 1).tolist(),
        },
    }


def inspected(folder: Path) -> dict[str, Any]:
    """Seconds of ``lightning-qk inspect``: no model is built, the weights are read from the file."""
    # Imports are not counted, as for the others.
    from transformers import GPT2LMHeadModel  # noqa: F401

    import lightning_qk.cli.inspect
    import lightning_qk.inspect.export
    import lightning_qk.inspect.read  # noqa: F401
    from lightning_qk.cli.command import main

    begin = time.process_time()
    if main(["inspect", str(folder), "--json", str(folder / "inspect.json")]):
        raise SystemExit(f"inspect of {folder} failed")
    return {"versions": {}, "seconds": {"inspect": time.process_time() - begin}, "spectra": {}}


def matched(found: Tensor, other: Tensor) -> float:
    """Largest difference between two spectra, over the larger one's largest modulus, the values paired best.

    Args:
        found: (spectra, values), complex or real.
        other: the same shape.
    """
    from scipy.optimize import linear_sum_assignment

    largest = 0.0
    for one, two in zip(found, other, strict=True):
        if one.shape != two.shape:
            raise ValueError(f"expected spectra of one size, got {len(one)} and {len(two)} values")
        distance = (one[:, None] - two[None, :]).abs()
        pairs = linear_sum_assignment(distance.numpy())
        scale = torch.maximum(one.abs().max(), two.abs().max())
        largest = max(largest, (distance[pairs].max() / scale).item())
    return largest


def spectra(values: Any, *, is_complex: bool) -> Tensor:
    """(spectra, values) of what came as JSON."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return torch.view_as_complex(tensor).flatten(0, -2) if is_complex else tensor.flatten(0, -2)


OVERLAPS = (
    ("transformer_lens", "eigenvalues", "eigenvalues of every head's W_QK", True),
    ("transformer_lens", "singular values", "singular values of every head's W_QK", False),
    (
        "transformer_lens",
        "folded eigenvalues",
        "eigenvalues with the norm's gain and centering folded in",
        True,
    ),
    ("weightwatcher", "query and key weights", "squared singular values of W_q and of W_k, all heads", False),
    ("weightwatcher", "forms", "squared singular values of every head's W_QK", False),
)


def compare(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each overlap: what, how many values, the largest relative difference."""
    rows = []
    for package, name, what, is_complex in OVERLAPS:
        mine, theirs = (
            spectra(found[side]["spectra"][name], is_complex=is_complex) for side in ("lightning-qk", package)
        )
        difference = matched(mine, theirs)
        row = {
            "package": package,
            "name": name,
            "what": what,
            "values": mine.numel(),
            "difference": difference,
        }
        rows.append({**row, "bar": BAR, "met": difference <= BAR})
    return rows


def run(command: list[str]) -> dict[str, Any]:
    """A measurement in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if done.returncode or line is None:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(line.removeprefix("RESULT "))


def measure(folder: Path, theirs: Path, repeats: int) -> dict[str, Any]:
    """What each package found, with the shortest of repeated times."""
    mine, script = [sys.executable, str(Path(__file__))], str(HERE / "comparison_theirs.py")
    commands = {
        "lightning-qk": [*mine, "--side", "ours", "--model", str(folder)],
        "inspect": [*mine, "--side", "inspect", "--model", str(folder)],
        "transformer_lens": [str(theirs), script, "transformer_lens", str(folder)],
        "weightwatcher": [str(theirs), script, "weightwatcher", str(folder)],
    }
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for side, command in commands.items():
            print(f"{side} ...", file=sys.stderr, flush=True)
            result = run(command)
            before = found.setdefault(side, result)["seconds"]
            before.update({stage: min(taken, before[stage]) for stage, taken in result["seconds"].items()})
    return found


def render(figures: dict[str, Any]) -> str:
    """The page's text."""
    overlaps = ["| with | spectra | values | largest difference | bar |", "|---|---|---:|---:|---:|"]
    names = {"transformer_lens": "TransformerLens", "weightwatcher": "WeightWatcher"}
    for row in figures["overlaps"]:
        shown = f"{row['difference']:.1e}" if row["difference"] else "0, bit for bit"
        shown = shown if row["met"] else f"**{row['difference']:.1e}, missed**"
        overlaps.append(
            f"| {names[row['package']]} | {row['what']} | {row['values']:,} | {shown} | {row['bar']:g} |"
        )
    seconds = {
        f"{side}: {stage}": f"{taken:.2f}"
        for side, stages in figures["seconds"].items()
        for stage, taken in stages.items()
    }
    text = TEXT.read_text()
    for name, value in {
        **seconds,
        **{f"version: {name}": value for name, value in figures["versions"].items()},
        **{f"machine: {name}": str(value) for name, value in figures["machine"].items()},
        **{f"model: {name}": str(value) for name, value in figures["model"].items()},
        "repeats": str(figures["repeats"]),
        "load": str(figures["load"]),
        "overlaps": "\n".join(overlaps),
    }.items():
        text = text.replace("{" + name + "}", value)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", type=Path, default=THEIRS, help="Python that has the two packages")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=FIGURES)
    parser.add_argument("--page", action="store_true", help="write docs/comparison.md from the figures")
    parser.add_argument("--only-page", action="store_true", help="the same, and measure nothing")
    parser.add_argument("--side", choices=("ours", "inspect"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(1)
        print("RESULT", json.dumps({"ours": ours, "inspect": inspected}[options.side](options.model)))
        return 0
    if not options.only_page:
        if not options.theirs.exists():
            parser.error(
                f"expected a Python with transformer-lens and weightwatcher, got no {options.theirs}: run "
                "make comparison"
            )
        with tempfile.TemporaryDirectory(prefix="lightning-qk-") as name:
            write_model(Path(name), options.layers, options.heads, options.width)
            found = measure(Path(name), options.theirs, options.repeats)
        figures = {
            "machine": {**machine(), "threads": 1},
            "model": {"layers": options.layers, "heads": options.heads, "width": options.width},
            "repeats": options.repeats,
            "load": round(os.getloadavg()[1], 1),
            "versions": {
                k: v
                for side in ("weightwatcher", "transformer_lens", "lightning-qk")
                for k, v in found[side]["versions"].items()
            },
            "overlaps": compare(found),
            "seconds": {side: one["seconds"] for side, one in found.items()},
        }
        options.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    figures = json.loads(options.json.read_text())
    if options.page or options.only_page:
        PAGE.write_text(render(figures))
    for row in figures["overlaps"]:
        print(f"{row['package']}: {row['what']}: {row['difference']:.2e} {'met' if row['met'] else 'MISSED'}")
    print(json.dumps(figures["seconds"], indent=2))
    return 0 if all(row["met"] for row in figures["overlaps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
