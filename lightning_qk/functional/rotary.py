"""Rotary position encoding as an operator on one head's coordinates."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """How a layer rotates the coordinates of a head with position.

    Attributes:
        inv_freq: angular frequencies in radians per position, shape ``(pairs,)``; the first ``2 * pairs``
            coordinates of a head are rotated, the rest are left alone (partial rotary).
        interleaved: which coordinates form a pair. ``False``: ``(i, i + pairs)``, the half-split form of
            Llama, GPT-NeoX and most others. ``True``: ``(2i, 2i + 1)``, the form of GPT-J and Cohere.
    """

    inv_freq: Tensor
    interleaved: bool = False


def rotate(matrix: Tensor, rotary: Rotary, offset: Tensor) -> Tensor:
    """Apply the rotation of a relative position to the rows of a matrix.

    Args:
        matrix: shape ``(..., d_head, m)``.
        rotary: the layer's rotation.
        offset: relative positions, shape ``(offsets,)``, or a scalar tensor.

    Returns:
        ``R_offset @ matrix``, shape ``(offsets, ..., d_head, m)``, or ``(..., d_head, m)`` for a scalar.

    Raises:
        ValueError: the rotation has more coordinates than the head.
    """
    pairs = rotary.inv_freq.numel()
    d_head = matrix.shape[-2]
    if 2 * pairs > d_head:
        raise ValueError(
            f"expected a rotation of at most d_head = {d_head} coordinates, got {2 * pairs} (two for each of "
            f"{pairs} frequencies): pass the inv_freq of the layer that the head belongs to"
        )
    rotated, rest = matrix[..., : 2 * pairs, :], matrix[..., 2 * pairs :, :]
    if rotary.interleaved:
        first, second = rotated[..., 0::2, :], rotated[..., 1::2, :]
    else:
        first, second = rotated[..., :pairs, :], rotated[..., pairs:, :]
    angle = offset.to(matrix.dtype)[..., None] * rotary.inv_freq.to(matrix)
    # One angle a pair, the same for every head and column.
    shape = (*offset.shape, *(1,) * (matrix.dim() - 2), pairs, 1)
    cos, sin = angle.cos().view(shape), angle.sin().view(shape)
    turned = (first * cos - second * sin, first * sin + second * cos)
    if rotary.interleaved:
        out = torch.stack(turned, dim=-2).flatten(-3, -2)
    else:
        out = torch.cat(turned, dim=-2)
    return torch.cat([out, rest.expand(*out.shape[:-2], *rest.shape[-2:])], dim=-2)
