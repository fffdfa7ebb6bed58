"""What tests of the command share."""

from pathlib import Path

import models
import pytest


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in shards, and a wide terminal."""
    monkeypatch.setenv("COLUMNS", "140")
    models.llama().save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"
