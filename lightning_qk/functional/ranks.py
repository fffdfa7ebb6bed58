"""Agreement of two rankings."""

import torch
from torch import Tensor

from lightning_qk.functional.checks import dense, floating, one_device


def kendall_tau(x: Tensor, y: Tensor) -> Tensor:
    r"""Kendall's rank correlation τ_b along the last axis, ties corrected.

    With C pairs that x and y order alike, D that they order against each other, and of all pairs ``n (n − 1) / 2``
    those that are tied in x, and in y, taken off:

    .. math:: \tau_b = (C - D) / \sqrt{(P - T_x)(P - T_y)}

    1 where both order everything alike, −1 where one is the other's reverse, 0 in expectation where they have
    nothing to do with each other. Standard (Kendall 1945). Memory is linear in n, work quadratic.

    Args:
        x: shape ``(..., n)``; any real dtype.
        y: shape that broadcasts with x, the last axis of the same length.

    Returns:
        Shape ``(...)``, float64. NaN where all values of x or of y are the same, where one is NaN, and for
        fewer than two values.

    Raises:
        ValueError: last axes of different lengths.

    Example:
        >>> round(kendall_tau(torch.tensor([1, 2, 3, 3]), torch.tensor([1, 3, 2, 4])).item(), 4)
        0.5477
    """
    for name, value in (("x", x), ("y", y)):
        if dense(value, name).is_complex() or (value.is_floating_point() and value.dtype.itemsize < 2):
            floating(value, name)
    one_device(x=x, y=y)
    if x.dim() == 0 or y.dim() == 0 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"expected two tensors with last axes of one length, got shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}: a value of x and one of y belong to each item"
        )
    try:
        shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"expected leading axes that broadcast, got shapes {tuple(x.shape)} and {tuple(y.shape)}: give "
            "both the same"
        ) from None
    agree, of_x, of_y = torch.zeros(3, *shape, dtype=torch.float64, device=x.device)
    for shift in range(1, x.shape[-1]):
        # Not the difference's sign: that of two infinite values would be NaN.
        one, other = (_order(value, shift) for value in (x, y))
        agree += (one * other).sum(-1)
        of_x += one.abs().sum(-1)
        of_y += other.abs().sum(-1)
    tau = (agree / (of_x * of_y).sqrt()).clamp(-1.0, 1.0)
    broken = torch.isnan(x).any(-1) | torch.isnan(y).any(-1)
    return torch.where(broken, torch.nan, tau)


def _order(x: Tensor, shift: int) -> Tensor:
    """1, 0 or −1 for each pair of values so many places apart."""
    first, second = x[..., :-shift], x[..., shift:]
    return (second > first).double() - (second < first).double()
