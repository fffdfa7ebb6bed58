"""Attention calls of any model, captured without changing what it computes, or intercepted to change it.

May import functional, architecture and heads.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
    from lightning_qk.capture.capture import AttentionCapture
    from lightning_qk.capture.captured import CapturedCall
    from lightning_qk.capture.hidden import HiddenCapture
    from lightning_qk.capture.intercept import AttentionInterceptor

__all__ = [
    "AttentionCall",
    "AttentionCapture",
    "AttentionInterceptor",
    "CapturedCall",
    "HiddenCapture",
    "UnsupportedCallError",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "call": ["AttentionCall", "UnsupportedCallError"],
        "capture": ["AttentionCapture"],
        "captured": ["CapturedCall"],
        "hidden": ["HiddenCapture"],
        "intercept": ["AttentionInterceptor"],
    },
)
