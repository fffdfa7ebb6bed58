"""Centres and radius of masks: closed forms against breadth-first search, and that against walks by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qk.functional import geometry, mask_geometry


def window_mask(n: int, window: int | None, is_causal: bool) -> Tensor:
    ahead = torch.arange(n) - torch.arange(n)[:, None]
    seen = ahead <= 0 if is_causal else torch.ones(n, n, dtype=torch.bool)
    return seen if window is None else seen & (ahead.abs() < window)


def walked(mask: Tensor) -> list[float]:
    """Eccentricity of each node by a queue."""
    n = mask.shape[0]
    out = []
    for start in range(n):
        distance = {start: 0}
        queue = [start]
        while queue:
            j = queue.pop(0)
            for i in range(n):
                if mask[i, j] and i not in distance:
                    distance[i] = distance[j] + 1
                    queue.append(i)
        out.append(float(max(distance.values())) if len(distance) == n else math.inf)
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 40, None])
@pytest.mark.parametrize("is_causal", [True, False])
def test_windows(n, window, is_causal):
    closed = mask_geometry(n=n, is_causal=is_causal, sliding_window=window)
    searched = mask_geometry(window_mask(n, window, is_causal))
    assert torch.equal(closed.centres, searched.centres)
    assert torch.equal(closed.eccentricity, searched.eccentricity)
    assert closed.radius == searched.radius
    if window == 1 and n > 1:
        assert closed.radius is None
        assert not closed.centres.any()
    elif is_causal and n > 1:
        assert closed.radius == math.ceil((n - 1) / (min(window or n, n) - 1))
        assert closed.centres.nonzero().flatten().tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.floats(0.0, 0.6), st.integers(0, 2**31), st.sampled_from([1, 20, 1 << 22]))
def test_any_graph(n, density, seed, elements):
    mask = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)) < density
    before, geometry._BLOCK_ELEMENTS = geometry._BLOCK_ELEMENTS, elements
    try:
        got = mask_geometry(mask)
    finally:
        geometry._BLOCK_ELEMENTS = before
    want = walked(mask)
    assert got.eccentricity.tolist() == want
    assert got.centres.tolist() == [value < math.inf for value in want]
    assert got.radius == (int(min(want)) if min(want) < math.inf else None)


def test_a_sink_is_a_centre_of_radius_one():
    mask = window_mask(50, 4, is_causal=True)
    mask[:, 0] = True
    assert mask_geometry(mask).radius == 1


def test_padding_is_left_out():
    tokens = torch.tensor([False, False, True, True, True, True])
    mask = window_mask(6, 2, is_causal=True) & tokens
    got = mask_geometry(mask, tokens=tokens)
    assert got.radius == 3
    assert got.centres.tolist() == [False, False, True, False, False, False]
    assert got.eccentricity.isnan().tolist() == [True, True, False, False, False, False]
    assert mask_geometry(mask).radius is None
    assert mask_geometry(mask, tokens=torch.zeros(6, dtype=torch.bool)).radius is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a mask, or n"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool), "n": 2}, "expected a mask alone"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "boolean mask"),
        ({"mask": torch.ones(2, 2)}, "boolean mask"),
        ({"mask": torch.ones(0, 0, dtype=torch.bool)}, "at least one token"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool), "tokens": torch.ones(3)}, "tokens of shape"),
        ({"n": 0}, "at least one token"),
        ({"n": 3, "sliding_window": 0}, "window of at least 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_geometry(**arguments)
