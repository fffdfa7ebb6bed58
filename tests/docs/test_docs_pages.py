"""Pages of the documentation: their code runs, their commands exist, their links lead somewhere."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from pages import OTHER, ROOT, check_command, commands, languages, run_python

import lightning_qk
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.parquet import HISTORY_NAME, write_history

PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts
)
# Those whose code has tests of its own (so has the tutorial), or is made by a command.
ELSEWHERE = {f"docs/{name}.md" for name in ("attention-health", "comparison", "coverage", "performance")}
TAUGHT = [page for page in PAGES if page not in ELSEWHERE]
LINKED = [*PAGES, "README.md", "CONTRIBUTING.md", "examples/paper/README.md"]


@pytest.mark.parametrize(
    "page", [page for page in TAUGHT if "python" in languages(page) and page != "docs/tutorial.md"]
)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if page == "docs/loggers.md":
        leave_a_history(tmp_path)
    namespace, printed = run_python(page)
    if "trainer" in namespace:
        assert namespace["trainer"].global_step > 0
    if page == "docs/how-to/add-to-my-job.md":
        assert "attn/entropy/mean" in namespace["seen"]
        assert list(tmp_path.rglob("lightning_qk_report.html"))
        assert "net.transformer.h.1.attn" in printed
    elif page == "docs/how-to/finetune-with-locater.md":
        assert namespace["locater"].form == "limit"
        assert "logits within bounds" in printed
        assert (tmp_path / "tuned" / "config.json").is_file()
        assert any(parameter.grad is not None for parameter in namespace["model"].parameters())
    elif page == "docs/how-to/read-a-checkpoint.md":
        assert namespace["variances"]["layer_00"].shape == (4,)
        assert "layer_02" in printed
    elif page == "docs/loggers.md":
        assert sorted(namespace["table"]["step"].unique()) == [0, 10]
        assert set(namespace["table"]["head"]) == {0, 1}


def leave_a_history(folder: Path) -> None:
    """What a run with a monitor leaves."""
    history = History(["layer_00", "layer_01"], [2, 2])
    for step in (0, 10):
        history.append(step, {"entropy": torch.rand(4), "sink_rate": torch.rand(4)})
    write_history(RunRecord(attention=history), folder / HISTORY_NAME)


@pytest.mark.parametrize("page", [page for page in TAUGHT if "bash" in languages(page)])
def test_commands_exist(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        check_command(command)


def test_a_command_that_does_not_exist_is_found() -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_command("lightning-qk inspect gpt2 --jsn x")
    with pytest.raises(AssertionError):
        check_command("make nothing")
    with pytest.raises(AssertionError):
        check_command("lightning-qk fit --config quickstart --model.lrr 1")


@pytest.mark.parametrize("page", TAUGHT)
def test_every_block_is_of_a_language_that_is_tested(page: str) -> None:
    assert languages(page) <= {"python", "bash", *OTHER}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert place.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def documented() -> str:
    """All pages of the reference."""
    return "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))


def test_the_reference_has_every_public_name() -> None:
    text = documented()
    named = set(re.findall(r":: lightning_qk\.(\w+)$", text, re.MULTILINE))
    assert set(lightning_qk.__all__) - {"__version__"} <= named
    assert ".. automodule:: lightning_qk.functional\n   :members:\n" in text
    assert all(name in text for name in importlib.import_module("lightning_qk.probes").__all__)


@pytest.mark.parametrize("package", ["metrics", "interventions", "guard", "regularizers"])
def test_the_reference_has_every_module(package: str) -> None:
    path = importlib.import_module(f"lightning_qk.{package}").__path__
    for module in pkgutil.iter_modules(path):
        if not module.name.startswith("_"):
            assert f".. automodule:: lightning_qk.{package}.{module.name}\n" in documented()


def test_the_reference_has_nothing_that_is_gone() -> None:
    for kind, name in re.findall(r"^\.\. auto(\w+):: (\S+)$", documented(), re.MULTILINE):
        found = pkgutil.resolve_name(name)
        assert callable(found) or kind == "module"
