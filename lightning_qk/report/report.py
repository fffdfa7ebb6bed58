"""One self-contained HTML page about a run, from its record.

The page draws its figures itself (``templates/report_chart.js``): step, statistic and head are chosen there. Data
travel within it, compressed, so that it needs no network and no other file. Without a script its tables remain.
"""

import hashlib
import time
from importlib.resources import files
from pathlib import Path

from lightning_qk.record.atomic_write import whole_file
from lightning_qk.record.history import RunRecord
from lightning_qk.record.verdicts import format_value, head_health
from lightning_qk.report.payload import make_payload
from lightning_qk.report.sections import page_content

MAX_BYTES = 2_950_000
"""Largest size of a page."""

_SCRIPTS = ("report_data", "report_chart", "report_plots", "report_live", "report")


def write_report(record: RunRecord, path: str | Path, *, live: bool = False) -> Path:
    """Write the report of a run: one HTML file that needs no network and no other file.

    The file appears whole or not at all. Parts that the record does not hold are named in a sentence, with what to
    add to see them. Long histories and large models are thinned until the file is below 3 MB.

    Args:
        record: the run.
        path: the file to write. Its folder is created.
        live: whether it will be written again: a page that is open looks for a newer version of its file and loads
            it, where it was.

    Returns:
        The path of the file.

    Raises:
        OSError: the file cannot be written there.
    """
    path = Path(path)
    page = render(record, time.time() if live else None)
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def render(record: RunRecord, written: float | None = None) -> str:
    """The text of the page, see :func:`write_report`.

    Args:
        record: the run.
        written: when, in seconds since 1970, where a newer one is to come; None where it is the last.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_value, "brief": _brief, "capital": _capital}
    template = environment.from_string(_asset("report.html.j2"))
    heads = head_health(record)
    content = {**page_content(record, heads), "css": _asset("report.css"), "notes": record.notes}
    content["written"] = None if written is None else round(written)
    draws = any(history.steps for history in record.histories.values()) or bool(record.eigenvalues)
    if not (draws or content["scalars"]):
        return _with_version(template.render(**content, payload="", script=""))
    content["script"] = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    # The page without its data first, to know how much room there is.
    bare = template.render(**content, payload="-")
    payload = make_payload(record, heads, MAX_BYTES - len(bare.encode()) - 1000)
    content["notes"] = [*record.notes, *payload.notes]
    return _with_version(template.render(**content, payload=payload.text))


_NO_VERSION = 'data-version=""'


def _with_version(page: str) -> str:
    """Pages that differ have different versions; the same record makes the same page."""
    version = hashlib.sha256(page.encode()).hexdigest()[:16]
    # The first is that of the page itself, which nothing of a record comes before.
    return page.replace(_NO_VERSION, f'data-version="{version}"', 1)


def _brief(text: str, limit: int = 60) -> str:
    """Text of so many characters, as of a long path: what it ends with says most."""
    if len(text) <= limit:
        return text
    end = (limit - 1) * 2 // 3
    return f"{text[: limit - 1 - end]}…{text[-end:]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _asset(name: str) -> str:
    return files("lightning_qk.report").joinpath("templates", name).read_text(encoding="utf-8")
