"""Callbacks that watch and change nothing."""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.callbacks.monitors._base import Monitor
    from lightning_qk.callbacks.monitors._captured import CaptureMonitor
    from lightning_qk.callbacks.monitors.attention import AttentionMonitor
    from lightning_qk.callbacks.monitors.hidden import HiddenStateMonitor
    from lightning_qk.callbacks.monitors.position import PositionMonitor
    from lightning_qk.callbacks.monitors.probes import AttentionProbes
    from lightning_qk.callbacks.monitors.sinks import SinkMonitor
    from lightning_qk.callbacks.monitors.spectrum import QKSpectrumMonitor
    from lightning_qk.callbacks.monitors.tokens import TokenMonitor

__all__ = [
    "AttentionMonitor",
    "AttentionProbes",
    "CaptureMonitor",
    "HiddenStateMonitor",
    "Monitor",
    "PositionMonitor",
    "QKSpectrumMonitor",
    "SinkMonitor",
    "TokenMonitor",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "_base": ["Monitor"],
        "_captured": ["CaptureMonitor"],
        "attention": ["AttentionMonitor"],
        "hidden": ["HiddenStateMonitor"],
        "position": ["PositionMonitor"],
        "probes": ["AttentionProbes"],
        "sinks": ["SinkMonitor"],
        "spectrum": ["QKSpectrumMonitor"],
        "tokens": ["TokenMonitor"],
    },
)
