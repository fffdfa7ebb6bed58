"""Sizes of logits that a precision represents with all of its digits, and their squares too."""

import torch
from torch import Tensor

from lightning_qk.functional.precision import norms

# Logits whose squares, and sums of them, have all their digits.
RANGE = {torch.float32: (1e-15, 1e18), torch.float64: (1e-140, 1e140)}


def longest(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest Euclidean norm of each sequence and head, ``(batch, heads)``."""
    return norms(vectors, dtype).amax(-1)


def largest_modulus(tensor: Tensor) -> Tensor:
    """The largest modulus over the last two axes, which are kept."""
    low, high = tensor.amin((2, 3), keepdim=True), tensor.amax((2, 3), keepdim=True)
    return torch.maximum(high, -low)


def fits_range(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Which sizes of logits have squares within the range of a dtype, or are 0."""
    low, high = RANGE[dtype]
    # What is not a number says so by itself.
    return (
        (size == 0)
        | ((size >= low) & (size <= high))
        | size.isnan()
        | (size.isinf() & (size.device.type == "cpu"))
    )
