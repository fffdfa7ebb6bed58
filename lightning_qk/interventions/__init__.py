"""Changes of attention and its weights while a model trains, without Lightning.

May import functional, architecture, heads and capture.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.interventions.attention_mask import GatedAttention, OffsetGates, gated_attention
    from lightning_qk.interventions.penalties import AttentionPenalty, Penalty, entropy_band, prior_penalty
    from lightning_qk.interventions.qk_clip import clip_qk
    from lightning_qk.interventions.replaced_attention import (
        HardRetrieval,
        SoftCapped,
        soft_capped_attention,
    )
    from lightning_qk.interventions.sigma_reparam import (
        add_sigma_reparam,
        plain_state_dict,
        remove_sigma_reparam,
    )
    from lightning_qk.interventions.spectrum_scaling import SpectrumScaler
    from lightning_qk.interventions.update_cap import UpdateCapper, cap_updates

__all__ = [
    "AttentionPenalty",
    "GatedAttention",
    "HardRetrieval",
    "OffsetGates",
    "Penalty",
    "SoftCapped",
    "SpectrumScaler",
    "UpdateCapper",
    "add_sigma_reparam",
    "cap_updates",
    "clip_qk",
    "entropy_band",
    "gated_attention",
    "plain_state_dict",
    "prior_penalty",
    "remove_sigma_reparam",
    "soft_capped_attention",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "attention_mask": ["GatedAttention", "OffsetGates", "gated_attention"],
        "penalties": ["AttentionPenalty", "Penalty", "entropy_band", "prior_penalty"],
        "qk_clip": ["clip_qk"],
        "replaced_attention": ["HardRetrieval", "SoftCapped", "soft_capped_attention"],
        "sigma_reparam": ["add_sigma_reparam", "plain_state_dict", "remove_sigma_reparam"],
        "spectrum_scaling": ["SpectrumScaler"],
        "update_cap": ["UpdateCapper", "cap_updates"],
    },
)
