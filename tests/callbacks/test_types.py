"""Arguments of a wrong type are refused in a sentence where they are given, by every callback."""

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import lightning_qk
from lightning_qk.callbacks._types import annotations_of, check_types, fits

NAMES = [
    name
    for name in lightning_qk.__all__
    if isinstance(getattr(lightning_qk, name), type) and issubclass(getattr(lightning_qk, name), Callback)
]
WRONG = ["x", -1, None, [], {}, object(), math.nan, math.inf, 1.5, [1], torch.eye(2), b"x"]
NEEDED = {"cap": 1.0, "target": 1.0}


def refusal(kind, arguments) -> Exception | None:
    try:
        kind(**arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_given_is_taken_or_refused_in_a_sentence(name):
    kind = getattr(lightning_qk, name)
    needed = {
        one.name: NEEDED[one.name]
        for one in inspect.signature(inspect.unwrap(kind.__init__)).parameters.values()
        if one.default is one.empty and one.name in NEEDED
    }
    for argument in annotations_of(kind):
        for value in WRONG:
            error = refusal(kind, needed | {argument: value})
            if "multiple values" in str(error):
                continue  # one of a base, which this class sets itself
            assert error is None or isinstance(error, ValueError), (argument, value, error)
            assert error is None or "expected" in str(error), (argument, value, error)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_none_are_not_taken(name):
    """A step modulo NaN is never 0: nothing would be measured, without a word."""
    kind = getattr(lightning_qk, name)
    for argument, annotation in annotations_of(kind).items():
        if annotation in (int, int | None):
            for value in (math.nan, math.inf, 1.5, "3", [3]):
                with pytest.raises(ValueError, match=f"expected.*{argument}"):
                    kind(**{argument: value})


def test_every_argument_of_a_callback_has_a_type():
    for name in NAMES:
        annotations = annotations_of(getattr(lightning_qk, name))
        assert annotations
        # What has none, or one that cannot be resolved, would be taken unchecked.
        assert Any not in annotations.values(), name


@pytest.mark.parametrize(
    ("value", "annotation", "is_taken"),
    [
        (3, int, True),
        (1e3, int, True),
        (torch.tensor(3), int, True),
        (True, int, False),
        (2.5, int, False),
        (3, float, True),
        (torch.tensor(0.5), float, True),
        ("1e-3", float, False),
        (False, float, False),
        (1, bool, True),
        ("no", bool, False),
        (None, int | None, True),
        ("a", list[str], False),
        (["a", "b"], list[str], True),
        (("a", 1), list[str], False),
        (range(3), list[int], True),
        ({"a": 1}, list[str], False),
    ],
)
def test_which_values_fit(value, annotation, is_taken):
    assert fits(value, annotation) is is_taken


def test_positional_arguments_and_unknown_names():
    with pytest.raises(
        ValueError, match="expected every_n_steps of AttentionMonitor to be an integer or None, got 'x'"
    ):
        lightning_qk.AttentionMonitor("x")
    check_types(lightning_qk.AttentionMonitor, (), {"everyn": object()})
    with pytest.raises(TypeError, match="everyn"):
        lightning_qk.AttentionMonitor(everyn=3)


def test_copies_and_pickles_are_not_checked_again():
    monitor = lightning_qk.AttentionMonitor(5)
    for other in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert other.settings() == monitor.settings()
