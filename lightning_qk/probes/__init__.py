"""Experiments on a trained model: exchanged tokens, irrelevant tokens, explanations, reports of heads.

May import functional, heads, capture and record.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.probes.exchange import exchangeability
    from lightning_qk.probes.explanation import attention_as_explanation
    from lightning_qk.probes.head_classes import HeadThresholds
    from lightning_qk.probes.head_report import HeadReport, HeadRow
    from lightning_qk.probes.irrelevant import irrelevant_mass
    from lightning_qk.probes.parallel_context import ParallelContextEntropy, parallel_context_entropy

__all__ = [
    "HeadReport",
    "HeadRow",
    "HeadThresholds",
    "ParallelContextEntropy",
    "attention_as_explanation",
    "exchangeability",
    "irrelevant_mass",
    "parallel_context_entropy",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "exchange": ["exchangeability"],
        "explanation": ["attention_as_explanation"],
        "head_classes": ["HeadThresholds"],
        "head_report": ["HeadReport", "HeadRow"],
        "irrelevant": ["irrelevant_mass"],
        "parallel_context": ["ParallelContextEntropy", "parallel_context_entropy"],
    },
)
