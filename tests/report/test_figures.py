"""Figures: right numbers in the axes, no global state, the same bytes twice, no crash on missing parts."""

import io
import itertools
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm
from PIL import Image
from simulated_run import simulated_record

from lightning_qk.record.history import History
from lightning_qk.report import figures


def one_step(values: list[float], heads: tuple[int, ...], name: str = "sym_var") -> History:
    history = History([f"layer_{i:02d}" for i in range(len(heads))], heads)
    history.append(7, {name: torch.tensor(values)})
    return history


@pytest.mark.parametrize("name", ["sym_var", "eig_mean"])
def test_figures_are_deterministic_and_labelled(name: str) -> None:
    record = simulated_record()
    first, second = (figures.heatmap(record.spectrum, name) for _ in range(2))
    assert figures.to_png(first) == figures.to_png(second)
    with Image.open(io.BytesIO(figures.to_png(first))) as image:
        assert image.width < 1600
        assert image.height < 1600
    assert first.texts[0].get_text()
    assert first.axes[0].get_xlabel() == "head"


def test_heatmap_shows_the_grid_and_masks_nan() -> None:
    history = one_step([1.0, 2.0, math.nan, 4.0, math.inf], (3, 2))
    figure = figures.heatmap(history, "sym_var")
    (image,) = figure.axes[0].images
    data = image.get_array()
    assert data.mask.tolist() == [[False, False, True], [False, True, True]]
    assert data[0, 1] == 2
    assert data[1, 0] == 4
    assert figure.axes[0].patch.get_hatch()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["layer_00", "layer_01"]
    assert "step 7" in figure.texts[0].get_text()


def test_heatmap_without_holes_is_not_hatched() -> None:
    assert not figures.heatmap(one_step([1.0, 2.0], (2,)), "sym_var").axes[0].patch.get_hatch()


@pytest.mark.parametrize(
    ("name", "values", "limits"),
    [
        ("entropy_normalized", [0.4, 0.5], (0, 1)),
        ("eig_mean", [-1.0, 3.0], (-3, 3)),
        ("distance", [2.0, 5.0], (2, 5)),
        ("max_abs_logit", [1.0, 1000.0], (1, 1000)),
    ],
)
def test_color_scales(name: str, values: list[float], limits: tuple[float, float]) -> None:
    (image,) = figures.heatmap(one_step(values, (2,), name), name).axes[0].images
    assert image.get_clim() == limits
    assert isinstance(image.norm, LogNorm) == (name == "max_abs_logit")


@pytest.mark.parametrize("values", [[math.nan, math.nan], [0.0, 0.0], [-1.0, -1.0], [1e-38, 1e38]])
def test_heatmap_draws_anything(values: list[float]) -> None:
    for name in ("sym_var", "eig_mean", "entropy_normalized", "something_new", "entropy_se"):
        assert figures.to_png(figures.heatmap(one_step(values, (2,), name), name))


@pytest.mark.parametrize("scale", [1e-9, 3.7e-5, 0.02, 1.0, 60.0, 800.0, 2e5, 1e30])
@pytest.mark.parametrize("heads", [4, 12, 16])
def test_digits_in_the_cells_do_not_overlap(scale: float, heads: int) -> None:
    """Numbers in cells next to each other keep a distance, whatever their size; drawn and measured."""
    values = (scale * torch.linspace(-1, 1, 4 * heads)).tolist()
    figure = figures.heatmap(one_step(values, (heads,) * 4, "eig_mean"), "eig_mean")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert len(axes.texts) in (0, 4 * heads)
    assert axes.texts or heads > 12
    boxes = [text.get_window_extent() for text in axes.texts]
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0 or left.y0 != right.y0


def test_cell_texts_name_their_unit() -> None:
    assert figures.cell_texts([1.234e-5, -9.99e-6, math.nan, 0.0]) == (["1.23", "-1.00", "", "0.00"], -5)
    assert figures.cell_texts([0.5, 0.25]) == (["0.50", "0.25"], 0)
    assert figures.cell_texts([math.inf]) == ([""], 0)
    assert max(map(len, figures.cell_texts([-9999.0, 3.0])[0])) <= 5
    figure = figures.heatmap(one_step([1e-5, 2e-5], (2,)), "sym_var")
    assert "10^{-5}" in figure.texts[0].get_text()


def test_no_pyplot_and_no_backend_change() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import matplotlib\n"
        "from simulated_run import simulated_record\n"
        "from lightning_qk.report import figures\n"
        # Looking at the backend is what resolves it, with pyplot.
        "look = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = look()\n"
        "record = simulated_record()\n"
        "figures.to_png(figures.heatmap(record.spectrum, 'sym_var'))\n"
        "print('matplotlib.pyplot' in sys.modules, before == look())"
    )
    folder = __file__.rsplit("/", 2)[0]
    out = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]


def test_threads_draw_what_one_thread_draws() -> None:
    record = simulated_record()
    wanted = figures.to_png(figures.heatmap(record.spectrum, "sym_var"))
    got: list[bytes] = []

    def work() -> None:
        got.extend(figures.to_png(figures.heatmap(record.spectrum, "sym_var")) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [wanted] * 12


def test_a_heatmap_is_quick() -> None:
    history = one_step(np.linspace(0, 1, 144).tolist(), (12,) * 12)
    times = []
    for _ in range(5):
        start = time.process_time()
        figures.to_png(figures.heatmap(history, "sym_var"))
        times.append(time.process_time() - start)
    # 0.08 s where this was written; the bound leaves room for a busy machine.
    assert min(times) < 0.4
