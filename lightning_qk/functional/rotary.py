"""Rotary position encoding as an operator on one head's coordinates."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """How a layer rotates the coordinates of a head with position.

    A query or key at position p becomes ``scale * R_p`` times itself on the rotated coordinates, of which there
    are two for each frequency, and stays what it is on the others (partial rotary).

    Attributes:
        inv_freq: angular frequencies in radians per position, shape ``(pairs,)``. Negative where a model
            rotates the other way round, 0 for a pair that stays.
        interleaved: which of the rotated coordinates form a pair. ``False``: ``(i, i + pairs)``, the half-split
            form of Llama, GPT-NeoX and most others. ``True``: ``(2i, 2i + 1)``, the form of GPT-J and Cohere.
        start: the first rotated coordinate of a head. Latent attention (DeepSeek's MLA) rotates its last ones.
        scale: factor on the rotated coordinates of q and of k each: YaRN's and longrope's attention factor,
            with which they multiply cos and sin. The logits get its square.
    """

    inv_freq: Tensor
    interleaved: bool = False
    start: int = 0
    scale: float = 1.0


def rotate(matrix: Tensor, rotary: Rotary, offset: Tensor) -> Tensor:
    """Rotate the rows of a matrix as a layer does with a query or a key at a position.

    Args:
        matrix: shape ``(..., d_head, m)``.
        rotary: the layer's rotation.
        offset: positions, shape ``(offsets,)``, or a scalar tensor.

    Returns:
        ``R_offset @ matrix`` with ``rotary.scale`` on the rotated rows, shape ``(offsets, ..., d_head, m)``, or
        ``(..., d_head, m)`` for a scalar.

    Raises:
        ValueError: the rotation has more coordinates than the head.
    """
    pairs = rotary.inv_freq.numel()
    d_head = matrix.shape[-2]
    stop = rotary.start + 2 * pairs
    if stop > d_head:
        raise ValueError(
            f"expected a rotation of at most d_head = {d_head} coordinates, got one of those from "
            f"{rotary.start} to {stop} (two for each of {pairs} frequencies): pass the rotation of the layer "
            "that the head belongs to"
        )
    before, rotated, after = matrix.split([rotary.start, 2 * pairs, d_head - stop], dim=-2)
    if rotary.interleaved:
        first, second = rotated[..., 0::2, :], rotated[..., 1::2, :]
    else:
        first, second = rotated[..., :pairs, :], rotated[..., pairs:, :]
    angle = offset.to(matrix.dtype)[..., None] * rotary.inv_freq.to(matrix)
    # One angle a pair, the same for every head and column.
    shape = (*offset.shape, *(1,) * (matrix.dim() - 2), pairs, 1)
    cos, sin = angle.cos().view(shape) * rotary.scale, angle.sin().view(shape) * rotary.scale
    turned = (first * cos - second * sin, first * sin + second * cos)
    if rotary.interleaved:
        out = torch.stack(turned, dim=-2).flatten(-3, -2)
    else:
        out = torch.cat(turned, dim=-2)
    kept = [part.expand(*out.shape[:-2], *part.shape[-2:]) for part in (before, after)]
    return torch.cat([kept[0], out, kept[1]], dim=-2)


def rotate_between(core: Tensor, rotary: Rotary, offset: Tensor) -> Tensor:
    """``R_Δ W_k W_q^T`` of a core ``W_k W_q^T``, with the scales of q and of k.

    Shapes and errors as :func:`rotate`.
    """
    return rotate(core, rotary._replace(scale=rotary.scale**2), offset)
