"""Is what is read of a model what its forward computes?

May import functional, architecture, heads and capture.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.verification.check import SelfCheck, Status, Verified, summary
    from lightning_qk.verification.model import verify

__all__ = ["SelfCheck", "Status", "Verified", "summary", "verify"]

__getattr__, __dir__ = lazy(
    __name__, {"check": ["SelfCheck", "Status", "Verified", "summary"], "model": ["verify"]}
)
