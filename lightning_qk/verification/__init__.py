"""Is what is read of a model what its forward computes?

May import functional, architecture, heads and capture.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.verification.check import SelfCheck, Status, Verified, summary
    from lightning_qk.verification.inputs import InputMaker, first_that_runs, is_states
    from lightning_qk.verification.model import verify
    from lightning_qk.verification.statistics import CapturedCalls, layer_of, verify_statistics
    from lightning_qk.verification.trace import MOVES, SCALINGS, Event, Node, Product, Trace

__all__ = [
    "MOVES",
    "SCALINGS",
    "CapturedCalls",
    "Event",
    "InputMaker",
    "Node",
    "Product",
    "SelfCheck",
    "Status",
    "Trace",
    "Verified",
    "first_that_runs",
    "is_states",
    "layer_of",
    "summary",
    "verify",
    "verify_statistics",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "check": ["SelfCheck", "Status", "Verified", "summary"],
        "inputs": ["InputMaker", "first_that_runs", "is_states"],
        "model": ["verify"],
        "statistics": ["CapturedCalls", "layer_of", "verify_statistics"],
        "trace": ["Event", "MOVES", "Node", "Product", "SCALINGS", "Trace"],
    },
)
