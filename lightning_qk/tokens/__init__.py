"""Moments of a model's queries, keys and layer inputs, and the attention that they predict.

May import functional, architecture, heads and capture.
"""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.functional.token_moments import TokenMoments
    from lightning_qk.tokens.closed_form import predict_closed_form
    from lightning_qk.tokens.collect import TokenMomentsWarning, token_moments
    from lightning_qk.tokens.layer_inputs import LayerInputs
    from lightning_qk.tokens.predict import predict_attention, predict_logit_std

__all__ = [
    "LayerInputs",
    "TokenMoments",
    "TokenMomentsWarning",
    "predict_attention",
    "predict_closed_form",
    "predict_logit_std",
    "token_moments",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "closed_form": ["predict_closed_form"],
        "collect": ["TokenMoments", "TokenMomentsWarning", "token_moments"],
        "layer_inputs": ["LayerInputs"],
        "predict": ["predict_attention", "predict_logit_std"],
    },
)
