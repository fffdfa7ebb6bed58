"""Query and key weights of any model, per head: found, read, verified by runs, edited.

May import functional and architecture.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.heads.projections import HeadProjections, UnreadLayer
    from lightning_qk.heads.reader import (
        ProjectionReader,
        find_attention,
        head_projections,
        kept_reader,
        unread,
    )

__all__ = [
    "HeadProjections",
    "ProjectionReader",
    "UnreadLayer",
    "find_attention",
    "head_projections",
    "kept_reader",
    "unread",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "projections": ["HeadProjections", "UnreadLayer"],
        "reader": ["ProjectionReader", "find_attention", "head_projections", "kept_reader", "unread"],
    },
)
