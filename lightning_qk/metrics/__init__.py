"""Statistics pooled over calls, steps and ranks, as torchmetrics.

May import functional, heads and capture.
"""

from typing import TYPE_CHECKING

from lightning_qk._lazy import lazy

if TYPE_CHECKING:
    from lightning_qk.metrics.attention import AttentionStatistics
    from lightning_qk.metrics.hidden import HiddenStatistics
    from lightning_qk.metrics.means import HeadMeans
    from lightning_qk.metrics.singular import SingularValues
    from lightning_qk.metrics.spectrum import QKSpectrum

__all__ = [
    "AttentionStatistics",
    "HeadMeans",
    "HiddenStatistics",
    "QKSpectrum",
    "SingularValues",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "attention": ["AttentionStatistics"],
        "hidden": ["HiddenStatistics"],
        "means": ["HeadMeans"],
        "singular": ["SingularValues"],
        "spectrum": ["QKSpectrum"],
    },
)
