"""The notebook runs top to bottom, and what the repository keeps of it is small."""

from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOK = FOLDER / "tour.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def kinds(notebook) -> list[str]:
    return [kind for output in outputs(notebook) for kind in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    from refresh_tour import execute, tidy

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = "steps = 6"

    done = execute(notebook, tmp_path)

    assert kinds(done).count("image/png") == 3
    shown = "\n".join(output["data"].get("text/html", "") for output in outputs(done) if "data" in output)
    assert "16 heads" in shown or "16 heads" in str(outputs(done))
    assert "<iframe srcdoc=" in shown
    assert "GPT2LMHeadModel" in shown  # the report's own page
    assert "iframe" not in str(outputs(tidy(done)))


def test_what_is_kept_is_small_and_of_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 600_000
    for place in ("/root/", "/home/", "/tmp/", "/work/"):
        assert place not in text
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert kinds(notebook).count("image/png") == 3
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert "iframe" not in str(outputs(notebook))
