"""The attention that moments of queries and keys predict, head by head."""

import torch
from torch import Tensor

from lightning_qk.functional import attention_statistics
from lightning_qk.functional.checks import integer
from lightning_qk.functional.token_moments import (
    TokenMoments,
    rotate_tokens,
    token_classes,
)
from lightning_qk.heads import HeadProjections

_ROWS = 32


def predict_attention(
    head: HeadProjections,
    moments: TokenMoments,
    *,
    length: int,
    is_causal: bool,
    sequences: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Statistics of attention over independent Gaussian tokens with a layer's own moments.

    Tokens are drawn independently, with the joint covariance of query and key and the mean of their position:
    the first token's own mean, and at further positions, by their share there, that of tokens like first ones or
    that of the others. They are rotated by position as the layer does, and their attention measured. What a
    model's measured attention has beyond it is what tokens say to each other ("semantic"). Derived.

    Args:
        head: projections of the layer, for its scale and rotation.
        moments: of the layer, from :func:`~lightning_qk.token_moments`.
        length: tokens of a sequence.
        is_causal: whether a token sees those before it alone.
        sequences: how many to draw.
        seed: of an own generator.

    Returns:
        As :func:`~lightning_qk.functional.attention_statistics`: a dict of float tensors ``(heads,)``.

    Raises:
        ValueError: moments of another layer, of too few tokens, or of one whose logits they do not determine.
    """
    _check(head, moments, length)
    if integer(sequences, "sequences") < 1:
        raise ValueError(f"expected sequences of 1 at least, got {sequences}: pass 8, say")
    generator = torch.Generator().manual_seed(integer(seed, "seed"))
    query, key = _drawn(moments, length, sequences, generator)
    if head.rotary is not None:
        position = torch.arange(length, device=query.device)[None]
        query, key = (rotate_tokens(part, head.rotary, position) for part in (query, key))
    return attention_statistics(
        query,
        key,
        is_causal=is_causal,
        scaling=head.scaling,
        softcap=moments.softcap,
        sliding_window=moments.sliding_window,
        sinks=moments.sinks,
        bias=_bias(moments, length),
        self_attention=moments.cross_scatter is not None,
    )


def predict_logit_std(
    head: HeadProjections, moments: TokenMoments, *, length: int, is_causal: bool
) -> Tensor:
    """``logit_std`` of :func:`predict_attention` in closed form, ``(heads,)``.

    A row's logits have the variance ``s² qᵀ A q`` over the keys that it sees, A the spread of rotated keys, their
    means by position included. Over Gaussian queries this has mean μ and variance V by traces, and its root the
    mean ``√μ (1 - V / 8 μ²)``, to second order. Of 32 rows, evenly spaced. Derived.

    Args:
        head: projections of the layer.
        moments: of the layer.
        length: tokens of a sequence.
        is_causal: whether a token sees those before it alone.

    Raises:
        ValueError: as :func:`predict_attention`; also a soft cap, a bias or a window, which have no such form.
    """
    check_closed_form(head, moments, length)
    d_head = moments.d_head
    share, means, covariance = token_classes(moments, length)
    of_class = torch.stack([1 - share, share])
    cov_q, cov_k = covariance[..., :d_head, :d_head], covariance[..., d_head:, d_head:]
    mean_k = torch.einsum("cn,chnd->hnd", of_class, means[..., d_head:])
    apart = (means[1] - means[0])[..., d_head:] * (share * (1 - share)).sqrt()[:, None]
    rows = torch.linspace(1 if is_causal else 0, length - 1, min(_ROWS, length - 1)).long().unique()
    outer = torch.zeros_like(cov_k)
    total = torch.zeros_like(mean_k[:, 0])
    found, start = [], 0
    for row in rows.tolist():
        stop = row + 1 if is_causal else length
        place = torch.arange(start, stop, device=means.device)
        start = stop
        if len(place):
            turned, between = (rotated(part[:, place], head, place) for part in (mean_k, apart))
            # The first token has no spread of its own.
            spread = rotated_covariance(cov_k, head, place[place > 0])
            outer = outer + turned.mT @ turned + between.mT @ between + spread
            total = total + turned.sum(1)
        here = torch.tensor([row], device=means.device)
        width = rotated_covariance(cov_q, head, here)
        m = total / stop
        spread = outer / stop - m[:, :, None] * m[:, None]
        for one, mean in zip(of_class[:, row], means[..., :d_head], strict=True):
            if one > 0:
                centre = rotated(mean[:, here], head, here)[:, 0]
                found.append(one * _root_mean(head.scaling, spread, centre, width))
    return torch.stack(found).sum(0) / len(rows)


def _root_mean(scaling: float, spread: Tensor, centre: Tensor, width: Tensor) -> Tensor:
    """Mean of ``√(s² qᵀ A q)`` over Gaussian q of a mean and covariance."""
    product = spread @ width
    aside = (spread @ centre[..., None])[..., 0]
    mean = product.diagonal(dim1=-2, dim2=-1).sum(-1) + (centre * aside).sum(-1)
    variance = 2 * (product * product.mT).sum((-2, -1))
    variance = variance + 4 * torch.einsum("hd,hde,he->h", aside, width, aside)
    mean = mean.clamp_min(1e-30)
    # A chi-square-like form is never spread further than one of a single direction.
    return abs(scaling) * mean.sqrt() * (1 - (variance / (8 * mean.square())).clamp_max(0.25))


def rotated(vectors: Tensor, head: HeadProjections, place: Tensor) -> Tensor:
    """Vectors ``(heads, n, d_head)`` rotated by position."""
    if head.rotary is None:
        return vectors
    return rotate_tokens(vectors[None], head.rotary, place[None])[0]


def rotated_covariance(
    covariance: Tensor, head: HeadProjections, place: Tensor, weight: Tensor | None = None
) -> Tensor:
    """``Σ_p w_p R_p C R_pᵀ`` over positions, ``(heads, d_head, d_head)``; without weights they are 1."""
    if weight is None:
        weight = torch.ones(len(place), dtype=covariance.dtype, device=covariance.device)
    if head.rotary is None or not len(place):
        return covariance * weight.sum()
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()[:, None]).mT  # (heads, directions, d_head)
    heads, d_head, _ = root.shape
    out = torch.zeros_like(covariance)
    for some, own in zip(place.split(64), weight.to(root).sqrt().split(64), strict=True):
        lines = (
            (root[:, :, None] * own[:, None])
            .expand(-1, -1, len(some), -1)
            .reshape(1, heads * d_head, len(some), d_head)
        )
        turned = rotate_tokens(lines, head.rotary, some[None]).reshape(heads, -1, d_head)
        out = out + turned.mT @ turned
    return out


def _drawn(
    moments: TokenMoments, length: int, sequences: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(sequences, heads, length, d_head)``, float32, before rotation."""
    share, means, covariance = token_classes(moments, length)
    shape = (sequences, moments.heads, length, 2 * moments.d_head)
    noise = torch.randn(shape, generator=generator).to(covariance.device)
    noise[:, :, 0, 0 if moments.cross_scatter is not None else moments.d_head :] = 0
    is_like_first = _systematic(share.cpu(), sequences, generator).to(share.device)[:, None, :, None]
    regular, alike = means.float()
    tokens = torch.where(is_like_first, alike, regular) + noise @ _root(covariance).mT
    query, key = tokens.split(moments.d_head, -1)
    return query, key


def _systematic(share: Tensor, sequences: int, generator: torch.Generator) -> Tensor:
    """Tokens ``(sequences, length)``, marked by a share at each position; any run of positions has its number.

    A sink at an early position decides what all later ones see, so that few independent draws say little.
    """
    shape = (len(share), sequences)
    total = share[:, None].expand(shape).flatten().cumsum(0) + torch.rand((), generator=generator)
    marked = (total.floor().diff(prepend=total.new_zeros(1)) > 0).view(shape)
    return marked.gather(1, torch.rand(shape, generator=generator).argsort(1)).T


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()[:, None]).float()


def _bias(moments: TokenMoments, length: int) -> Tensor | None:
    if moments.offset_bias is None:
        return None
    known = (moments.offset_bias.shape[1] + 1) // 2
    place = torch.arange(length, device=moments.offset_bias.device)
    return moments.offset_bias[:, place[None] - place[:, None] + known - 1].float()[None]


def check_closed_form(head: HeadProjections, moments: TokenMoments, length: int) -> None:
    """Raises ValueError for what has no closed form, or as :func:`predict_attention`."""
    _check(head, moments, length)
    for name in ("softcap", "offset_bias", "sliding_window"):
        if getattr(moments, name) is not None:
            raise ValueError(f"expected logits without {name} for the closed form: use predict_attention")


def _check(head: HeadProjections, moments: TokenMoments, length: int) -> None:
    if integer(length, "length") < 2:
        raise ValueError(f"expected a length of 2 at least, got {length}: pass that of the sequences")
    shape = (head.heads, head.kv_heads, head.d_head)
    own = (moments.heads, moments.kv_heads, moments.d_head)
    if shape != own:
        raise ValueError(
            f"expected moments of {shape} (heads, kv_heads, d_head), got {own}: pass those of the same layer"
        )
    if moments.unexplained is not None:
        raise ValueError(f"no attention can be predicted from moments: {moments.unexplained}")
    if min(float(moments.query.count), float(moments.key.count)) < 2:
        raise ValueError("expected moments of two tokens at least besides the first: pass longer sequences")
    if moments.offset_bias is not None and 2 * length - 1 > moments.offset_bias.shape[1]:
        raise ValueError(
            f"expected a length of {(moments.offset_bias.shape[1] + 1) // 2} at most, up to which the bias by "
            f"position was seen, got {length}: take moments of longer sequences"
        )
