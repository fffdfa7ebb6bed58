"""The newest page of a folder of runs, which may be written at that moment: what ``lightning-qk watch`` serves."""

import html
import os
from pathlib import Path

PAGE_NAME, RECORD_NAME = "lightning_qk_report.html", "lightning_qk_record.safetensors"
_WAITING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="3">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark; }} body {{ font: 16px/1.5 system-ui, sans-serif; margin: 3em; }}</style>
<title>Attention report: waiting</title></head>
<body><h1>Nothing is written yet</h1><p>{}</p></body></html>
"""


class Follower:
    """The page of a run, or of the newest of several runs below a folder.

    Args:
        place: a run's folder, a folder of runs, a record or a page.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._made: tuple[Path, int, bytes] | None = None

    def newest(self) -> Path | None:
        """The newest page or record; a page that is as new as its record is the one."""
        if self.place.is_file():
            return self.place
        found = [
            (path.stat().st_mtime_ns, path.name == PAGE_NAME, path)
            for folder, _, names in os.walk(self.place)
            for path in (Path(folder) / name for name in names if name in (PAGE_NAME, RECORD_NAME))
            if path.exists()
        ]
        if not found:
            return None
        path = max(found)[2]
        beside = path.with_name(PAGE_NAME)
        # A record is written just before its page, at the end with a table between them.
        is_near = beside.is_file() and path.stat().st_mtime_ns - beside.stat().st_mtime_ns < _NEAR
        return beside if is_near else path

    def page(self) -> bytes:
        """The page's text: read from the disk, or rendered from the record. It names anything that fails."""
        from lightning_qk.record.history import RunRecord
        from lightning_qk.report.report import render

        path = self.newest()
        if path is None:
            return _say(
                f"No page and no record lies in {self.place}: a monitor writes them after its first measurement. "
                "This page looks again every three seconds."
            )
        try:
            if path.suffix != ".safetensors":
                return path.read_bytes()
            stamp = path.stat().st_mtime_ns
            if self._made is None or self._made[:2] != (path, stamp):
                # Whether it goes on is not known: the page looks for a newer one as long as it is open.
                self._made = path, stamp, render(RunRecord.load(path), stamp / 1e9).encode()
            return self._made[2]
        except (OSError, ValueError) as error:
            return _say(f"{error}. This page looks again every three seconds.")


_NEAR = 120 * 10**9
"""Nanoseconds."""


def _say(sentence: str) -> bytes:
    return _WAITING.format(html.escape(sentence)).encode()
