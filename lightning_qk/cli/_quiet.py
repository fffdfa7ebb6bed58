"""Silences log lines and warnings of libraries that a user of the command cannot act on."""

import logging
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Beginnings of what Lightning logs: advertisements, and what it does by itself.
_LINES = (
    "💡 Tip:",
    "TPU available: False",
    "HPU available: False",
    "Loading `train_dataloader` to estimate",
    "Trainer already configured with model summary callbacks",
)
# Of warnings: a call inside Lightning, and advice about workers, of which a job's config decides.
_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '\w+_dataloader' does not have many workers",
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",  # each run has a folder of its own
)
# Whichever of the two packages is imported last takes the messages of both.
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning", "lightning_fabric")


class _StandardError:
    """``sys.stderr`` as it is when something is written, such as rich's that keeps lines apart from a bar."""

    def write(self, text: str) -> int:
        return sys.stderr.write(in_lines(text))

    def flush(self) -> None:
        sys.stderr.flush()


def in_lines(text: str) -> str:
    """Text whose lines end between words where a terminal would break them anywhere."""
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = text.split("\n")
    wrapped = (textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)
    return "\n".join(one if len(line) > width else line for line, one in zip(lines, wrapped, strict=True))


def _without_place(message: Any, category: Any, *place: Any, **options: Any) -> str:
    """A warning without the place in a library that raised it."""
    return in_lines(f"{message}\n")


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LINES)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence these lines inside of the block, and write others of Lightning's above its progress bar."""
    handlers = [
        handler
        for name in _LOGGERS
        for handler in logging.getLogger(name).handlers
        if type(handler) is logging.StreamHandler
    ]
    streams = [handler.stream for handler in handlers]
    for handler in handlers:
        handler.addFilter(_is_of_use)
        handler.stream = _StandardError()  # setStream flushes the old one, which may be closed
    as_before, warnings.formatwarning = warnings.formatwarning, _without_place
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        warnings.formatwarning = as_before
        for handler, stream in zip(handlers, streams, strict=True):
            handler.removeFilter(_is_of_use)
            handler.stream = stream


def prepare_loggers(loggers: Iterable[Any]) -> None:
    """Have W&B's logger begin without warnings of an argument that nobody gave and of a folder that is not there.

    Args:
        loggers: of a trainer, before its run.
    """
    for logger in loggers:
        options = getattr(logger, "_wandb_init", None)
        if isinstance(options, dict):
            if options.get("anonymous") is None:
                options.pop("anonymous", None)
            if options.get("dir"):
                Path(options["dir"]).mkdir(parents=True, exist_ok=True)
