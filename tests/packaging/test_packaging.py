"""Wheel and sdist: what is in them, and that the wheel works in an environment that knows no clone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lightning_qk

ROOT = Path(__file__).parents[2]
CONFIGS = {path.name for path in (ROOT / "configs").glob("*.yaml")}
ASSETS = {path.name for path in (ROOT / "lightning_qk" / "report" / "templates").iterdir() if path.is_file()}


def run(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both: what ``make dist`` made, or built here from what git knows."""
    if given := os.environ.get("LIGHTNING_QK_DIST"):
        return (ROOT / given).resolve()
    folder = tmp_path_factory.mktemp("packaging")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), "source"], folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment of its own. What the package needs is that of the tests' environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], folder)
    (own,) = (folder / "lib").glob("python*/site-packages")
    (own / "needs.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def test_the_wheel_has_all_that_it_needs_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"lightning_qk-{lightning_qk.__version__}-py3-none-any")
    assert "lightning_qk/py.typed" in names
    assert {Path(name).name for name in names if name.startswith("lightning_qk/configs/")} >= CONFIGS
    assert {Path(name).name for name in names if "/report/templates/" in name} >= ASSETS
    assert {"minilm.parquet", "smollm2.parquet"} <= {Path(name).name for name in names}
    assert {name.split("/")[0] for name in names} == {
        "lightning_qk",
        f"lightning_qk-{lightning_qk.__version__}.dist-info",
    }
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_qk").rglob("*.py")}
    assert modules <= names


def test_the_sdist_has_what_a_clone_has(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "constraints.txt", "Makefile", "LICENSE", "README.md"} <= names
    assert {f"configs/{name}" for name in CONFIGS} <= names
    assert {"tests/conftest.py", "docs/index.md", "examples/README.md", "benchmarks/run.py"} | {
        "tools/coverage/__main__.py"
    } <= names
    assert not [name for name in names if "__pycache__" in name or "/.cache/" in name]


def test_the_wheel_is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    where = run(
        [str(installed / "python"), "-c", "import lightning_qk; print(lightning_qk.__file__)"], tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_the_command_works_without_a_clone(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "lightning-qk")
    assert "inspect" in run([command, "--help"], tmp_path)
    assert "quickstart" in run([command, "configs"], tmp_path)
    assert "gpt2" in run([command, "fit", "--config", "quickstart", "--print_config"], tmp_path)


def test_a_report_is_made_from_a_record(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "logging"))
    from simulated_run import simulated_record

    record = simulated_record().save(tmp_path / "record.safetensors")
    run([str(installed / "lightning-qk"), "report", str(record), "--output", "report.html"], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "const drawers" in page  # figures are drawn by the page's own script
