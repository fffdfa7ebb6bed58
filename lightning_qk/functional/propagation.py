"""Signal propagation probability of a head, from three moments of its spectrum."""

import math

import torch
from torch import Tensor

from lightning_qk.functional._precision import at_least_float32


def signal_propagation_probability(
    theta: float | Tensor, trace: Tensor, trace_sq: Tensor, frobenius_sq: Tensor
) -> Tensor:
    r"""How likely a token at relative position θ is inside the linear window of the last query's softmax.

    The softmax is approximated by a piecewise linear function; a token passes signal where it is neither at
    0 nor at 1. For tokens that are a Gaussian random walk ``x_t = x_{t−1} + z_t`` the logit at relative
    position θ = i/T is close to a Gaussian of mean ``μ = (θ − ½) ξ`` and variance
    ``v = (θ − ½)² η + (θ² − θ + ⅓) F``, and the probability is ``Φ((1 − μ)/√v) − Φ(−μ/√v)``.

    The notion is that of Bao et al., ICML 2024 (arXiv 2402.02098); this form, which holds for non-symmetric
    ``W_QK`` as well, is derived and agrees with Monte Carlo to 0.02 for T ≥ 512. It is a diagnostic of the
    weights under a model of the tokens, not a measurement: ``linear_share`` of
    :func:`~lightning_qk.functional.attention_statistics` is its measured counterpart.

    Args:
        theta: relative position in [0, 1], a number or a tensor that broadcasts with the moments.
        trace: ξ = tr W_QK, of the matrix with the softmax scale s in it: s times the ``trace`` of
            :func:`~lightning_qk.functional.qk_moments`.
        trace_sq: η = tr W_QK², that is s² times ``trace_sq``.
        frobenius_sq: F = ‖W_QK‖²_F, that is s² times ``frobenius_sq``.

    Returns:
        Probabilities in [0, 1], of the shape that the arguments broadcast to.

    Example:
        >>> one = torch.tensor(1.0)
        >>> round(signal_propagation_probability(0.95, 0 * one, one, one).item(), 3)
        0.424
    """
    trace = at_least_float32(trace)
    position = torch.as_tensor(theta, dtype=trace.dtype, device=trace.device)
    mean = (position - 0.5) * trace
    variance = (position - 0.5).square() * trace_sq + (position.square() - position + 1 / 3) * frobenius_sq
    # |η| ≤ F keeps the variance at F/12 or more; the floor is for F = 0, where it makes the limit exact: 1
    # inside the window, 0 outside, ½ on its edge.
    deviation = variance.clamp_min(torch.finfo(trace.dtype).tiny).sqrt()
    return _normal_cdf((1 - mean) / deviation) - _normal_cdf(-mean / deviation)


def _normal_cdf(x: Tensor) -> Tensor:
    # erfc keeps precision in the lower tail, where 1 + erf cancels.
    return 0.5 * torch.erfc(-x / math.sqrt(2))
