"""Watch, diagnose and steer what attention does while a transformer trains.

Public names are resolved on first use (PEP 562), so that ``import lightning_qk.functional`` costs no more
than ``import torch``.
"""

from typing import TYPE_CHECKING

from lightning_qk._moved import install
from lightning_qk._packages import lazy
from lightning_qk._version import __version__

if TYPE_CHECKING:
    from lightning_qk.callbacks.guard.guard import CollapseGuard
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
    from lightning_qk.callbacks.monitors.attention import AttentionMonitor
    from lightning_qk.callbacks.monitors.hidden import HiddenStateMonitor
    from lightning_qk.callbacks.monitors.position import PositionMonitor
    from lightning_qk.callbacks.monitors.probes import AttentionProbes
    from lightning_qk.callbacks.monitors.sinks import SinkMonitor
    from lightning_qk.callbacks.monitors.spectrum import QKSpectrumMonitor
    from lightning_qk.callbacks.monitors.tokens import TokenMonitor
    from lightning_qk.data.text import TextDataModule
    from lightning_qk.functional.token_moments import TokenMoments
    from lightning_qk.heads.projections import HeadProjections
    from lightning_qk.heads.reader import head_projections
    from lightning_qk.interventions.qk_clip import clip_qk
    from lightning_qk.interventions.sigma_reparam import (
        add_sigma_reparam,
        plain_state_dict,
        remove_sigma_reparam,
    )
    from lightning_qk.interventions.spectrum_scaling import spectrum_scaling
    from lightning_qk.interventions.update_cap import cap_updates
    from lightning_qk.module import TransformerModule
    from lightning_qk.probes.head_report import HeadReport
    from lightning_qk.regularizers.locater import locater_penalty
    from lightning_qk.tokens.collect import token_moments
    from lightning_qk.tokens.predict import predict_attention
    from lightning_qk.verification.model import verify

__all__ = [
    "AttentionMonitor",
    "AttentionPrior",
    "AttentionProbes",
    "CollapseGuard",
    "DifferentiableAttentionMask",
    "EntropyBand",
    "HardAttention",
    "HeadProjections",
    "HeadReport",
    "HiddenStateMonitor",
    "LocAteR",
    "PositionMonitor",
    "QKClip",
    "QKSpectrumMonitor",
    "SigmaReparam",
    "SinkMonitor",
    "SoftCap",
    "SpectrumScaling",
    "TextDataModule",
    "TokenMoments",
    "TokenMonitor",
    "TransformerModule",
    "UpdateCap",
    "__version__",
    "add_sigma_reparam",
    "cap_updates",
    "clip_qk",
    "head_projections",
    "locater_penalty",
    "plain_state_dict",
    "predict_attention",
    "remove_sigma_reparam",
    "spectrum_scaling",
    "token_moments",
    "verify",
]


__getattr__, __dir__ = lazy(
    __name__,
    {
        "callbacks.guard.guard": ["CollapseGuard"],
        "callbacks.interventions.attention_mask": ["DifferentiableAttentionMask"],
        "callbacks.interventions.attention_prior": ["AttentionPrior"],
        "callbacks.interventions.entropy_band": ["EntropyBand"],
        "callbacks.interventions.hard_attention": ["HardAttention"],
        "callbacks.interventions.locater": ["LocAteR"],
        "callbacks.interventions.qk_clip": ["QKClip"],
        "callbacks.interventions.sigma_reparam": ["SigmaReparam"],
        "callbacks.interventions.soft_cap": ["SoftCap"],
        "callbacks.interventions.spectrum_scaling": ["SpectrumScaling"],
        "callbacks.interventions.update_cap": ["UpdateCap"],
        "callbacks.monitors.attention": ["AttentionMonitor"],
        "callbacks.monitors.hidden": ["HiddenStateMonitor"],
        "callbacks.monitors.position": ["PositionMonitor"],
        "callbacks.monitors.probes": ["AttentionProbes"],
        "callbacks.monitors.sinks": ["SinkMonitor"],
        "callbacks.monitors.spectrum": ["QKSpectrumMonitor"],
        "callbacks.monitors.tokens": ["TokenMonitor"],
        "data.text": ["TextDataModule"],
        "functional.token_moments": ["TokenMoments"],
        "heads.projections": ["HeadProjections"],
        "heads.reader": ["head_projections"],
        "interventions.qk_clip": ["clip_qk"],
        "interventions.sigma_reparam": ["add_sigma_reparam", "plain_state_dict", "remove_sigma_reparam"],
        "interventions.spectrum_scaling": ["spectrum_scaling"],
        "interventions.update_cap": ["cap_updates"],
        "module": ["TransformerModule"],
        "probes.head_report": ["HeadReport"],
        "regularizers.locater": ["locater_penalty"],
        "tokens.collect": ["token_moments"],
        "tokens.predict": ["predict_attention"],
        "verification.model": ["verify"],
    },
)

install()
