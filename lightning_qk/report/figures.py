"""Figures for loggers. Pure functions from a history to a matplotlib figure.

Figures are built without pyplot: no global state, no backend change, safe in threads. Sizes are fixed in
inches rather than found by a layout engine, which would take longer than the drawing. The report draws its
own, see :mod:`lightning_qk.report.report`.
"""

import io
import math
from typing import TYPE_CHECKING, Any

from lightning_qk.record.history import History
from lightning_qk.record.statistics import describe
from lightning_qk.report.colors import ColorScale, color_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#222222"
_QUIET = "#8a8a8a"
_EMPTY = "#e4e4e4"
# Text on a coloured cell.
_ON_BRIGHT, _ON_DARK = "#1a1a1a", "#ffffff"
_TITLE_SIZE, _LABEL_SIZE, _TICK_SIZE, _CELL_SIZE = 10.0, 9.0, 8.0, 6.5
_MAX_TICKS = 16
# A digit of the cells' size takes about this many inches.
_DIGIT = 0.053
# Numbers take longer to draw than all the rest: more cells than this have none.
_ANNOTATE_BELOW = 64


def heatmap(history: History, statistic: str, index: int = -1) -> "Figure":
    """A statistic of every head at one kept step: layers down, heads across.

    Colours are those of the report, see :func:`~lightning_qk.report.colors.color_scale`; cells beyond their ends
    have a triangle. Cells without a value are hatched.

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
    left = 0.72 + 0.068 * max(len(label) for label in labels)
    cell = min(0.34, max(0.13, 4.4 / heads), max(0.11, 5.0 / layers))
    width, height = max(2.4, min(5.2, cell * heads)), max(0.7, min(6.0, cell * layers))
    figure, axes = _figure(width, height, left=left, right=1.0, bottom=0.52, top=0.58)

    scale = color_scale(history.values[statistic][index][None], style)
    image = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", interpolation="nearest", **_norm(scale))
    if not np.isfinite(grid).all():
        # The hatched background shows through where a cell is masked.
        axes.patch.set(facecolor=_EMPTY, hatch="/////", edgecolor=_QUIET, linewidth=0.0)
    rows, columns = _thin(layers), _thin(heads)
    axes.set_yticks(rows, [labels[i] for i in rows])
    axes.set_xticks(columns, [str(i) for i in columns])
    axes.set_xlabel("head", fontsize=_LABEL_SIZE, color=_INK)
    axes.set_ylabel("layer", fontsize=_LABEL_SIZE, color=_INK)
    ends = _mark_beyond(axes, grid, scale, min(width / heads, height / layers))
    unit = _annotate(axes, grid, image, width / heads, height / layers)
    bar = figure.add_axes(
        (
            (left + width + 0.12) / figure.get_figwidth(),
            0.52 / figure.get_figheight(),
            0.13 / figure.get_figwidth(),
            height / figure.get_figheight(),
        )
    )
    colorbar = figure.colorbar(image, cax=bar, extend=ends)
    if style.unit:
        colorbar.set_label(style.unit, size=_LABEL_SIZE, color=_INK)
    colorbar.outline.set_visible(False)
    bar.tick_params(labelsize=_TICK_SIZE, labelcolor=_INK, color=_QUIET, which="both")
    _title(figure, f"{style.label}, step {history.steps[index]}{unit}")
    return figure


def to_png(figure: "Figure") -> bytes:
    """The figure as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def _figure(
    width: float, height: float, *, left: float, right: float, bottom: float, top: float
) -> tuple["Figure", Any]:
    """A figure whose axes are ``width`` × ``height`` inches, with the given margins around them."""
    from matplotlib.figure import Figure

    total_width, total_height = left + width + right, bottom + height + top
    figure = Figure(figsize=(total_width, total_height), facecolor="white")
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


def _title(figure: "Figure", text: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(
        0.12 / width,
        1 - 0.07 / height,
        text,
        fontsize=_TITLE_SIZE,
        color=_INK,
        ha="left",
        va="top",
        linespacing=1.35,
    )


def _thin(count: int) -> list[int]:
    """Up to 16 evenly spaced indices."""
    return list(range(0, count, max(1, math.ceil(count / _MAX_TICKS))))


def _norm(scale: ColorScale) -> dict[str, Any]:
    """Colour map and norm of a heatmap."""
    from matplotlib.colors import LogNorm, Normalize

    norm = LogNorm if scale.kind == "log" else Normalize
    return {"cmap": "PuOr" if scale.kind == "signed" else "viridis", "norm": norm(scale.low, scale.high)}


def _mark_beyond(axes: "Axes", grid: Any, scale: ColorScale, size: float) -> str:
    """Mark cells beyond the ends of the colours.

    Args:
        axes: of the image.
        grid: what it shows.
        scale: its colours.
        size: of a cell, in inches.

    Returns:
        Which ends of the colour bar go on.
    """
    import numpy as np

    ends = ""
    for sign, limit, marker in ((1, scale.high, "^"), (-1, scale.low, "v")):
        rows, columns = np.nonzero(sign * grid > sign * limit)  # NaN is not
        if len(rows):
            ends += "max" if sign > 0 else "min"
            points = max(3.0, min(7.0, 72 * 0.3 * size))
            where = columns + 0.28, rows - 0.25 * sign
            axes.scatter(*where, s=points**2, marker=marker, color="white", edgecolors=_INK, linewidths=0.6)
    return {"": "neither", "maxmin": "both"}.get(ends, ends)


def _annotate(axes: "Axes", grid: Any, image: Any, width: float, height: float) -> str:
    """Print the values into the cells where they fit.

    Args:
        axes: of the image.
        grid: what it shows.
        image: its colours.
        width: of a cell, in inches.
        height: likewise.

    Returns:
        What to add to the title: the power of ten that the printed numbers are in.
    """
    import numpy as np

    if np.isfinite(grid).sum() > _ANNOTATE_BELOW:
        return ""
    texts, exponent = cell_texts(grid.ravel().tolist())
    if height < 0.13 or max(map(len, texts)) * _DIGIT > 0.95 * width:
        return ""
    for (row, column), text in zip(np.ndindex(*grid.shape), texts, strict=True):
        if text:
            red, green, blue, _ = image.cmap(image.norm(grid[row, column]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=_CELL_SIZE,
                color=_ON_DARK if dark else _ON_BRIGHT,
            )
    return f"\nnumbers in units of $10^{{{exponent}}}$" if exponent else ""


def cell_texts(values: list[float]) -> tuple[list[str], int]:
    """Numbers short enough for the cells of a heatmap: all in one power of ten, the largest with two digits.

    Args:
        values: of the cells.

    Returns:
        One text a value of at most five characters, empty where it is not finite; and the power of ten.
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    exponent = 0
    if largest and not 0.1 <= largest < 9999.5:
        exponent = math.floor(math.log10(largest))
    scale = 10.0**-exponent
    digits = 0 if largest * scale >= 99.5 else 1 if largest * scale >= 9.95 else 2
    texts = [f"{value * scale:.{digits}f}" if math.isfinite(value) else "" for value in values]
    # Without -0.00.
    return [text.lstrip("-") if text and not float(text) else text for text in texts], exponent
