"""Pure tensor functions: spectra of heads, signal propagation, statistics of attention. Imports torch alone."""

from lightning_qk.functional.extremes import max_logits
from lightning_qk.functional.localization import attention_statistics, logit_statistics
from lightning_qk.functional.position import positional_share
from lightning_qk.functional.propagation import (
    exact_signal_propagation_probability,
    signal_propagation_probability,
)
from lightning_qk.functional.rotary import Rotary
from lightning_qk.functional.spectrum import qk_eigenvalues, qk_moments, qk_singular_values

__all__ = [
    "Rotary",
    "attention_statistics",
    "exact_signal_propagation_probability",
    "logit_statistics",
    "max_logits",
    "positional_share",
    "qk_eigenvalues",
    "qk_moments",
    "qk_singular_values",
    "signal_propagation_probability",
]
