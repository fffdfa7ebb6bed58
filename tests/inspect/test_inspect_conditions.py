"""Conditions, and the numbers that they are about."""

import math

import pytest
import torch

from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.export import check_condition, logged_values, parse_condition
from lightning_qk.inspect.read import Reading


def reading() -> Reading:
    """Two layers of two heads, the second of cross-attention."""
    nan = math.nan
    return Reading(
        title="a",
        step=None,
        labels=["layer_00", "cross_layer_00"],
        names=["0.self", "0.cross"],
        heads=[2, 2],
        self_attention=[True, False],
        values={
            "eig_var": torch.tensor([1.0, 3.0, nan, nan]),
            "frobenius_sq": torch.tensor([1.0, 3.0, nan, nan]),
            "singular_max": torch.tensor([4.0, 8.0, 5.0, 7.0]),
        },
    )


def test_values_have_the_keys_of_the_log() -> None:
    values = logged_values(reading())
    assert values["qk/eig_var/mean"] == 2
    assert (values["qk/eig_var/min"], values["qk/eig_var/max"]) == (1, 3)
    assert values["qk/layer_00/eig_var"] == 2
    assert values["qk/layer_00/head_01/eig_var"] == 3
    # Of a statistic that a layer cannot have there is no key, and it takes no part.
    assert values["qk/singular_max/mean"] == 6
    assert values["qk/cross_layer_00/singular_max"] == 6
    assert "qk/cross_layer_00/eig_var" not in values


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("qk/eig_var/max>3", False),
        ("qk/eig_var/max>=3", True),
        ("qk/eig_var/max > 2.9", True),
        ("qk/layer_00/eig_var<=2e0", True),
        ("qk/layer_00/eig_var<-1", False),
        ("qk/layer_00/head_00/eig_var<1.5", True),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    assert (check_condition(parse_condition(text), logged_values(reading())) is not None) == holds


def test_a_number_that_is_not_known_fails() -> None:
    """Weights that are NaN must not pass a check."""
    broken = reading()
    broken.values["eig_var"][1] = math.nan
    values = logged_values(broken)
    for text in ("qk/eig_var/max>3", "qk/eig_var/min<0", "qk/layer_00/eig_var>100"):
        assert check_condition(parse_condition(text), values) is not None


@pytest.mark.parametrize(
    "text", ["qk/eig_var/max", "qk/eig_var/max>", ">3", "qk/eig_var/max=3", "qk/x>3 4", "a>nan"]
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(BadInput, match="expected a condition"):
        parse_condition(text)


def test_an_unknown_key_has_a_suggestion() -> None:
    with pytest.raises(BadInput, match="did you mean 'qk/eig_var/max'"):
        check_condition(parse_condition("qk/eigvar/max>3"), logged_values(reading()))
