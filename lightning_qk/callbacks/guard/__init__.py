"""The callback that warns of a collapse and acts on it."""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.callbacks.guard.guard import CollapseGuard

__all__ = [
    "CollapseGuard",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "guard": ["CollapseGuard"],
    },
)
