"""Is what was read of a model's weights what its attention computes with? Imports heads/ and capture/ alone."""

from lightning_qk.verification.check import SelfCheck, Status, Verified, summary
from lightning_qk.verification.model import verify

__all__ = ["SelfCheck", "Status", "Verified", "summary", "verify"]
