"""Callbacks that change attention, its weights or the gradient."""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.callbacks.interventions.attention_mask import DifferentiableAttentionMask
    from lightning_qk.callbacks.interventions.attention_prior import AttentionPrior
    from lightning_qk.callbacks.interventions.entropy_band import EntropyBand
    from lightning_qk.callbacks.interventions.hard_attention import HardAttention
    from lightning_qk.callbacks.interventions.locater import LocAteR
    from lightning_qk.callbacks.interventions.qk_clip import QKClip
    from lightning_qk.callbacks.interventions.sigma_reparam import SigmaReparam
    from lightning_qk.callbacks.interventions.soft_cap import SoftCap
    from lightning_qk.callbacks.interventions.spectrum_scaling import SpectrumScaling
    from lightning_qk.callbacks.interventions.update_cap import UpdateCap

__all__ = [
    "AttentionPrior",
    "DifferentiableAttentionMask",
    "EntropyBand",
    "HardAttention",
    "LocAteR",
    "QKClip",
    "SigmaReparam",
    "SoftCap",
    "SpectrumScaling",
    "UpdateCap",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "attention_mask": ["DifferentiableAttentionMask"],
        "attention_prior": ["AttentionPrior"],
        "entropy_band": ["EntropyBand"],
        "hard_attention": ["HardAttention"],
        "locater": ["LocAteR"],
        "qk_clip": ["QKClip"],
        "sigma_reparam": ["SigmaReparam"],
        "soft_cap": ["SoftCap"],
        "spectrum_scaling": ["SpectrumScaling"],
        "update_cap": ["UpdateCap"],
    },
)
