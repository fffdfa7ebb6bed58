"""The only package that knows a logger.

May import record and report.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.loggers.loggers import log_scalars
    from lightning_qk.loggers.trackio import TrackioLogger

__all__ = ["TrackioLogger", "log_scalars"]

__getattr__, __dir__ = lazy(__name__, {"loggers": ["log_scalars"], "trackio": ["TrackioLogger"]})
