"""One self-contained HTML page about a run, from its record.

The page draws its figures itself (``templates/report_chart.js``): step, statistic and head are chosen there. Data
travel within it, compressed, so that it needs no network and no other file. Without a script its tables remain.
"""

from importlib.resources import files
from pathlib import Path

from lightning_qk.record.atomic_write import whole_file
from lightning_qk.record.history import RunRecord
from lightning_qk.record.verdicts import format_value, head_health
from lightning_qk.report.payload import make_payload
from lightning_qk.report.sections import page_content

MAX_BYTES = 2_950_000
"""Largest size of a page."""

_SCRIPTS = ("report_data", "report_chart", "report_plots", "report")


def write_report(record: RunRecord, path: str | Path) -> Path:
    """Write the report of a run: one HTML file that needs no network and no other file.

    The file appears whole or not at all. Parts that the record does not hold are named in a sentence, with what to
    add to see them. Long histories and large models are thinned until the file is below 3 MB.

    Args:
        record: the run.
        path: the file to write. Its folder is created.

    Returns:
        The path of the file.

    Raises:
        OSError: the file cannot be written there.
    """
    path = Path(path)
    page = _render(record)
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _render(record: RunRecord) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = format_value
    template = environment.from_string(_asset("report.html.j2"))
    heads = head_health(record)
    content = {**page_content(record, heads), "css": _asset("report.css")}
    draws = any(history.steps for history in record.histories.values()) or bool(record.eigenvalues)
    draws = draws or bool(content["scalars"])
    if not draws:
        return template.render(**content, payload="", script="", notes=record.notes)
    script = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    # The page without its data first, to know how much room there is.
    bare = template.render(**content, payload="-", script=script, notes=record.notes)
    payload = make_payload(record, heads, MAX_BYTES - len(bare.encode()) - 1000)
    return template.render(
        **content, payload=payload.text, script=script, notes=[*record.notes, *payload.notes]
    )


def _asset(name: str) -> str:
    return files("lightning_qk.report").joinpath("templates", name).read_text(encoding="utf-8")
