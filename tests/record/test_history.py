"""The history of a monitor: bounded, ordered, and the same after a round trip."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_qk.record.history import History, RunRecord

increasing_steps = st.lists(st.integers(0, 10_000), unique=True, max_size=80).map(sorted)
any_steps = st.lists(st.integers(0, 60), max_size=80)


def filled(steps: list[int], max_points: int, heads: tuple[int, ...] = (2, 1)) -> History:
    """Every head's value tells its step and its place."""
    history = History([f"layer_{i:02d}" for i in range(len(heads))], heads, max_points)
    for step in steps:
        history.append(step, {"trace": torch.arange(sum(heads)) + 1000.0 * step})
    return history


@given(increasing_steps, st.integers(2, 9))
def test_thinning_laws(steps: list[int], max_points: int) -> None:
    history = History(["layer_00"], [1], max_points)
    for step in steps:
        history.append(step, {"trace": torch.tensor([float(step)])})
        assert len(history) <= max_points
        assert history.steps[-1] == step
        assert history.steps[0] == steps[0]
        assert all(a < b for a, b in zip(history.steps, history.steps[1:], strict=False))
        assert history.series("trace")[:, 0].tolist() == history.steps


@given(st.integers(1, 400), st.integers(2, 9))
def test_kept_points_are_evenly_spread(count: int, max_points: int) -> None:
    history = filled(list(range(count)), max_points)
    gaps = [b - a for a, b in zip(history.steps, history.steps[1:], strict=False)]
    # All but the last gap are the same power of two, and the last one is not longer.
    assert len(set(gaps[:-1])) <= 1
    if len(gaps) > 1:
        assert gaps[-1] <= gaps[0]
        assert math.log2(gaps[0]).is_integer()
    if count >= max_points:
        assert len(history) > max_points // 2


@given(any_steps, st.integers(2, 9))
def test_any_order_of_steps_leaves_increasing_steps(steps: list[int], max_points: int) -> None:
    history = filled([], max_points)
    for step in steps:
        history.append(step, {"trace": torch.full((3,), float(step))})
        assert len(history) <= max_points
        assert history.steps[-1] == step
        assert all(a < b for a, b in zip(history.steps, history.steps[1:], strict=False))
        assert history.series("trace")[:, 0].tolist() == history.steps


@given(increasing_steps, st.integers(2, 9), st.data())
def test_state_dict_round_trip_goes_on_the_same(
    steps: list[int], max_points: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(steps)))
    straight = filled(steps, max_points)
    resumed = History.from_state_dict(filled(steps[:cut], max_points).state_dict())
    for step in steps[cut:]:
        resumed.append(step, {"trace": torch.arange(3) + 1000.0 * step})
    assert resumed.steps == straight.steps
    if steps:
        assert torch.equal(resumed.series("trace"), straight.series("trace"))
    assert resumed.layers == straight.layers
    assert resumed.heads == straight.heads


def test_a_step_logged_twice_is_completed_and_overwritten() -> None:
    history = filled([1, 2], 8)
    history.append(2, {"trace": torch.zeros(3), "eig_var": torch.ones(3)})
    assert history.steps == [1, 2]
    assert history.series("trace")[1].tolist() == [0, 0, 0]
    assert history.series("eig_var")[0].isnan().all()
    assert history.series("eig_var")[1].tolist() == [1, 1, 1]


def test_a_step_back_forgets_what_came_after() -> None:
    history = filled([0, 10, 20, 30], 8)
    history.append(20, {"trace": torch.full((3,), -1.0)})
    assert history.steps == [0, 10, 20]
    assert history.series("trace")[-1].tolist() == [-1, -1, -1]


def test_statistics_that_come_and_go_are_nan_elsewhere() -> None:
    history = History(["a"], [2], 8)
    history.append(0, {"trace": torch.ones(2)})
    history.append(1, {"asymmetry": torch.ones(2)})
    assert history.statistics == ["trace", "asymmetry"]
    assert history.series("trace").isnan().tolist() == [[False, False], [True, True]]
    assert history.series("asymmetry").isnan().tolist() == [[True, True], [False, False]]


def test_values_that_come_late_complete_their_step() -> None:
    history = filled([1, 2, 3], 8)
    history.complete(2, {"late": torch.tensor([5.0, 6.0, 7.0])})
    assert history.series("late").tolist()[1] == [5.0, 6.0, 7.0]
    assert history.series("late")[[0, 2]].isnan().all()
    before = history.state_dict()
    history.complete(9, {"late": torch.zeros(3)})  # a step that is not kept
    assert history.steps == before["steps"] == [1, 2, 3]
    assert history.series("late").tolist()[1] == [5.0, 6.0, 7.0]
    with pytest.raises(ValueError, match="expected 3 values of 'late'"):
        history.complete(2, {"late": torch.zeros(2)})
    history.append(4, {"x": torch.zeros(3)})
    assert history.series("late")[3].isnan().all()


def test_wrong_number_of_values_records_nothing() -> None:
    history = filled([1], 8)
    with pytest.raises(ValueError, match="expected 3 values of 'eig_var', one a head, got 2"):
        history.append(2, {"trace": torch.zeros(3), "eig_var": torch.zeros(2)})
    assert history.steps == [1]
    assert history.statistics == ["trace"]


@pytest.mark.parametrize(("layers", "heads", "points"), [(["a"], [1, 2], 8), (["a"], [1], 1)])
def test_bad_arguments(layers: list[str], heads: list[int], points: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        History(layers, heads, points)


def test_values_are_copied() -> None:
    history = History(["a"], [2], 8)
    value = torch.ones(2)
    history.append(0, {"trace": value})
    value.zero_()
    assert history.series("trace").tolist() == [[1, 1]]


def test_grid_and_layer_series() -> None:
    history = History(["a", "b"], [1, 3], 8)
    history.append(0, {"trace": torch.tensor([1.0, 2.0, torch.nan, 4.0])})
    grid = history.grid("trace")
    assert grid.shape == (2, 3)
    assert grid[0, 0] == 1
    assert grid[0, 1:].isnan().all()
    assert history.layer_series("trace").tolist() == [[1.0, 3.0]]


def test_record_round_trip_with_nan(tmp_path: Path) -> None:
    spectrum = filled(list(range(20)), 5)
    spectrum.append(
        20, {"trace": torch.tensor([1.0, torch.nan, torch.inf]), "eig_var": torch.full((3,), torch.nan)}
    )
    eigenvalues = torch.complex(torch.randn(2, 4), torch.randn(2, 4))
    eigenvalues[1] = complex("nan")
    record = RunRecord(
        spectrum=spectrum,
        attention=History(["layer_01"], [2], 16),
        eigenvalues={"layer_00": eigenvalues, "layer_01": eigenvalues[:1, :2]},
        eigenvalues_step=20,
        scalars={"locater/penalty": ([0, 5], [1.5, math.nan])},
        info={"model": "gpt2 — größer"},
        notes=["layer_01 was not captured"],
    )
    loaded = RunRecord.load(record.save(tmp_path / "deep" / "record.safetensors"))
    assert loaded.spectrum is not None
    assert loaded.attention is not None
    assert loaded.spectrum.steps == spectrum.steps
    assert loaded.spectrum.statistics == spectrum.statistics
    for name in spectrum.statistics:
        torch.testing.assert_close(
            loaded.spectrum.series(name), spectrum.series(name), equal_nan=True, rtol=0, atol=0
        )
    assert loaded.attention.layers == ("layer_01",)
    assert len(loaded.attention) == 0
    for label, value in record.eigenvalues.items():
        torch.testing.assert_close(loaded.eigenvalues[label], value, equal_nan=True, rtol=0, atol=0)
    steps, values = loaded.scalars["locater/penalty"]
    assert steps == [0, 5]
    assert values[0] == 1.5
    assert math.isnan(values[1])
    assert (loaded.info, loaded.notes, loaded.eigenvalues_step) == (record.info, record.notes, 20)
    # A loaded history thins on as the original would.
    for history in (spectrum, loaded.spectrum):
        history.append(21, {"trace": torch.zeros(3)})
    assert loaded.spectrum.steps == spectrum.steps


def test_load_refuses_other_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    text = tmp_path / "text.safetensors"
    text.write_text("no tensors here")
    weights = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(1)}, weights)
    for path in (text, weights):
        with pytest.raises(ValueError, match="expected a record that a monitor wrote"):
            RunRecord.load(path)


def test_a_record_keeps_any_monitors_history(tmp_path: Path) -> None:
    """A new monitor needs nothing but a name for its group."""
    record = RunRecord(attention=filled([1], 8), spectrum=filled([1], 8))
    record.histories["router"] = filled([1, 2], 8)
    assert list(record.histories) == ["spectrum", "attention", "router"]
    loaded = RunRecord.load(record.save(tmp_path / "record.safetensors"))
    assert list(loaded.histories) == ["spectrum", "attention", "router"]
    assert torch.equal(loaded.histories["router"].series("trace"), record.histories["router"].series("trace"))
    loaded.attention = None
    assert loaded.attention is None
    assert "attention" not in loaded.histories
    with pytest.raises(TypeError, match="expected parts of a record, got 'spectre'"):
        RunRecord(spectre=None)
