"""Statistics pooled over calls, steps and ranks: torchmetrics, and the collector of attention calls.

May import functional, heads and capture.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.metrics.attention import AttentionStatistics
    from lightning_qk.metrics.collector import AttentionCollector, LayerFacts, Maxima, SumAccumulator
    from lightning_qk.metrics.hidden import HiddenStatistics
    from lightning_qk.metrics.means import HeadMeans
    from lightning_qk.metrics.singular import SingularValues
    from lightning_qk.metrics.spectrum import QKSpectrum
    from lightning_qk.metrics.tokens import TokenStatistics

__all__ = [
    "AttentionCollector",
    "AttentionStatistics",
    "HeadMeans",
    "HiddenStatistics",
    "LayerFacts",
    "Maxima",
    "QKSpectrum",
    "SingularValues",
    "SumAccumulator",
    "TokenStatistics",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "attention": ["AttentionStatistics"],
        "collector": ["AttentionCollector", "LayerFacts", "Maxima", "SumAccumulator"],
        "hidden": ["HiddenStatistics"],
        "means": ["HeadMeans"],
        "singular": ["SingularValues"],
        "spectrum": ["QKSpectrum"],
        "tokens": ["TokenStatistics"],
    },
)
