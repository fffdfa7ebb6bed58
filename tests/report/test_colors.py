"""Colour scales: one head cannot take the colours from the others, and nothing is cut off without need."""

import pytest
import torch

from lightning_qk.record.statistics import describe
from lightning_qk.report.colors import color_scale


def test_one_outlier_leaves_the_others_their_colours() -> None:
    values = torch.linspace(1, 2, 72)
    values[40] = 90.0
    scale = color_scale(values[None], describe("distance", "attention"))
    assert scale.low == 1.0
    assert 2.0 <= scale.high < 3.0
    shares = (values - scale.low) / (scale.high - scale.low)
    assert float(shares[71]) > 0.5  # those that are not far off use more than half of the colours


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_heads_are_not_cut_off(seed: int) -> None:
    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(seed)) + 9
    scale = color_scale(values, describe("distance", "attention"))
    beyond = (values < scale.low) | (values > scale.high)
    assert int(beyond.sum()) <= 1


def test_a_change_of_all_heads_over_time_is_seen() -> None:
    """Limits are robust over heads and not over steps: the last step alone is large."""
    values = torch.rand(60, 32)
    values[-1] *= 50
    assert color_scale(values, describe("distance", "attention")).high == pytest.approx(
        float(values.max()), rel=0.2
    )


def test_kinds() -> None:
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert color_scale(values, describe("sink_first", "attention")) == ("share", 0.0, 1.0)
    assert color_scale(values - 0.3, describe("eig_mean", "spectrum")).kind == "signed"
    scale = color_scale(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), describe("max_abs_logit", "attention"))
    assert (scale.kind, round(scale.low, 6), round(scale.high, 6)) == ("log", 1.0, 1000.0)


@pytest.mark.parametrize(
    "values",
    [[float("nan")] * 3, [0.0, 0.0, 0.0], [5.0, 5.0, 5.0], [0.0, 0.0, 7.0], [float("inf"), 1.0, 2.0]],
)
def test_limits_are_apart_and_finite(values: list[float]) -> None:
    for name in ("distance", "eig_mean", "sink_first"):
        scale = color_scale(torch.tensor([values, [float("nan")] * 3]), describe(name))
        assert -1e9 < scale.low < scale.high < 1e9
