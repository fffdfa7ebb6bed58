"""Questions to a network that cost forward passes of their own, and what each head is.

Plain functions of a model and a batch, the model's keyword arguments; they run it in evaluation mode without
gradients and leave it, and every random generator, as it was.
"""

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
