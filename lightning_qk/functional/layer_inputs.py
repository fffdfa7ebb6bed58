r"""The covariance of what enters a layer, as a thin factor: Σ = root^T root.

Whatever depends on weights and Σ through ``W Σ W'^T`` alone is that of the weights ``W root^T``, of shape
``(d_head, tokens)`` in place of ``(d_head, d_model)``: no matrix of d_model × d_model is needed, and the gradient
by W is the one by ``W root^T``, times root. Derived.
"""

import torch
from torch import Tensor

from lightning_qk.functional.checks import floating
from lightning_qk.functional.precision import full_precision


def sample_tokens(
    hidden: Tensor, mask: Tensor | None, tokens: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens of a batch besides the first one of each sequence, evenly over it at random places.

    Of exactly as many tokens as there are, each is taken once. Nothing waits for the device.

    Args:
        hidden: ``(batch, n, d)``.
        mask: tokens that count, boolean ``(batch, n)``; None: all of them.
        tokens: how many to take; where there are fewer, some are taken several times.
        generator: on the CPU, where places are drawn from.

    Returns:
        Tokens ``(tokens, d)``, a copy, and how many of the batch's each stands for, ``(tokens,)``, float32: 0
        where the batch has none.
    """
    index, weight = sample_places(hidden.shape[:2], mask, tokens, device=hidden.device, generator=generator)
    return hidden.flatten(0, 1).index_select(0, index), weight


def sample_places(
    shape: tuple[int, ...],
    mask: Tensor | None,
    tokens: int,
    *,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Places of :func:`sample_tokens` in a batch of that shape ``(batch, n)``, counted row by row, and weights.

    Args:
        shape: of the batch.
        mask: see :func:`sample_tokens`.
        tokens: see :func:`sample_tokens`.
        device: of the tokens.
        generator: see :func:`sample_tokens`.
    """
    valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
    counted = (valid & (valid.long().cumsum(1) > 1)).flatten().long().cumsum(0)
    total = counted[-1]
    drawn = torch.rand(tokens, generator=generator, dtype=torch.float64).to(device)
    place = (torch.arange(tokens, device=device) + drawn) * (total.double() / tokens)
    # The (place + 1)-th token that counts; the end of the last one's interval rounds into it.
    wanted = torch.minimum(place.long(), (total - 1).clamp_min(0)) + 1
    index = torch.searchsorted(counted, wanted).clamp_max(len(counted) - 1)
    return index, (total.float() / tokens).expand(tokens)


def covariance_root(tokens: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""The factor of the tokens' covariance, ``(…, tokens, d)``: Σ = root^T root.

    Args:
        tokens: ``(…, tokens, d)``, floating; leading axes are of other layers.
        weight: how many tokens each stands for, ``(…, tokens)``; 0 leaves it out, whatever it holds. None: one
            each.

    Returns:
        float32 at least; all zero where no token counts.

    Raises:
        ValueError: shapes that do not fit.
    """
    weight = _checked(tokens, weight)
    with torch.no_grad(), full_precision(tokens.device):
        counted, share = _shares(tokens, weight)
        # About a token, so that a large mean takes no digits from the spread.
        first = (weight > 0).long().argmax(-1)[..., None, None]
        about = counted - torch.take_along_dim(counted, first, -2)
        spread = about - share[..., None, :] @ about
        return share.sqrt()[..., None] * torch.where((weight > 0)[..., None], spread, 0.0)


def token_mean(tokens: Tensor, weight: Tensor | None = None) -> Tensor:
    """The tokens' mean, ``(…, d)``, with the arguments of :func:`covariance_root`; zero where no token counts."""
    weight = _checked(tokens, weight)
    with torch.no_grad(), full_precision(tokens.device):
        counted, share = _shares(tokens, weight)
        return (share[..., None, :] @ counted)[..., 0, :]


def _checked(tokens: Tensor, weight: Tensor | None) -> Tensor:
    floating(tokens, "tokens")
    if weight is None:
        weight = tokens.new_ones(tokens.shape[:-1])
    if tokens.dim() < 2 or weight.shape != tokens.shape[:-1]:
        raise ValueError(
            f"expected tokens (…, tokens, d) and one weight each, got {tuple(tokens.shape)} and "
            f"{tuple(weight.shape)}: flatten batch and sequence into one axis"
        )
    return weight


def _shares(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, zero where they do not count, and what share of all each stands for."""
    kind = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    share = weight.to(kind) / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(kind).tiny)
    return torch.where((weight > 0)[..., None], tokens.to(kind), 0.0), share
