"""What is kept of a run: histories, events, what statistics are called, verdicts.

May import functional and architecture.
"""

from typing import TYPE_CHECKING

from lightning_qk._lazy import lazy

if TYPE_CHECKING:
    from lightning_qk.record.head_health import HeadHealth, head_health
    from lightning_qk.record.health import LayerHealth, layer_health, print_health
    from lightning_qk.record.history import History, LayerShape, RunRecord
    from lightning_qk.record.parquet import write_history
    from lightning_qk.record.snapshots import Snapshots
    from lightning_qk.record.statistics import Statistic, describe

__all__ = [
    "HeadHealth",
    "History",
    "LayerHealth",
    "LayerShape",
    "RunRecord",
    "Snapshots",
    "Statistic",
    "describe",
    "head_health",
    "layer_health",
    "print_health",
    "write_history",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "head_health": ["HeadHealth", "head_health"],
        "health": ["LayerHealth", "layer_health", "print_health"],
        "history": ["History", "LayerShape", "RunRecord"],
        "parquet": ["write_history"],
        "snapshots": ["Snapshots"],
        "statistics": ["Statistic", "describe"],
    },
)
