"""What code tells of a model: functions that a class calls, its library, products that a run takes, labels.

Imports torch alone.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.architecture.labels import layer_labels
    from lightning_qk.architecture.source_code import calls_sdpa, calls_softmax, is_known, uses_interface

__all__ = [
    "calls_sdpa",
    "calls_softmax",
    "is_known",
    "layer_labels",
    "uses_interface",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "labels": ["layer_labels"],
        "source_code": ["calls_sdpa", "calls_softmax", "is_known", "uses_interface"],
    },
)
