"""What importing costs: pure functions need torch alone, and loggers and data wait until they are used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_qk


def imported(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = (
        f"{statement}\nimport json, sys; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_functional_imports_torch_alone():
    extra = imported("import lightning_qk.functional") - imported("import torch")
    assert extra == {"lightning_qk"}


def test_the_package_imports_nothing_that_no_wheel_has():
    root = Path(lightning_qk.__file__).parent
    kept = {"tools", "tests", "benchmarks", "examples", "coverage_toys"}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not kept & {name.split(".")[0] for name in names}, path


@pytest.mark.parametrize("name", ["LocAteR", "TransformerModule"])
def test_public_names_do_not_load_what_they_may_not_need(name):
    assert not {"wandb", "datasets", "tensorboard", "jinja2", "PIL"} & (
        imported(f"from lightning_qk import {name}") - imported("import lightning, transformers")
    )


def test_every_public_name_resolves():
    for name in lightning_qk.__all__:
        assert getattr(lightning_qk, name) is not None
    assert set(lightning_qk.__all__) <= set(dir(lightning_qk))
    with pytest.raises(AttributeError, match="no attribute 'QKSpectrumMonitr'"):
        _ = lightning_qk.QKSpectrumMonitr
