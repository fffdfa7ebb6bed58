"""Figures of a run. Pure functions from a history or a record to a matplotlib figure.

Figures are built without pyplot: no global state, no backend change, safe in threads. Sizes are fixed in
inches rather than found by a layout engine, which would take longer than the drawing.
"""

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qk.logging.history import History, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#222222"
_QUIET = "#8a8a8a"
_EMPTY = "#e4e4e4"
# On a coloured cell, whose colour no theme changes.
_ON_BRIGHT, _ON_DARK = "#1a1a1a", "#ffffff"
_POINT = "#31688e"
_REFERENCE = "#b5570f"
_TITLE_SIZE, _LABEL_SIZE, _TICK_SIZE = 10.0, 9.0, 8.0
_MAX_TICKS = 16
_MAX_PANELS = 12
_ANNOTATE_BELOW = 64


@dataclass(frozen=True)
class Statistic:
    """How a statistic is shown.

    Attributes:
        title: what it is, in words.
        unit: its unit, or an empty string.
        share: it lies between 0 and 1, and is drawn on that scale.
        signed: zero is its middle, and is drawn as the middle colour.
        peak: of several heads the largest counts, not the mean.
    """

    title: str
    unit: str = ""
    share: bool = False
    signed: bool = False
    peak: bool = False

    @property
    def label(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


STATISTICS = {
    "trace": Statistic("trace of W_QK", signed=True),
    "trace_sq": Statistic("trace of W_QK²", signed=True),
    "frobenius_sq": Statistic("squared Frobenius norm of W_QK"),
    "eig_mean": Statistic("eigenvalue mean", signed=True),
    "eig_var": Statistic("eigenvalue variance", signed=True),
    "sym_var": Statistic("variance of the symmetric part's eigenvalues"),
    "asymmetry": Statistic("asymmetry of W_QK", share=True),
    "concentration": Statistic("eigenvalue concentration", share=True),
    "propagation": Statistic("predicted signal propagation", "probability", share=True),
    "localization": Statistic("predicted localization", "late minus early", signed=True),
    "spectral_radius": Statistic("largest |eigenvalue|", peak=True),
    "singular_max": Statistic("largest singular value", peak=True),
    "sigma_1": Statistic("spectral norm of W_QK", peak=True),
    "energy_top_1": Statistic("energy of the first direction", share=True),
    "energy_top_4": Statistic("energy of the first four directions", share=True),
    "logit_bound": Statistic("bound on |logit| for tokens of norm √d", peak=True),
    "update_ratio": Statistic("update of W_QK against W_QK"),
    "entropy": Statistic("attention entropy", "nats"),
    "entropy_normalized": Statistic("normalized attention entropy", "entropy / log keys", share=True),
    "participation": Statistic("participation", "effective keys"),
    "max_prob": Statistic("largest attention probability", share=True),
    "max_logit": Statistic("largest logit", signed=True, peak=True),
    "max_abs_logit": Statistic("largest |logit|", peak=True),
    "query_norm": Statistic("norm of the queries"),
    "key_norm": Statistic("norm of the keys"),
    "logit_std": Statistic("standard deviation of logits"),
    "distance": Statistic("attention distance", "positions"),
    "distance_spread": Statistic("spread of attention distance", "positions"),
    "diagonal": Statistic("attention to the own position", "probability", share=True),
    "sink_first": Statistic("attention to the first key", "probability", share=True),
    "sink_rate": Statistic("share of keys that are sinks", share=True),
    "sink_learnt": Statistic("attention to the learnt sink", "probability", share=True),
    "sink_number": Statistic("sinks", "keys of a sequence"),
    "sink_share": Statistic("rows that attend to the strongest sink", share=True),
    "sink_output": Statistic("output in the span of the sinks' values", share=True),
    "waiver_rate": Statistic("share of keys with a short value", share=True),
    "waiver_mass": Statistic("attention to keys with a short value", "probability", share=True),
    "waiver_position": Statistic("waivers explained by position", "share of variance"),
    "positional_share": Statistic("logits explained by distance", "share of variance", share=True),
    "linear_share": Statistic("measured linear share", "share of pairs", share=True),
    "rank_residual_relative": Statistic("spread of tokens around their mean", "share of norm", share=True),
    "cosine": Statistic("cosine between tokens", signed=True),
    "cosine_abs": Statistic("|cosine| between tokens", share=True),
    "effective_rank": Statistic("effective rank", "directions"),
    "activation_max": Statistic("largest |activation|", peak=True),
}


def describe(statistic: str) -> Statistic:
    """How to show a statistic, also one that is not in the table and the standard error of one that is."""
    if statistic in STATISTICS:
        return STATISTICS[statistic]
    if statistic.endswith("_se"):
        base = describe(statistic.removesuffix("_se"))
        return Statistic(f"standard error of {base.title}", base.unit)
    return Statistic(statistic.replace("_", " "))


def by_layer(history: History, statistic: str) -> Tensor:
    """What :func:`over_time` draws, shape ``(points, layers)``, NaN where a layer has no finite value."""
    series = history.series(statistic).double()
    series = torch.where(series.isfinite(), series, torch.nan)
    if not describe(statistic).peak:
        return torch.stack([part.nanmean(dim=-1) for part in history.split(series)], dim=-1)
    largest = [part.nan_to_num(nan=-math.inf).amax(dim=-1) for part in history.split(series)]
    stacked = torch.stack(largest, dim=-1)
    return torch.where(stacked.isfinite(), stacked, torch.nan)


def heatmap(history: History, statistic: str, index: int = -1) -> "Figure":
    """A statistic of every head at one kept step: layers down, heads across.

    Shares are drawn between 0 and 1, signed statistics around zero, and positive ones that span more than two
    decades on a logarithmic scale. Cells without a value are hatched.

    Args:
        history: where the statistic is.
        statistic: its name.
        index: which kept step.

    Raises:
        KeyError: the history has no such statistic.
    """
    import numpy as np

    style = describe(statistic)
    grid = history.grid(statistic, index).double().numpy()
    grid = np.where(np.isfinite(grid), grid, np.nan)
    layers, heads = grid.shape
    labels = list(history.layers)
    left = 0.55 + 0.068 * max(len(label) for label in labels)
    cell = min(0.34, max(0.13, 4.4 / heads), max(0.11, 5.0 / layers))
    width, height = max(2.4, min(5.2, cell * heads)), max(0.7, min(6.0, cell * layers))
    figure, axes = _figure(width, height, left=left, right=1.0, bottom=0.52, top=0.48)

    image = axes.imshow(
        np.ma.masked_invalid(grid), aspect="auto", interpolation="nearest", **_color_scale(grid, style)
    )
    if not np.isfinite(grid).all():
        # The hatched background shows through where a cell is masked.
        axes.patch.set(facecolor=_EMPTY, hatch="/////", edgecolor=_QUIET, linewidth=0.0)
    rows, columns = _thin(layers), _thin(heads)
    axes.set_yticks(rows, [labels[i] for i in rows])
    axes.set_xticks(columns, [str(i) for i in columns])
    axes.set_xlabel("head", fontsize=_LABEL_SIZE, color=_INK)
    if np.isfinite(grid).sum() <= _ANNOTATE_BELOW:
        _annotate(axes, grid, image)
    bar = figure.add_axes(
        (
            (left + width + 0.12) / figure.get_figwidth(),
            0.52 / figure.get_figheight(),
            0.13 / figure.get_figwidth(),
            height / figure.get_figheight(),
        )
    )
    colorbar = figure.colorbar(image, cax=bar)
    colorbar.outline.set_visible(False)
    bar.tick_params(labelsize=_TICK_SIZE, labelcolor=_INK, color=_QUIET, which="both")
    _title(figure, f"{style.label}, step {history.steps[index]}")
    return figure


def over_time(history: History, statistic: str) -> "Figure":
    """A statistic over the kept steps, one line a layer: the mean of the heads that have a value.

    Of statistics that are a largest value already, the line is the largest of the layer's heads.

    Raises:
        KeyError: the history has no such statistic.
    """
    style = describe(statistic)
    series = by_layer(history, statistic)
    shown = [i for i in range(len(history.layers)) if not series[:, i].isnan().all()]
    figure, axes = _figure(3.9, 2.4, left=0.75, right=1.35, bottom=0.55, top=0.48)
    colors = _layer_colors(len(history.layers))
    for i in shown:
        values = series[:, i].numpy()
        marker = "o" if int((~series[:, i].isnan()).sum()) < 3 else None
        axes.plot(history.steps, values, color=colors[i], linewidth=1.3, marker=marker, markersize=3.5)
    finite = series[series.isfinite()]
    if _spans_decades(finite) and not style.share:
        axes.set_yscale("log")
    elif style.share:
        _share_limits(axes, finite)
    _layer_legend(figure, axes, [history.layers[i] for i in shown], [colors[i] for i in shown])
    _axis_labels(axes, "step", style.unit or "dimensionless")
    _step_axis(axes)
    of_heads = (
        f", {'largest' if style.peak else 'mean'} of each layer's heads" if max(history.heads) > 1 else ""
    )
    _title(figure, f"{style.title}{of_heads}")
    return figure


def entropy_against_variance(record: RunRecord) -> "Figure":
    """Attention entropy of every head against the variance of its spectrum, at the newest steps.

    Bao et al. (ICML 2024) predict that concentrated spectra (small variance, nonzero mean) localize
    attention without a collapse of its entropy. The horizontal axis is ``sym_var``, or ``eig_var`` where
    that was not recorded.

    Raises:
        ValueError: no layer has both.
    """
    x_name = _first_recorded(record.spectrum, ("sym_var", "eig_var"))
    y_name = _first_recorded(record.attention, ("entropy_normalized", "entropy"))
    figure, axes = _figure(3.3, 2.9, left=0.75, right=1.35, bottom=0.55, top=0.62)
    points = _paired(record, x_name, y_name)
    _scatter_by_layer(figure, axes, points)
    if _spans_decades(torch.cat([x for _, x, _ in points])):
        axes.set_xscale("log")
    if describe(y_name).share:
        _share_limits(axes, torch.cat([y for _, _, y in points]))
    y_style = describe(y_name)
    _axis_labels(axes, describe(x_name).title, y_style.title if y_style.share else y_style.label)
    _title(figure, f"Entropy against spectral variance\n{_steps_of(record)}")
    return figure


def propagation_predicted_measured(record: RunRecord) -> "Figure":
    """Predicted signal propagation of every head against the measured share of linear pairs.

    On the diagonal the model-based prediction agrees with what the real logits do.

    Raises:
        ValueError: no layer has both.
    """
    figure, axes = _figure(2.9, 2.9, left=0.75, right=1.35, bottom=0.55, top=0.62)
    axes.plot([0, 1], [0, 1], color=_QUIET, linewidth=1.0, linestyle="--")
    _scatter_by_layer(figure, axes, _paired(record, "propagation", "linear_share"))
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    _axis_labels(axes, "predicted (probability)", "measured (share of pairs)")
    _title(figure, f"Signal propagation, predicted and measured\n{_steps_of(record)}")
    return figure


def eigenvalue_plane(record: RunRecord) -> "Figure":
    """Eigenvalues of W_QK in the complex plane, one panel a layer, all its heads together.

    The dashed circle is the disc that holds the non-zero eigenvalues of a random head of the same shape and
    the same ‖W_QK‖_F. Derived here: let W_q, W_k (d_head × d_model) have independent, centred entries of
    variances a and b. The non-zero eigenvalues of W_QK are those of B = W_k W_qᵀ, a product of two
    rectangular matrices, whose spectrum fills the disc of radius √(a b d_head d_model) as the widths grow
    (circular law for products). And E‖W_QK‖_F² = a b d_head d_model². Hence

        radius = ‖W_QK‖_F / √d_model,

    with the root mean square of ‖W_QK‖_F over the layer's heads. The circle is left out where d_model cannot
    be known from the spectrum's history, that is with ``support="head"``.

    At most 12 layers are shown, evenly chosen. Non-finite eigenvalues are left out.

    Raises:
        ValueError: the record has no eigenvalues.
    """
    finite = {
        label: values[values.isfinite().all(dim=-1)]
        for label, values in record.eigenvalues.items()
        if values.numel()
    }
    finite = {label: values for label, values in finite.items() if values.numel()}
    if not finite:
        raise ValueError("expected eigenvalues of at least one layer, got none: record them before drawing")
    labels = [list(finite)[i] for i in _thin(len(finite), _MAX_PANELS)]
    columns = min(len(labels), 4 if len(labels) != 3 else 3)
    rows = math.ceil(len(labels) / columns)
    panel, gap, left, top = 1.45, 0.42, 0.62, 0.72
    figure, _ = _figure(
        columns * panel + (columns - 1) * gap,
        rows * panel + (rows - 1) * gap,
        left=left,
        right=0.2,
        bottom=0.55,
        top=top,
        axes=False,
    )
    width, height = figure.get_size_inches()
    circles = 0
    for position, label in enumerate(labels):
        row, column = divmod(position, columns)
        x, y = left + column * (panel + gap), height - top - panel - row * (panel + gap)
        axes = figure.add_axes((x / width, y / height, panel / width, panel / height))
        _style(axes)
        values = finite[label].reshape(-1)
        radius = _circle_law_radius(record, label)
        reach = float(values.abs().max())
        if radius is not None:
            from matplotlib.patches import Circle

            axes.add_patch(
                Circle((0, 0), radius, fill=False, edgecolor=_REFERENCE, linewidth=1.2, linestyle="--")
            )
            reach = max(reach, radius)
            circles += 1
        axes.plot(
            values.real.numpy(),
            values.imag.numpy(),
            linestyle="none",
            marker="o",
            markersize=2.2,
            markeredgewidth=0,
            color=_POINT,
            alpha=0.45,
            rasterized=True,
        )
        limit = 1.08 * reach if reach > 0 else 1.0
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
        axes.locator_params(nbins=3)
        axes.set_title(label, fontsize=_TICK_SIZE, color=_INK, pad=3)
        if column == 0:
            axes.set_ylabel("imaginary", fontsize=_LABEL_SIZE, color=_INK)
        if position + columns >= len(labels):
            axes.set_xlabel("real", fontsize=_LABEL_SIZE, color=_INK)
    title = "Eigenvalues of W_QK"
    if record.eigenvalues_step is not None:
        title += f", step {record.eigenvalues_step}"
    if len(labels) < len(finite):
        title += f", {len(labels)} of {len(finite)} layers"
    # A narrow figure has no room for the second sentence beside the first.
    note = "dashed: disc of a random head" if circles else ""
    _title(figure, f"{title}\n{note}" if note else title)
    return figure


def scalars_over_time(record: RunRecord) -> "Figure":
    """Run-level curves, such as the penalty of LocAteR, one panel each.

    Raises:
        ValueError: the record has none.
    """
    curves = {name: curve for name, curve in record.scalars.items() if curve[0]}
    if not curves:
        raise ValueError("expected run-level curves in the record, got none: record them before drawing")
    panel, gap, left, top = 1.5, 0.42, 0.85, 0.42
    height_inner = len(curves) * panel + (len(curves) - 1) * gap
    figure, _ = _figure(4.6, height_inner, left=left, right=0.25, bottom=0.55, top=top, axes=False)
    width, height = figure.get_size_inches()
    for position, (name, (steps, values)) in enumerate(curves.items()):
        y = height - top - panel - position * (panel + gap)
        axes = figure.add_axes((left / width, y / height, 4.6 / width, panel / height))
        _style(axes)
        _grid_lines(axes)
        marker = "o" if len(steps) < 3 else None
        axes.plot(
            steps,
            [value if math.isfinite(value) else math.nan for value in values],
            color=_POINT,
            linewidth=1.4,
            marker=marker,
            markersize=3.5,
        )
        axes.set_title(name, fontsize=_TITLE_SIZE, color=_INK, loc="left")
        _step_axis(axes)
    axes.set_xlabel("step", fontsize=_LABEL_SIZE, color=_INK)
    return figure


def to_png(figure: "Figure", dpi: int = 130) -> bytes:
    """The figure as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: "Figure", prefix: str = "f", *, themed: bool = False) -> str:
    """The figure as one ``<svg>`` element on a transparent ground, the same text for the same figure.

    Args:
        figure: the figure.
        prefix: what element ids begin with. Figures on one page need different ones.
        themed: let a page choose the colours of text, axes and empty cells, by the CSS variables
            ``--figure-ink``, ``--figure-quiet`` and ``--figure-empty``.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib salts some ids at random, and the salt is a global setting: number them instead.
    numbers: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        return match[1] + numbers.setdefault(match[2], f"{prefix}{len(numbers)}")

    svg = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', rename, svg).strip()
    if themed:
        for name, color in (("ink", _INK), ("quiet", _QUIET), ("empty", _EMPTY)):
            svg = svg.replace(color, f"var(--figure-{name}, {color})")
    return svg


def _figure(
    width: float,
    height: float,
    *,
    left: float,
    right: float,
    bottom: float,
    top: float,
    axes: bool = True,
) -> tuple["Figure", Any]:
    """A figure whose axes are ``width`` × ``height`` inches, with the given margins around them."""
    from matplotlib.figure import Figure

    total_width, total_height = left + width + right, bottom + height + top
    figure = Figure(figsize=(total_width, total_height), facecolor="white")
    if not axes:
        return figure, None
    area = figure.add_axes(
        (left / total_width, bottom / total_height, width / total_width, height / total_height)
    )
    _style(area)
    return figure, area


def _style(axes: "Axes") -> None:
    # Everything a user's matplotlib style could change is set, so that figures look the same everywhere.
    axes.set_facecolor("none")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.offsetText.set(fontsize=7, color=_INK)
    axes.tick_params(which="both", labelsize=_TICK_SIZE, labelcolor=_INK, color=_QUIET, direction="out")
    for spine in axes.spines.values():
        spine.set(visible=True, color=_QUIET, linewidth=0.8)


def _step_axis(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _grid_lines(axes: "Axes") -> None:
    axes.grid(visible=True, color=_EMPTY, linewidth=0.7, linestyle="-")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _title(figure: "Figure", text: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(
        0.12 / width,
        1 - 0.1 / height,
        text,
        fontsize=_TITLE_SIZE,
        color=_INK,
        ha="left",
        va="top",
        linespacing=1.35,
    )


def _axis_labels(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=_LABEL_SIZE, color=_INK)
    axes.set_ylabel(y, fontsize=_LABEL_SIZE, color=_INK)
    _grid_lines(axes)


def _thin(count: int, limit: int = _MAX_TICKS) -> list[int]:
    """Up to ``limit`` evenly chosen indices."""
    if count <= limit:
        return list(range(count))
    if limit == _MAX_PANELS:
        # First and last are wanted among the panels.
        return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})
    return list(range(0, count, math.ceil(count / limit)))


def _layer_colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    # The bright end of viridis is hard to see on white.
    return [colormaps["viridis"](0.84 * i / max(count - 1, 1)) for i in range(count)]


def _spans_decades(values: Tensor, ratio: float = 100.0) -> bool:
    values = values[values.isfinite()]
    return bool(values.numel()) and bool(values.min() > 0) and bool(values.max() > ratio * values.min())


def _color_scale(grid: Any, style: Statistic) -> dict[str, Any]:
    """Colour map and norm of a heatmap."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    finite = grid[np.isfinite(grid)]
    if not finite.size:
        return {"cmap": "viridis", "norm": Normalize(0, 1)}
    low, high = float(finite.min()), float(finite.max())
    if style.share:
        return {"cmap": "viridis", "norm": Normalize(min(0.0, low), max(1.0, high))}
    if style.signed and low < 0:
        reach = max(-low, high)
        return {"cmap": "PuOr", "norm": Normalize(-reach, reach)}
    if low > 0 and high > 100 * low:
        return {"cmap": "viridis", "norm": LogNorm(low, high)}
    if low == high:
        low, high = low - 0.5 * abs(low or 1.0), high + 0.5 * abs(high or 1.0)
    return {"cmap": "viridis", "norm": Normalize(low, high)}


def _annotate(axes: "Axes", grid: Any, image: Any) -> None:
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if not math.isfinite(value):
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            text = f"{value:.0f}" if 100 <= abs(value) < 10_000 else f"{value:.2g}"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=6.5,
                color=_ON_DARK if dark else _ON_BRIGHT,
            )


def _share_limits(axes: "Axes", values: Tensor) -> None:
    """From zero to one unless everything lies in a narrow band, which is then shown whole."""
    values = values[values.isfinite()]
    if not values.numel() or float(values.max() - values.min()) > 0.2:
        axes.set_ylim(-0.03, 1.03)
        return
    middle = float(values.max() + values.min()) / 2
    low = min(max(middle - 0.12, -0.01), 0.77)
    axes.set_ylim(low, low + 0.24)


def _layer_legend(figure: "Figure", axes: "Axes", labels: list[str], colors: list[Any]) -> None:
    from matplotlib.lines import Line2D

    chosen = _thin(len(labels), 12)
    handles = [Line2D([], [], color=colors[i], marker="o", markersize=4, linewidth=1.3) for i in chosen]
    if not handles:
        axes.text(
            0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", color=_QUIET, fontsize=9
        )
        return
    width, height = figure.get_size_inches()
    figure.legend(
        handles,
        [labels[i] for i in chosen],
        loc="upper left",
        bbox_to_anchor=(axes.get_position().x1 + 0.04 / width, axes.get_position().y1 + 0.06 / height),
        fontsize=min(_TICK_SIZE, 8.0 * 16 / max(16, *(len(label) for label in labels))),
        frameon=False,
        labelcolor=_INK,
        labelspacing=0.22,
        handlelength=1.0,
        borderaxespad=0.0,
    )


def _scatter_by_layer(figure: "Figure", axes: "Axes", points: list[tuple[str, Tensor, Tensor]]) -> None:
    colors = _layer_colors(len(points))
    for color, (_, x, y) in zip(colors, points, strict=True):
        axes.plot(
            x.numpy(),
            y.numpy(),
            linestyle="none",
            marker="o",
            markersize=4.2,
            color=color,
            markeredgecolor="white",
            markeredgewidth=0.4,
            rasterized=True,
        )
    _layer_legend(figure, axes, [label for label, _, _ in points], colors)


def _first_recorded(history: History | None, names: tuple[str, ...]) -> str:
    for name in names:
        if history is not None and name in history.values and bool(history.values[name][-1].isfinite().any()):
            return name
    raise ValueError(f"expected a history with one of {', '.join(names)}, got none: record it before drawing")


def _paired(record: RunRecord, x_name: str, y_name: str) -> list[tuple[str, Tensor, Tensor]]:
    """Newest values of a spectrum and an attention statistic for layers that both histories have."""
    measured = _newest(record.attention, y_name)
    points = []
    for label, x in _newest(record.spectrum, x_name).items():
        y = measured.get(label)
        if y is None or y.shape != x.shape:
            continue
        keep = x.isfinite() & y.isfinite()
        if keep.any():
            points.append((label, x[keep], y[keep]))
    if not points:
        raise ValueError(
            f"expected layers with both {x_name!r} and {y_name!r}, got none: "
            "run both monitors on the same layers"
        )
    return points


def _newest(history: History | None, name: str) -> dict[str, Tensor]:
    if history is None or name not in history.values:
        return {}
    return dict(zip(history.layers, history.split(history.values[name][-1].double()), strict=True))


def _steps_of(record: RunRecord) -> str:
    assert record.spectrum is not None
    assert record.attention is not None
    weights, attention = record.spectrum.steps[-1], record.attention.steps[-1]
    return (
        f"step {weights}" if weights == attention else f"weights at step {weights}, attention at {attention}"
    )


def _circle_law_radius(record: RunRecord, label: str) -> float | None:
    """The radius that :func:`eigenvalue_plane` derives, or None where it cannot be known."""
    history = record.spectrum
    if history is None or label not in history.layers or not history.steps:
        return None
    if not {"trace", "eig_mean", "frobenius_sq"} <= set(history.values):
        return None
    index = history.steps.index(record.eigenvalues_step) if record.eigenvalues_step in history.steps else -1
    layer = history.layers.index(label)
    trace, mean, frobenius_sq = (
        history.split(history.values[name][index].double())[layer]
        for name in ("trace", "eig_mean", "frobenius_sq")
    )
    # The mean is trace / n. n is d_model, unless the support is the head, whose width the eigenvalues tell.
    ratio = float((trace / mean)[mean != 0].nanmedian())
    norm = float(frobenius_sq[frobenius_sq.isfinite()].mean())
    if not math.isfinite(ratio) or not math.isfinite(norm):
        return None
    width = round(ratio)
    return math.sqrt(norm / width) if width > record.eigenvalues[label].shape[-1] else None
