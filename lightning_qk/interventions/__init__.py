"""Changes of attention and its weights while a model trains, without Lightning.

May import functional, architecture, heads and capture.
"""

from typing import TYPE_CHECKING

from lightning_qk._lazy import lazy

if TYPE_CHECKING:
    from lightning_qk.interventions.qk_clip import clip_qk
    from lightning_qk.interventions.sigma_reparam import (
        add_sigma_reparam,
        plain_state_dict,
        remove_sigma_reparam,
    )
    from lightning_qk.interventions.update_cap import cap_updates

__all__ = ["add_sigma_reparam", "cap_updates", "clip_qk", "plain_state_dict", "remove_sigma_reparam"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "qk_clip": ["clip_qk"],
        "sigma_reparam": ["add_sigma_reparam", "plain_state_dict", "remove_sigma_reparam"],
        "update_cap": ["cap_updates"],
    },
)
