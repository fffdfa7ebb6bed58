"""Classes of these tests that say that they are of a library."""

from pathlib import Path

import pytest

from lightning_qk.architecture import source_code

HERE = str(Path(__file__).parent)


@pytest.fixture
def code_of_a_library(monkeypatch):
    """Code of these files lies in transformers: what a class says of its module is not believed by itself."""
    home = source_code._home
    monkeypatch.setattr(
        source_code, "_home", lambda file: "transformers" if file.startswith(HERE) else home(file)
    )
