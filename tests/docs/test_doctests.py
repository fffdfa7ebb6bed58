"""Examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import lightning_qk

PACKAGE = Path(lightning_qk.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


def test_what_people_call_first_has_an_example() -> None:
    for name in ("head_projections", "locater_penalty"):
        assert ">>> " in getattr(lightning_qk, name).__doc__
    functional = importlib.import_module("lightning_qk.functional")
    for name in ("qk_moments", "qk_eigenvalues", "signal_propagation_probability", "attention_statistics"):
        assert ">>> " in getattr(functional, name).__doc__, name
