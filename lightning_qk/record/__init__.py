"""What is kept of a run: histories, events, what statistics are called, verdicts.

May import functional, guard (its thresholds) and architecture.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.record.families import FAMILIES
    from lightning_qk.record.health import print_health
    from lightning_qk.record.history import History, LayerShape, RunRecord
    from lightning_qk.record.parquet import write_history
    from lightning_qk.record.snapshots import Snapshots
    from lightning_qk.record.statistics import STATISTICS, Statistic, describe
    from lightning_qk.record.verdicts import (
        VERDICTS,
        HeadHealth,
        LayerHealth,
        head_health,
        healthy_share,
        layer_health,
    )

__all__ = [
    "FAMILIES",
    "STATISTICS",
    "VERDICTS",
    "HeadHealth",
    "History",
    "LayerHealth",
    "LayerShape",
    "RunRecord",
    "Snapshots",
    "Statistic",
    "describe",
    "head_health",
    "healthy_share",
    "layer_health",
    "print_health",
    "write_history",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "families": ["FAMILIES"],
        "health": ["print_health"],
        "history": ["History", "LayerShape", "RunRecord"],
        "parquet": ["write_history"],
        "snapshots": ["Snapshots"],
        "statistics": ["STATISTICS", "Statistic", "describe"],
        "verdicts": ["VERDICTS", "HeadHealth", "LayerHealth", "head_health", "healthy_share", "layer_health"],
    },
)
