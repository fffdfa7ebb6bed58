"""Watch, diagnose and steer what attention does while a transformer trains.

Public names are resolved on first use (PEP 562), so that ``import lightning_qk.functional`` costs no more
than ``import torch``.
"""

from typing import TYPE_CHECKING, Any

from lightning_qk._version import __version__

if TYPE_CHECKING:
    from lightning_qk.callbacks.attention import AttentionMonitor
    from lightning_qk.callbacks.attention_mask import DifferentiableAttentionMask
    from lightning_qk.callbacks.attention_prior import AttentionPrior
    from lightning_qk.callbacks.entropy_band import EntropyBand
    from lightning_qk.callbacks.guard import CollapseGuard
    from lightning_qk.callbacks.hard_attention import HardAttention
    from lightning_qk.callbacks.hidden import HiddenStateMonitor
    from lightning_qk.callbacks.locater import LocAteR
    from lightning_qk.callbacks.position import PositionMonitor
    from lightning_qk.callbacks.probes import AttentionProbes
    from lightning_qk.callbacks.qk_clip import QKClip
    from lightning_qk.callbacks.sigma_reparam import SigmaReparam
    from lightning_qk.callbacks.sinks import SinkMonitor
    from lightning_qk.callbacks.soft_cap import SoftCap
    from lightning_qk.callbacks.spectrum import QKSpectrumMonitor
    from lightning_qk.callbacks.spectrum_scaling import SpectrumScaling
    from lightning_qk.callbacks.update_cap import UpdateCap
    from lightning_qk.data.text import TextDataModule
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
    from lightning_qk.verification.model import verify

_HOME = {
    "AttentionMonitor": "lightning_qk.callbacks.attention",
    "AttentionPrior": "lightning_qk.callbacks.attention_prior",
    "AttentionProbes": "lightning_qk.callbacks.probes",
    "CollapseGuard": "lightning_qk.callbacks.guard",
    "DifferentiableAttentionMask": "lightning_qk.callbacks.attention_mask",
    "EntropyBand": "lightning_qk.callbacks.entropy_band",
    "HardAttention": "lightning_qk.callbacks.hard_attention",
    "HeadProjections": "lightning_qk.heads.projections",
    "HeadReport": "lightning_qk.probes.head_report",
    "HiddenStateMonitor": "lightning_qk.callbacks.hidden",
    "LocAteR": "lightning_qk.callbacks.locater",
    "PositionMonitor": "lightning_qk.callbacks.position",
    "QKClip": "lightning_qk.callbacks.qk_clip",
    "QKSpectrumMonitor": "lightning_qk.callbacks.spectrum",
    "SigmaReparam": "lightning_qk.callbacks.sigma_reparam",
    "SinkMonitor": "lightning_qk.callbacks.sinks",
    "SoftCap": "lightning_qk.callbacks.soft_cap",
    "SpectrumScaling": "lightning_qk.callbacks.spectrum_scaling",
    "TextDataModule": "lightning_qk.data.text",
    "TransformerModule": "lightning_qk.module",
    "UpdateCap": "lightning_qk.callbacks.update_cap",
    "add_sigma_reparam": "lightning_qk.interventions.sigma_reparam",
    "cap_updates": "lightning_qk.interventions.update_cap",
    "clip_qk": "lightning_qk.interventions.qk_clip",
    "head_projections": "lightning_qk.heads.reader",
    "locater_penalty": "lightning_qk.regularizers.locater",
    "plain_state_dict": "lightning_qk.interventions.sigma_reparam",
    "remove_sigma_reparam": "lightning_qk.interventions.sigma_reparam",
    "spectrum_scaling": "lightning_qk.interventions.spectrum_scaling",
    "verify": "lightning_qk.verification.model",
}

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
    "TransformerModule",
    "UpdateCap",
    "__version__",
    "add_sigma_reparam",
    "cap_updates",
    "clip_qk",
    "head_projections",
    "locater_penalty",
    "plain_state_dict",
    "remove_sigma_reparam",
    "spectrum_scaling",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
