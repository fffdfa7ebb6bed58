"""Run tour.ipynb again, and keep what it shows as far as it is small: ``make tour``.

Outputs of cells tagged "large" (the report in its frame) are left out, and so are times of execution.
"""

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("tour.ipynb")


def execute(notebook: Any, folder: Path) -> Any:
    """Run all cells in ``folder``, where runs/ is made; an error in a cell is raised."""
    return NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def tidy(notebook: Any) -> Any:
    """Drop what is large, what depends on the machine, and text meant for no one (stderr)."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        if "large" in cell.metadata.get("tags", ()):
            cell.outputs = []
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    done = execute(nbformat.read(NOTEBOOK, as_version=4), NOTEBOOK.parent)
    nbformat.write(tidy(done), NOTEBOOK)
