"""``lightning-qk inspect``: checkpoints on disk, read without running the job that wrote them.

May import everything but callbacks and cli.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.inspect.configuration import Options
    from lightning_qk.inspect.documents import BadInput
    from lightning_qk.inspect.export import check_targets, write_text
    from lightning_qk.inspect.healthy import Reference, reference, reference_names
    from lightning_qk.inspect.read import read_checkpoint
    from lightning_qk.inspect.sources import open_source

__all__ = [
    "BadInput",
    "Options",
    "Reference",
    "check_targets",
    "open_source",
    "read_checkpoint",
    "reference",
    "reference_names",
    "write_text",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "configuration": ["Options"],
        "documents": ["BadInput"],
        "export": ["check_targets", "write_text"],
        "read": ["read_checkpoint"],
        "healthy": ["Reference", "reference", "reference_names"],
        "sources": ["open_source"],
    },
)
