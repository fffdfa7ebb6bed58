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


def bound_of_logits(
    query: Tensor,
    key: Tensor,
    scaling: float,
    softcap: float | None,
    bias: Tensor | None,
    mask: object,
) -> Tensor:
    """No logit of a sequence and head has a larger modulus, ``(batch|1, heads, 1, 1)``; float64 on the CPU.

    Args:
        query: ``(batch, heads, n, d_head)``.
        key: ``(batch, kv_heads, m, d_head)``.
        scaling: factor on the products.
        softcap: bound on the scaled products, or None.
        bias: added to them, four axes.
        mask: likewise, where it is a floating tensor: what it hides does not count.
    """
    wide = torch.float64 if key.device.type == "cpu" else key.dtype
    of_query, of_key = (longest(part, wide) for part in (query, key))
    size = of_query * of_key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    size = (size * abs(scaling))[..., None, None]
    if softcap is not None:
        size = size.clamp_max(abs(softcap))
    for added in (bias, mask):
        if isinstance(added, Tensor) and added.is_floating_point() and added.numel():
            # A broadcast tensor is read once.
            own = added[tuple(slice(1) if step == 0 else slice(None) for step in added.stride())]
            largest = own.amax((2, 3), keepdim=True) if added is mask else largest_modulus(own)
            size = size + largest.to(wide).clamp_min(0)
    return size


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
