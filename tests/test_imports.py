"""What importing costs: pure functions need torch alone, and loggers and data wait until they are used."""

import json
import subprocess
import sys

import pytest

import lightning_qk

STEPS = [
    "import torch",
    "import lightning_qk.functional",
    "import lightning, transformers",
    "from lightning_qk import LocAteR",
    "from lightning_qk import TransformerModule",
]


@pytest.fixture(scope="module")
def added() -> dict[str, set[str]]:
    """Top-level modules that each of the steps adds, one after the other, in a fresh interpreter."""
    code = (
        "import json, sys\n"
        "seen, added = {*sys.modules}, {}\n"
        f"for step in {STEPS}:\n"
        "    exec(step)\n"
        "    added[step] = sorted({name.split('.')[0] for name in {*sys.modules} - seen})\n"
        "    seen = {*sys.modules}\n"
        "print(json.dumps(added))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return {step: set(names) for step, names in json.loads(done.stdout.splitlines()[-1]).items()}


def test_functional_imports_torch_alone(added):
    assert added["import lightning_qk.functional"] - added["import torch"] == {"lightning_qk"}


@pytest.mark.parametrize("name", ["LocAteR", "TransformerModule"])
def test_public_names_do_not_load_what_they_may_not_need(name, added):
    step = f"from lightning_qk import {name}"
    before = set().union(*(added[one] for one in STEPS[: STEPS.index(step)]))
    assert "lightning_qk" in added[step]
    assert not {"wandb", "datasets", "tensorboard", "jinja2", "PIL"} & (added[step] - before)


def test_every_public_name_resolves():
    for name in lightning_qk.__all__:
        assert getattr(lightning_qk, name) is not None
    assert set(lightning_qk.__all__) <= set(dir(lightning_qk))
    with pytest.raises(AttributeError, match="no attribute 'QKSpectrumMonitr'"):
        _ = lightning_qk.QKSpectrumMonitr
