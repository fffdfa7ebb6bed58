"""Shared by all tests: no network, no surprises from one test to the next."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch

# Tiny tensors gain nothing from threads, and on a busy machine threads that wait for each other cost minutes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers in every order of tests, and a folder of its own to leave files in."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_open_wandb_run() -> Iterator[None]:
    """A run that a test leaves open would be taken over by the next test's WandbLogger."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    """Whoever looks at attention calls goes away with the test that let it look."""
    before = torch.nn.functional.scaled_dot_product_attention, torch.nn.MultiheadAttention.forward
    yield
    assert before == (torch.nn.functional.scaled_dot_product_attention, torch.nn.MultiheadAttention.forward)
