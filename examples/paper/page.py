"""Write README.md of this folder from the results.

    python examples/paper/page.py

Text is in ``README.md.in``, numbers come from ``results/*.json``; the page is never edited by hand.
"""

import json
from pathlib import Path
from typing import Any

from common import HERE
from jinja2 import Environment, StrictUndefined

PARTS = {
    "theory": "theory against simulation",
    "heads": "real heads",
    "locater": "LocAteR",
    "spreads": "how large real logits are",
    "carry_over": "one choice for all settings",
    "failures": "two failure modes",
    "positional": "positional and semantic learning",
}
SCRIPTS = tuple(PARTS)
NAMES = {
    "encoder": "all-MiniLM-L6-v2",
    "gpt2": "GPT-2-like, 4 layers",
    "llama": "Llama-like, 4 layers",
    "paper": "the paper's, 1 layer",
}

METHODS = {
    "baseline": "none",
    "variance": "LocAteR, variance",
    "weight_decay": "decay of W_q, W_k",
    "matched_decay": "decay of W_q, W_k to the same ‖W_QK‖²",
    "sigma_reparam": "σReparam",
    "entropy": "entropy reward",
    "entropy_band": "entropy band",
    "qk_clip": "QK-clip",
    "qk_norm": "QK-norm",
}
SETTINGS = {
    "gpt_pre": "GPT-2, pre-LN",
    "gpt_post": "OPT, post-LN",
    "vit": "ViT on digits",
    "sst2": "MiniLM on SST-2",
}

LLAMA = {"llama": "Llama-like"}
FORMS = {"limit": "limit form", "tokens": "variance form over tokens", "variance": "variance form of weights"}


def band(found: Any, digits: int = 3, factor: float = 1.0) -> str:
    """A mean with its 95 % interval."""
    if isinstance(found, dict):
        found = found["mean"], found["low"], found["high"]
    mean, low, high = (f"{factor * value:.{digits}f}" for value in found)
    return mean if low == "nan" else f"{mean} [{low}, {high}]"


def failing(runs: list[dict[str, Any]]) -> str:
    """How many runs have failed when they end, by which criterion."""
    counts = {kind: sum(run[kind]["at_end"] for run in runs) for kind in ("entropy", "rank")}
    return ", ".join(f"{kind} {count} of {len(runs)}" for kind, count in counts.items())


def judged(settings: list[dict[str, Any]], method: str) -> str:
    """In how many settings a method is better and worse than none, beyond the interval."""
    gains = {row["title"]: row[method]["gain"] for row in settings if row[method].get("seeds", 0) > 1}
    better = [name for name, (_, low, _) in gains.items() if low > 0]
    worse = [name for name, (_, _, high) in gains.items() if high < 0]

    def listed(names: list[str]) -> str:
        return f"{len(names)} of {len(gains)} settings" + (f" ({'; '.join(names)})" if names else "")

    return f"better than none beyond the interval in {listed(better)}, worse in {listed(worse)}"


def training_seconds(settings: dict[str, Any]) -> float:
    """Processor time of all training steps: whatever was taken from a cache counts in full."""
    return sum(
        run["n"] * own["configuration"]["steps"] * run["cpu_seconds"][0]
        for own in settings.values()
        for part in ("main", "tuning")
        for run in own.get(part, {"runs": []})["runs"]
    )


def carried(settings: dict[str, Any]) -> dict[str, Any]:
    """The coefficient of the variance form that other settings had from the one-layer sweep, and its gains."""
    swept, other = (
        {run["coefficient"]: run["gain"] for run in runs if run["label"] == "variance"}
        for runs in (settings["paper"]["tuning"]["runs"], settings["gpt_post"]["main"]["runs"])
    )
    coefficient = max(other)
    best = settings["paper"]["chosen"]["variance"]
    return {
        "coefficient": coefficient,
        "there": swept[coefficient],
        "best": best,
        "gain_of_best": swept[best],
        "beyond": other[coefficient],
    }


def render(folder: Path = HERE / "results") -> str:
    """The page's text."""
    files = {name: json.loads((folder / f"{name}.json").read_text()) for name in SCRIPTS}
    whole = folder / "whole.json"  # of a run of all scripts
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["band"] = band
    text = environment.from_string((HERE / "README.md.in").read_text(encoding="utf-8"))
    return text.render(
        made={name: file["made"] for name, file in files.items()},
        names=NAMES,
        labels=METHODS,
        titles=SETTINGS | LLAMA,
        forms=FORMS,
        below_limit=[
            value
            for own in files["spreads"]["results"]["sigma"].values()
            for value in own
            if value <= files["spreads"]["results"]["limit"]
        ],
        carried=carried(files["locater"]["results"]["settings"]),
        parts=PARTS,
        whole=json.loads(whole.read_text())["results"] if whole.is_file() else None,
        training_seconds=training_seconds(files["locater"]["results"]["settings"]),
        failing=failing,
        judged=lambda method: judged(files["carry_over"]["results"]["settings"], method),
        **{name: file["results"] for name, file in files.items()},
    )


if __name__ == "__main__":
    (HERE / "README.md").write_text(render(), encoding="utf-8")
