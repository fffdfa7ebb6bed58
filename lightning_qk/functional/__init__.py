"""Pure tensor functions: spectra of heads, signal propagation, statistics of attention. Imports torch alone."""

from lightning_qk.functional.attention import attention_on_keys, attention_statistics, logit_statistics
from lightning_qk.functional.entropy import (
    attention_entropy,
    diagonal_prior,
    prior_divergence,
    uniform_prior,
    window_prior,
)
from lightning_qk.functional.hard_attention import hard_attention
from lightning_qk.functional.hidden import hidden_statistics
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions
from lightning_qk.functional.max_logits import max_logits
from lightning_qk.functional.position import positional_share
from lightning_qk.functional.propagation import (
    exact_signal_propagation_probability,
    linear_share_profile,
    signal_propagation_probability,
)
from lightning_qk.functional.ranks import kendall_tau
from lightning_qk.functional.rotary import Rotary
from lightning_qk.functional.singular import (
    effective_rank,
    energy_concentration,
    entropy_floor,
    stable_rank,
    update_ratio,
)
from lightning_qk.functional.sinks import sink_statistics
from lightning_qk.functional.spectrum import (
    circle_law_radius,
    circle_law_share,
    qk_eigenvalues,
    qk_moments,
    qk_singular_values,
)
from lightning_qk.functional.token_moments import TokenMoments
from lightning_qk.functional.updates import update_spectra

__all__ = [
    "AttentionLogits",
    "AttentionOptions",
    "Rotary",
    "TokenMoments",
    "attention_entropy",
    "attention_on_keys",
    "attention_statistics",
    "circle_law_radius",
    "circle_law_share",
    "diagonal_prior",
    "effective_rank",
    "energy_concentration",
    "entropy_floor",
    "exact_signal_propagation_probability",
    "hard_attention",
    "hidden_statistics",
    "kendall_tau",
    "linear_share_profile",
    "logit_statistics",
    "max_logits",
    "positional_share",
    "prior_divergence",
    "qk_eigenvalues",
    "qk_moments",
    "qk_singular_values",
    "signal_propagation_probability",
    "sink_statistics",
    "stable_rank",
    "uniform_prior",
    "update_ratio",
    "update_spectra",
    "window_prior",
]
