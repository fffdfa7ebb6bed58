"""The picture of a healthy and a sick run, and what the page says of it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/healthy_and_sick.py as a module."""
    spec = importlib.util.spec_from_file_location("healthy_and_sick", ROOT / "docs" / "healthy_and_sick.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["healthy_and_sick"] = module
    spec.loader.exec_module(module)
    return module


def test_curves_and_their_picture(script: ModuleType, tmp_path: Path) -> None:
    runs = {name: script.train(name, steps=24, cache=str(tmp_path / "cache")) for name in script.RUNS}
    for curves in runs.values():
        assert len(curves.loss) == 24
        for statistic, _, _ in script.PANELS:
            assert curves.heads[statistic].shape == (
                len(curves.steps[statistic]),
                script.LAYERS,
                script.HEADS,
            )
    figure = script.draw(runs)
    assert [axis.get_title() for axis in figure.axes[:2]] == list(script.TITLES.values())
    drawn = figure.axes[2].get_lines()[0].get_ydata()
    expected = runs["healthy"].heads["entropy_normalized"][:, 0].mean(1)
    assert list(drawn) == pytest.approx(expected.tolist())
    target = tmp_path / "picture.png"
    figure.savefig(target)
    assert target.stat().st_size > 20_000
    small = script.draw_small(runs)
    assert [line.get_label() for line in small.axes[0].get_lines()] == list(script.RUNS)
    last = runs["sick"].heads["entropy_normalized"][-1]
    assert [text.get_text() for text in small.axes[2].texts] == [f"{float(x):.2f}" for x in last.flatten()]
    # The first sign, and the page's: a thousand times the variance within a dozen steps.
    variance = runs["sick"].heads["sym_var"].mean((1, 2))
    assert variance[2] > 1000 * variance[0]
    assert runs["healthy"].heads["sym_var"].mean((1, 2))[2] < 10 * variance[0]


@pytest.mark.slow
def test_what_the_page_says(script: ModuleType, tmp_path: Path) -> None:
    healthy, sick = (script.train(name, cache=str(tmp_path / "cache")) for name in ("healthy", "sick"))
    ends = {
        name: curves.heads["entropy_normalized"][-1].mean(1) for name, curves in (("h", healthy), ("s", sick))
    }
    assert ((ends["h"] > 0.5) & (ends["h"] < 0.95)).all()
    assert ends["s"][0] < 0.05
    assert healthy.heads["max_abs_logit"][-1].max() < 50
    assert sick.heads["max_abs_logit"][-1].max() > 100
    assert sum(sick.loss[-20:]) > sum(healthy.loss[-20:]) + 20 * 0.2
    assert max(sick.loss[20:]) < 10  # it does not explode
