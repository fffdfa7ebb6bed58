r"""Where the eigenvalues of a random head lie: what a spectrum that was learnt is compared with.

Let ``W_q`` and ``W_k`` (both ``d_head × d_model``) have independent, centred entries of variances a and b. The
eigenvalues of ``W_QK`` that can be non-zero are those of ``B = W_k W_q^T``, a product of two rectangular matrices.
As the widths grow they fill the disc of radius ``R = √(a b d_head d_model)``, and since
``E‖W_QK‖²_F = a b d_head d_model²``,

    R = ‖W_QK‖_F / √d_model.

With ``c = d_head / d_model``, the share F of them within a radius r follows ``F (1 − c + c F) = (r / R)²``:
uniform over the disc for narrow heads, and denser at its centre for wide ones (a square product has F = r / R).
After Burda et al. (Phys. Rev. E 82, 061114, 2010), who treat such products; this form is derived, and checked by
Monte Carlo.
"""

import torch
from torch import Tensor

from lightning_qk.functional.checks import floating, integer
from lightning_qk.functional.precision import at_least_float32


def circle_law_radius(frobenius_sq: Tensor, d_model: int) -> Tensor:
    r"""Radius of the disc that holds the eigenvalues of a random head of the same norm.

    Args:
        frobenius_sq: ``‖W_QK‖²_F``, any shape, as :func:`~lightning_qk.functional.qk_moments` gives it.
        d_model: width of what the projections read.

    Returns:
        The radius, of the same shape, in float32 at least. The largest eigenvalue of a random head of finite
        width lies a little in or out of it.

    Raises:
        ValueError: ``d_model`` below 1.

    Example:
        >>> circle_law_radius(torch.tensor(9.0), 4)
        tensor(1.5000)
    """
    floating(frobenius_sq, "frobenius_sq")
    d_model = integer(d_model, "d_model")
    if d_model < 1:
        raise ValueError(f"expected a d_model of at least 1, got {d_model}: pass the width of the tokens")
    return (at_least_float32(frobenius_sq) / d_model).sqrt()


def circle_law_share(modulus: Tensor, d_head: int, d_model: int) -> Tensor:
    r"""Share of a random head's ``d_head`` eigenvalues within some distance of zero.

    Args:
        modulus: distance over the radius of :func:`circle_law_radius`, any shape, not negative.
        d_head: width of the head.
        d_model: width of what the projections read.

    Returns:
        Shares in [0, 1], of the same shape, in float32 at least: the root of ``F (1 − c + c F) = modulus²`` with
        ``c = d_head / d_model``, and 1 from the radius on; NaN for a negative distance.

    Raises:
        ValueError: a head that is wider than the model, or a width below 1.

    Example:
        >>> circle_law_share(torch.tensor([0.5, 2.0]), 64, 64)  # a square product is dense at its centre
        tensor([0.5000, 1.0000])
    """
    floating(modulus, "modulus")
    d_head, d_model = integer(d_head, "d_head"), integer(d_model, "d_model")
    if not 1 <= d_head <= d_model:
        raise ValueError(
            f"expected a head no wider than the model, got d_head={d_head} and d_model={d_model}: "
            "pass the widths of the projections"
        )
    c = d_head / d_model
    modulus = at_least_float32(modulus)
    square = torch.where(modulus < 0, torch.nan, modulus.clamp(0, 1)).square()
    # The root in the form that does not cancel for narrow heads.
    return (
        2
        * square
        / ((1 - c) + ((1 - c) ** 2 + 4 * c * square).sqrt()).clamp_min(torch.finfo(square.dtype).tiny)
    )
