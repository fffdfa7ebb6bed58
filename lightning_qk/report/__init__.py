"""One page from a record, and its figures.

May import functional, architecture and record.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.report.figures import heatmap, to_png
    from lightning_qk.report.report import write_report

__all__ = ["heatmap", "to_png", "write_report"]

__getattr__, __dir__ = lazy(__name__, {"figures": ["heatmap", "to_png"], "report": ["write_report"]})
