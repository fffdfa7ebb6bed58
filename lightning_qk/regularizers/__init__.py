"""Penalties of the eigenspectra of W_QK, and their gradients.

May import functional and heads.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.regularizers.locater import locater_penalty

__all__ = ["locater_penalty"]

__getattr__, __dir__ = lazy(__name__, {"locater": ["locater_penalty"]})
