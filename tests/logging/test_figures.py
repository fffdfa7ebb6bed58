"""Figures: right numbers in the axes, no global state, the same bytes twice, no crash on missing parts."""

import io
import math
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm
from PIL import Image
from simulated_run import simulated_record

from lightning_qk.logging import figures
from lightning_qk.logging.history import History, RunRecord

DRAWN: dict[str, Callable[[RunRecord], Any]] = {
    "heatmap": lambda record: figures.heatmap(record.spectrum, "sym_var"),
    "over_time": lambda record: figures.over_time(record.attention, "entropy_normalized"),
    "entropy_against_variance": figures.entropy_against_variance,
    "propagation": figures.propagation_predicted_measured,
    "eigenvalue_plane": figures.eigenvalue_plane,
    "scalars": figures.scalars_over_time,
}


def one_step(values: list[float], heads: tuple[int, ...], name: str = "sym_var") -> History:
    history = History([f"layer_{i:02d}" for i in range(len(heads))], heads)
    history.append(7, {name: torch.tensor(values)})
    return history


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_deterministic_and_labelled(name: str) -> None:
    record = simulated_record()
    first, second = DRAWN[name](record), DRAWN[name](record)
    assert figures.to_png(first) == figures.to_png(second)
    svg = figures.to_svg(first, prefix="a")
    assert svg == figures.to_svg(second, prefix="a")
    ET.fromstring(svg)
    with Image.open(io.BytesIO(figures.to_png(first))) as image:
        assert image.width < 1600
        assert image.height < 1600
    texts = [text.get_text() for text in first.texts] + [axes.get_title(loc="left") for axes in first.axes]
    assert any(texts)
    assert any(axes.get_xlabel() for axes in first.axes)


def test_ids_of_two_figures_do_not_meet() -> None:
    figure = figures.heatmap(one_step([1.0, 2.0], (2,)), "sym_var")
    roots = [ET.fromstring(figures.to_svg(figure, prefix=prefix)) for prefix in ("a-", "b-")]
    first, second = ({e.attrib["id"] for e in root.iter() if "id" in e.attrib} for root in roots)
    assert first
    assert not first & second
    # Every reference has its target.
    text = figures.to_svg(figure, prefix="a-")
    for reference in (*text.split('href="#')[1:], *text.split("url(#")[1:]):
        assert reference.split('"')[0].split(")")[0] in first


def test_themed_svg_leaves_no_fixed_ink() -> None:
    figure = figures.over_time(simulated_record().spectrum, "eig_mean")
    assert "#222222" in figures.to_svg(figure)
    themed = figures.to_svg(figure, themed=True)
    assert themed.count("#222222") == themed.count("var(--figure-ink, #222222)") > 0


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
        assert figures.to_png(figures.over_time(one_step(values, (2,), name), name))


def test_over_time_draws_means_and_peaks() -> None:
    history = History(["a", "b"], [2, 2])
    for step in (0, 5):
        values = torch.tensor([1.0, 3.0, math.nan, math.nan]) + step
        history.append(step, {"logit_std": values, "max_abs_logit": values})
    (line,) = figures.over_time(history, "logit_std").axes[0].lines
    assert line.get_xdata().tolist() == [0, 5]
    assert line.get_ydata().tolist() == [2, 7]
    (line,) = figures.over_time(history, "max_abs_logit").axes[0].lines
    assert line.get_ydata().tolist() == [3, 8]


def test_scatter_pairs_heads_of_layers_that_both_histories_have() -> None:
    record = RunRecord(
        spectrum=one_step([1.0, 2.0, 3.0, 4.0], (2, 2)), attention=History(["layer_01", "other"], [2, 1])
    )
    record.attention.append(9, {"entropy_normalized": torch.tensor([0.3, math.nan, 0.5])})
    figure = figures.entropy_against_variance(record)
    (points,) = figure.axes[0].lines
    assert points.get_xdata().tolist() == [3]
    assert points.get_ydata() == pytest.approx([0.3])
    assert "weights at step 7, attention at 9" in figure.texts[0].get_text()


@pytest.mark.parametrize("draw", [name for name in DRAWN if name not in ("heatmap", "over_time")])
def test_missing_parts_are_said(draw: str) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got none"):
        DRAWN[draw](RunRecord())


def test_at_most_twelve_panels_with_first_and_last() -> None:
    record = RunRecord(eigenvalues={f"layer_{i:02d}": torch.randn(2, 4) + 0j for i in range(40)})
    figure = figures.eigenvalue_plane(record)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 12
    assert titles[0] == "layer_00"
    assert titles[-1] == "layer_39"
    assert "12 of 40 layers" in figure.texts[0].get_text()


def test_eigenvalue_plane_leaves_out_what_is_not_finite() -> None:
    values = torch.ones(2, 3) + 0j
    values[1, 0] = complex("nan")
    record = RunRecord(eigenvalues={"a": values, "cross": torch.full((2, 3), torch.nan) + 0j})
    (axes,) = figures.eigenvalue_plane(record).axes
    assert len(axes.lines[0].get_xdata()) == 3


@pytest.mark.parametrize(("d_head", "d_model"), [(64, 768), (128, 512), (128, 256)])
def test_the_circle_holds_a_random_head(d_head: int, d_model: int) -> None:
    """The radius that is drawn, against the eigenvalues of random heads of any scale."""
    record = simulated_record(layers=1, heads=8, points=1, d_head=d_head, d_model=d_model)
    (circle,) = figures.eigenvalue_plane(record).axes[0].patches
    modulus = record.eigenvalues["layer_00"].abs()
    assert float(modulus.amax(-1).mean()) == pytest.approx(circle.radius, rel=0.1)
    # Inside, the share F of the eigenvalues within r follows F (1 - c + c F) = (r / radius)², with
    # c = d_head / d_model: uniform over the disc for narrow heads, and denser at its centre for wide ones.
    c = d_head / d_model
    for share in (0.25, 0.5, 0.75, 0.9):
        within = circle.radius * math.sqrt(share * (1 - c + c * share))
        assert float((modulus < within).float().mean()) == pytest.approx(share, abs=0.05)


def test_no_circle_where_the_width_is_unknown() -> None:
    record = simulated_record(d_head=8)
    spectrum = record.spectrum
    spectrum.values["eig_mean"][-1] = spectrum.values["trace"][-1] / 8
    assert not any(axes.patches for axes in figures.eigenvalue_plane(record).axes)


def test_no_pyplot_and_no_backend_change() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import matplotlib\n"
        "from simulated_run import simulated_record\n"
        "from lightning_qk.logging import figures\n"
        # Looking at the backend is what resolves it, with pyplot.
        "look = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = look()\n"
        "record = simulated_record()\n"
        "figures.to_png(figures.heatmap(record.spectrum, 'sym_var'))\n"
        "figures.to_svg(figures.eigenvalue_plane(record))\n"
        "print('matplotlib.pyplot' in sys.modules, before == look())"
    )
    folder = __file__.rsplit("/", 1)[0]
    out = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]


def test_threads_draw_what_one_thread_draws() -> None:
    record = simulated_record()
    wanted = figures.to_svg(figures.heatmap(record.spectrum, "sym_var"))
    got: list[str] = []

    def work() -> None:
        got.extend(figures.to_svg(figures.heatmap(record.spectrum, "sym_var")) for _ in range(3))

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
        start = time.perf_counter()
        figures.to_png(figures.heatmap(history, "sym_var"))
        times.append(time.perf_counter() - start)
    # 0.08 s where this was written; the bound leaves room for a busy machine.
    assert min(times) < 0.4
