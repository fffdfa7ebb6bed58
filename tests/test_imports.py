"""What importing costs: pure functions need torch alone, and loggers and data wait until they are used."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

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


FLOORS = [
    {"_deprecated", "_moved", "_packages", "_printable", "_version", "tasks"},
    {"functional", "guard"},
    {"architecture"},
    {"heads"},
    {"capture"},
    {"metrics", "regularizers", "interventions", "record"},
    {"probes", "verification", "report", "tokens"},
    {"loggers"},
    {"data", "module"},
    {"callbacks", "inspect"},
    {"cli"},
]
"""Rooms of the package from the ground up: each imports from lower floors alone."""
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
CIRCLES: set[frozenset[str]] = set()
"""Circles of files within one room that are still to be opened."""


def imported() -> list[tuple[str, str]]:
    """Pairs of modules of the package, the first of which imports the second, wherever in its text."""
    root = Path(lightning_qk.__file__).parent
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
        if path.parent != root or path.stem not in ("__init__", "__main__")
    }
    pairs = []
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_qk":
                home = node.module.removeprefix("lightning_qk").lstrip(".")
                for alias in node.names:
                    whole = f"{home}.{alias.name}".lstrip(".")
                    pairs.append((name, whole if whole in modules else home))
            elif isinstance(node, ast.Import):
                pairs += [
                    (name, alias.name.removeprefix("lightning_qk."))
                    for alias in node.names
                    if alias.name.startswith("lightning_qk.")
                ]
    return [(one, other) for one, other in pairs if other and one != other]


def room(module: str) -> str:
    return module.split(".")[0]


def test_rooms_import_from_lower_floors_only():
    root = Path(lightning_qk.__file__).parent
    rooms = {path.relative_to(root).parts[0].removesuffix(".py") for path in root.rglob("*.py")}
    assert set(FLOOR) == rooms - {"__init__", "__main__"}
    upward = [
        (one, other)
        for one, other in imported()
        if room(one) != room(other) and FLOOR[room(one)] <= FLOOR[room(other)]
    ]
    assert upward == []


def test_private_modules_stay_in_their_room():
    private = [
        (one, other)
        for one, other in imported()
        if room(one) != room(other) and any(part.startswith("_") for part in other.split(".")[1:])
    ]
    assert private == []


def test_no_files_import_each_other_in_a_circle():
    after: dict[str, set[str]] = {}
    for one, other in imported():
        after.setdefault(one, set()).add(other)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in after.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return seen

    below = {name: reached(name) for name in after}
    circles = {
        frozenset(other for other in below if other in below[name] and name in below[other])
        for name in below
        if name in below[name]
    }
    assert circles == CIRCLES


FACES = [
    "",
    *sorted(one for floor in FLOORS for one in floor if not one.startswith("_") and one != "tasks"),
    *(f"callbacks.{one}" for one in ("monitors", "interventions", "guard")),
]


@pytest.mark.parametrize("face", FACES)
def test_public_names_are_there(face):
    module = importlib.import_module(f"lightning_qk.{face}".rstrip("."))
    assert module.__doc__
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'not_there'"):
        module.not_there  # noqa: B018


def test_old_paths_are_found_with_a_warning():
    from lightning_qk._moved import MOVED

    for old, new in MOVED.items():
        sys.modules.pop(old, None)
        with pytest.warns(DeprecationWarning, match=rf"{old} is {new} now"):
            module = importlib.import_module(old)
        assert module is importlib.import_module(new)
        assert module.__spec__.name == new
