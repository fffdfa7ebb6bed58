"""Attention calls of any model, captured without changing what it computes.

May import functional, architecture and heads.
"""

from typing import TYPE_CHECKING

from lightning_qk._lazy import lazy

if TYPE_CHECKING:
    from lightning_qk.capture.captured import CapturedCall
    from lightning_qk.capture.interface import AttentionCapture
    from lightning_qk.capture.record import UnsupportedCallError

__all__ = [
    "AttentionCapture",
    "CapturedCall",
    "UnsupportedCallError",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "captured": ["CapturedCall"],
        "interface": ["AttentionCapture"],
        "record": ["UnsupportedCallError"],
    },
)
