"""Geometry of an attention mask: which tokens reach all others, and over how many layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional._checks import boolean, dense, flags, integer

# Elements of a block of rows of the matrix of distances.
_BLOCK_ELEMENTS = 1 << 22


class MaskGeometry(NamedTuple):
    """Where the information of a token gets to, layer after layer.

    Attributes:
        centres: boolean ``(n,)``: tokens that every other token hears of, after enough layers.
        eccentricity: float ``(n,)``: after how many layers the last token has heard of each; inf where some never
            does, NaN for what is no token.
        radius: the least eccentricity, that of the best placed centre; None where there is no centre.
    """

    centres: Tensor
    eccentricity: Tensor
    radius: int | None


def mask_geometry(
    mask: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    n: int | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
) -> MaskGeometry:
    r"""Centre nodes and radius of the graph of an attention mask.

    After Wu et al. 2024 (arXiv 2405.18781 [S; form R]; also 2502.01951): tokens are nodes, with an edge from j to
    i where i attends to j. A centre reaches every node; the radius is the least number of steps in which some
    centre does. Where there is a centre, attention alone collapses the rank of the hidden states exponentially in
    depth, the slower the larger the radius is, and towards the centres. A causal window of ``w`` keys has radius
    ``⌈(n − 1) / (w − 1)⌉`` and the first token as its only centre.

    Args:
        mask: which keys (columns) each query (row) attends to, boolean ``(n, n)``.
        tokens: boolean ``(n,)``: nodes that count; padding is left out. None: all.
        n: number of tokens, instead of a mask: the geometry then follows from the next two in closed form.
        is_causal: keys after their query are hidden; with ``n``.
        sliding_window: keys at this distance or further are hidden, so that a query sees ``sliding_window`` keys
            where it is causal, its own among them; with ``n``.

    Returns:
        On the mask's device. One step from a token to itself is free, whatever the diagonal says: the residual
        stream keeps it.

    Raises:
        ValueError: not exactly one of ``mask`` and ``n``, shapes that do not fit, or a size below 1.

    Example:
        >>> mask_geometry(n=9, is_causal=True, sliding_window=3).radius
        4
    """
    boolean(is_causal, "is_causal")
    if mask is None:
        if n is None or tokens is not None:
            raise ValueError("expected a mask, or n without a mask and without tokens: pass one of the two")
        return _of_window(n, is_causal, sliding_window)
    if n is not None or is_causal or sliding_window is not None:
        raise ValueError(
            "expected a mask alone, got one with n, is_causal or sliding_window: put them into the mask"
        )
    if dense(mask, "mask").dim() != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != torch.bool:
        raise ValueError(
            f"expected a boolean mask (n, n), True where the key is seen, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}: take one sequence and one head"
        )
    size = mask.shape[0]
    if size == 0:
        raise ValueError("expected a mask of at least one token, got shape (0, 0)")
    is_node = torch.ones(size, dtype=torch.bool, device=mask.device)
    if tokens is not None:
        if dense(tokens, "tokens").shape != (size,):
            raise ValueError(
                f"expected tokens of shape ({size},), one entry a row, got {tuple(tokens.shape)}"
            )
        is_node = flags(tokens, "tokens").to(device=mask.device, dtype=torch.bool)
    places = is_node.nonzero()[:, 0]
    within = _eccentricity(mask[places][:, places])
    eccentricity = torch.full((size,), torch.nan, device=mask.device)
    eccentricity[places] = within
    return _geometry(eccentricity)


def _eccentricity(mask: Tensor) -> Tensor:
    """Breadth-first from every node, a block of starting nodes at a time; inf where some is not reached."""
    n = mask.shape[0]
    # Whom a token is heard by in one step: row j, column i. Floating, for matrix products.
    heard = mask.mT.float()
    out = torch.full((n,), torch.inf, device=mask.device)
    for start in torch.arange(n, device=mask.device).split(max(1, _BLOCK_ELEMENTS // max(1, n))):
        reached = torch.zeros(len(start), n, dtype=torch.bool, device=mask.device)
        reached[torch.arange(len(start), device=mask.device), start] = True
        front, steps = reached, 0
        out[start[reached.all(1)]] = 0.0
        while bool(front.any()):
            steps += 1
            front = (front.float() @ heard > 0) & ~reached
            reached = reached | front
            # The front of a row that is complete was its last.
            out[start[reached.all(1) & front.any(1)]] = float(steps)
    return out


def _of_window(n: int, is_causal: bool, window: int | None) -> MaskGeometry:
    n = integer(n, "n")
    window = None if window is None else integer(window, "sliding_window")
    if n < 1 or (window is not None and window < 1):
        raise ValueError(
            f"expected at least one token and a window of at least 1, got n={n}, window {window}"
        )
    place = torch.arange(n)
    # How far the last one to hear of a token is: causal ones are not heard of before their own place.
    far = torch.where(place == 0, n - 1, -1) if is_causal else torch.maximum(place, n - 1 - place)
    reach = n - 1 if window is None else window - 1
    steps = torch.full((n,), torch.inf)
    if n == 1:
        steps = torch.zeros(1)
    elif reach > 0:
        steps = torch.where(far >= 0, (far + reach - 1).div(reach, rounding_mode="floor").float(), steps)
    return _geometry(steps)


def _geometry(eccentricity: Tensor) -> MaskGeometry:
    centres = eccentricity.isfinite()
    radius = int(eccentricity[centres].min()) if bool(centres.any()) else None
    return MaskGeometry(centres, eccentricity, radius)
