"""Detectors of a training that is about to collapse, on streams of numbers.

Imports torch alone.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.guard.detector import CollapseDetector, Verdict
    from lightning_qk.guard.reading import Place, Reading

__all__ = ["CollapseDetector", "Place", "Reading", "Verdict"]

__getattr__, __dir__ = lazy(
    __name__, {"detector": ["CollapseDetector", "Verdict"], "reading": ["Place", "Reading"]}
)
