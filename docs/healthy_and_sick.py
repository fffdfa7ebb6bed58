"""A healthy run and a sick one, side by side: the pictures of docs/numbers.md and of the README.

    python docs/healthy_and_sick.py [--output docs/images/healthy-and-sick.png]

The README's, with the loss and every head's entropy alone, lies beside it as healthy-and-sick-small.png.

Two small GPT-2s learn to write Python from the standard library of this machine, with the same weights and batches
at the start. One has a warm-up and a usual learning rate. The other has none and eleven times the rate, which is a
mistake that people make. Takes about a minute on one quiet core.
"""

import argparse
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_qk import AttentionMonitor, QKSpectrumMonitor, TextDataModule, TransformerModule

STEPS, EVERY, LAYERS, HEADS = 240, 8, 4, 4
SMOOTH = 20
RUNS = {
    "healthy": {"lr": 3e-3, "warmup_steps": 30},
    "sick": {"lr": 3.3e-2, "warmup_steps": 0},
}
TITLES = {
    "healthy": "healthy: learning rate 0.003, warm-up",
    "sick": "sick: learning rate 0.033, no warm-up",
}


PANELS = (
    ("entropy_normalized", "normalized entropy", False),
    ("max_abs_logit", "largest |logit|", True),
    ("sym_var", "variance of the spectrum", True),
)


@dataclass(frozen=True)
class Curves:
    """What the picture shows of a run.

    Attributes:
        loss: of every step.
        steps: statistic → steps at which it was measured.
        heads: statistic → (steps, layers, heads).
    """

    loss: list[float]
    steps: dict[str, list[int]]
    heads: dict[str, Tensor]


class _Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        self.values.append(float(outputs["loss"]))


def fit(
    name: str,
    callbacks: list[L.Callback],
    folder: Path,
    *,
    steps: int = STEPS,
    every: int = EVERY,
    cache: str | None = None,
) -> None:
    """Train one of :data:`RUNS` with callbacks.

    Args:
        name: of the run.
        callbacks: what watches it.
        folder: where they write to.
        steps: how long.
        every: steps between two measurements.
        cache: folder for the prepared text; None is the usual one.
    """
    L.seed_everything(1, verbose=False)
    module = TransformerModule(
        {"model_type": "gpt2", "n_layer": LAYERS, "n_head": HEADS, "n_embd": 64, "n_positions": 64},
        schedule="constant",
        **RUNS[name],
    )
    data = TextDataModule(
        "stdlib", tokenizer="bytes", block_size=64, batch_size=8, max_characters=300_000, cache_dir=cache
    )
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        log_every_n_steps=every,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
    )
    trainer.fit(module, data)


def train(name: str, steps: int = STEPS, every: int = EVERY, cache: str | None = None) -> Curves:
    """Train one of :data:`RUNS` and keep its curves; arguments as for :func:`fit`."""
    attention = AttentionMonitor(every, figures_every=0, report=False)
    spectrum = QKSpectrumMonitor(every, figures_every=0, report=False)
    losses = _Losses()
    with tempfile.TemporaryDirectory() as folder:
        fit(name, [attention, spectrum, losses], Path(folder), steps=steps, every=every, cache=cache)
    measured, heads = {}, {}
    for statistic, _, _ in PANELS:
        history = attention.history if statistic in attention.history.values else spectrum.history
        measured[statistic] = list(history.steps)
        heads[statistic] = history.series(statistic).view(-1, LAYERS, HEADS)
    return Curves(losses.values, measured, heads)


def draw(runs: Mapping[str, Curves]) -> Figure:
    """The picture: one column a run."""
    figure = Figure(figsize=(10, 11.5), layout="constrained")
    axes = figure.subplots(2 + len(PANELS), len(runs), sharey="row", squeeze=False)
    shades = colormaps["viridis"](torch.linspace(0, 0.85, LAYERS).tolist())
    for place, (column, (name, curves)) in enumerate(zip(axes.T, runs.items(), strict=True)):
        column[0].set_title(TITLES[name], fontsize=12, fontweight="bold")
        column[0].plot(range(1, len(curves.loss) + 1), curves.loss, color="0.75", linewidth=0.7)
        smooth = torch.tensor(curves.loss).unfold(0, SMOOTH, 1).mean(1)
        column[0].plot(range(SMOOTH, len(curves.loss) + 1), smooth.tolist(), color="black")
        for axis, (statistic, title, logarithmic) in zip(column[1:], PANELS, strict=False):
            for layer, shade in enumerate(shades):
                values = curves.heads[statistic][:, layer].mean(1)
                axis.plot(curves.steps[statistic], values.tolist(), color=shade, label=f"layer {layer}")
            if place == 0:
                axis.set_ylabel(title + ",\nmean of a layer's heads")
            if logarithmic:
                axis.set_yscale("log")
            if statistic == "max_abs_logit":
                axis.axhline(100, color="0.4", linestyle="--", linewidth=1)
                if place == 0:
                    axis.annotate("100: where Kimi K2 clips", (0, 120), fontsize=8, color="0.3")
        for axis in column[: 1 + len(PANELS)]:
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
        _entropies(column[-1], curves)
    axes[0][0].set_ylabel("loss")
    axes[-1][0].set_ylabel("normalized entropy\nat the end, by layer")
    axes[1][0].legend(fontsize=8, ncols=2, loc="lower right")
    return figure


def draw_small(runs: Mapping[str, Curves]) -> Figure:
    """The README's picture: both losses, and every head's entropy at the end of each run."""
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    loss, *maps = figure.subplots(1, 1 + len(runs), width_ratios=(1.5, *[1] * len(runs)))
    for name, colour in zip(runs, ("tab:green", "tab:red"), strict=True):
        smooth = torch.tensor(runs[name].loss).unfold(0, SMOOTH, 1).mean(1)
        loss.plot(range(SMOOTH, len(runs[name].loss) + 1), smooth.tolist(), color=colour, label=name)
    loss.set_title("the loss of both falls", fontsize=11)
    loss.set_xlabel("step")
    loss.set_ylabel("training loss")
    loss.set_ylim(0, None)
    loss.grid(alpha=0.25)
    loss.legend()
    for axis, (name, curves) in zip(maps, runs.items(), strict=True):
        axis.set_title(f"{name}: entropy of each head", fontsize=11)
        _entropies(axis, curves)
        axis.set_ylabel("layer")
    return figure


def _entropies(axis: Axes, curves: Curves) -> None:
    """Normalized entropy of every head at the end of a run, with its numbers."""
    last = curves.heads["entropy_normalized"][-1]
    axis.imshow(last.tolist(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for layer in range(LAYERS):
        for head in range(HEADS):
            value = float(last[layer, head])
            tone = "black" if value > 0.6 else "white"
            axis.text(head, layer, f"{value:.2f}", ha="center", va="center", color=tone)
    axis.set_xticks(range(HEADS))
    axis.set_yticks(range(LAYERS))
    axis.set_xlabel("head")


def summary(curves: Curves) -> str:
    """The last values, in a line a layer."""
    lines = [f"loss of the last {SMOOTH} steps: {sum(curves.loss[-SMOOTH:]) / SMOOTH:.2f}"]
    for layer in range(LAYERS):
        values = ", ".join(
            f"{title} {float(curves.heads[name][-1, layer].mean()):.3g}" for name, title, _ in PANELS
        )
        lines.append(f"  layer {layer}: {values}")
    return "\n".join(lines)


def main() -> None:
    """Train both runs and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "images" / "healthy-and-sick.png"
    )
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # models this small gain nothing from more
    runs = {}
    for name in RUNS:
        runs[name] = train(name)
        print(f"{name}: {summary(runs[name])}")
    output.parent.mkdir(parents=True, exist_ok=True)
    for figure, place in (
        (draw(runs), output),
        (draw_small(runs), output.with_stem(f"{output.stem}-small")),
    ):
        figure.savefig(place, dpi=100)
        print(place)


if __name__ == "__main__":
    main()
