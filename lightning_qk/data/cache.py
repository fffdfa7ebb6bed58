"""Folders of prepared data, kept on disk under a key of everything that they depend on."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def kept(root: Path, key: Any, make: Callable[[Path], None]) -> Path:
    """The folder of a key, made if it is not there.

    Args:
        root: where all such folders are.
        key: plain values.
        make: fills a folder; what it writes last is ``info.json``.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    entry = root / digest
    if not (entry / "info.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        build = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=root))
        try:
            with _no_progress_bars():
                make(build)
            _put(build, entry)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return entry


def _put(build: Path, entry: Path) -> None:
    """Move the finished data into place, unless another process was faster: its data are the same."""
    try:
        build.replace(entry)
    except OSError:
        if not (entry / "info.json").is_file():
            raise


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the bars of ``datasets``: five a split, most of them gone in an instant."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
