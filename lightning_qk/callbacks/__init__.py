"""The only rooms that know Lightning's hooks: monitors, interventions, guard.

May import everything but inspect, module, data and cli.
"""

from typing import TYPE_CHECKING

from lightning_qk._lazy import lazy

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

__all__ = [
    "AttentionMonitor",
    "AttentionPrior",
    "AttentionProbes",
    "CollapseGuard",
    "DifferentiableAttentionMask",
    "EntropyBand",
    "HardAttention",
    "HiddenStateMonitor",
    "LocAteR",
    "PositionMonitor",
    "QKClip",
    "QKSpectrumMonitor",
    "SigmaReparam",
    "SinkMonitor",
    "SoftCap",
    "SpectrumScaling",
    "TokenMonitor",
    "UpdateCap",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "guard.guard": ["CollapseGuard"],
        "interventions.attention_mask": ["DifferentiableAttentionMask"],
        "interventions.attention_prior": ["AttentionPrior"],
        "interventions.entropy_band": ["EntropyBand"],
        "interventions.hard_attention": ["HardAttention"],
        "interventions.locater": ["LocAteR"],
        "interventions.qk_clip": ["QKClip"],
        "interventions.sigma_reparam": ["SigmaReparam"],
        "interventions.soft_cap": ["SoftCap"],
        "interventions.spectrum_scaling": ["SpectrumScaling"],
        "interventions.update_cap": ["UpdateCap"],
        "monitors.attention": ["AttentionMonitor"],
        "monitors.hidden": ["HiddenStateMonitor"],
        "monitors.position": ["PositionMonitor"],
        "monitors.probes": ["AttentionProbes"],
        "monitors.sinks": ["SinkMonitor"],
        "monitors.spectrum": ["QKSpectrumMonitor"],
        "monitors.tokens": ["TokenMonitor"],
    },
)
