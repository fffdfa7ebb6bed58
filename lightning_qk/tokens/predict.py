"""The attention that moments of queries and keys predict, head by head."""

import torch
from torch import Tensor

from lightning_qk.functional import attention_statistics
from lightning_qk.functional.checks import integer
from lightning_qk.functional.token_moments import (
    TokenMoments,
    joint_moments,
    position_means,
    rotate_tokens,
    side_means,
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

    Tokens are drawn independently: each has the mean of its position and the joint covariance of query and key,
    the first one its own mean; further tokens that are like first ones are a class of their own. They are
    rotated by position as the layer does, and their attention measured. What
    a model's measured attention has beyond it is what tokens say to each other ("semantic"). Derived.

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
    _check(head, moments, length)
    for name in ("softcap", "offset_bias", "sliding_window"):
        if getattr(moments, name) is not None:
            raise ValueError(f"expected logits without {name} for the closed form: use predict_attention")
    d_head = moments.d_head
    mean, covariance = _joint(moments, length)
    mean_q, mean_k = mean.split(d_head, -1)
    cov_q, cov_k = covariance[..., :d_head, :d_head], covariance[..., d_head:, d_head:]
    rows = torch.linspace(1 if is_causal else 0, length - 1, min(_ROWS, length - 1)).long().unique()
    outer = torch.zeros_like(cov_k)
    total = torch.zeros_like(mean_k[:, 0])
    found, start = [], 0
    for row in rows.tolist():
        stop = row + 1 if is_causal else length
        place = torch.arange(start, stop, device=mean.device)
        start = stop
        if len(place):
            turned = _turned(mean_k[:, place], head, place)
            # The first token has no spread of its own.
            spread = _turned_covariance(cov_k, head, place[place > 0])
            outer = outer + turned.mT @ turned + spread
            total = total + turned.sum(1)
        here = torch.tensor([row], device=mean.device)
        centre = _turned(mean_q[:, here], head, here)[:, 0]
        width = _turned_covariance(cov_q, head, here)
        m = total / stop
        found.append(_root_mean(head.scaling, outer / stop - m[:, :, None] * m[:, None], centre, width))
    return torch.stack(found).mean(0)


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


def _turned(vectors: Tensor, head: HeadProjections, place: Tensor) -> Tensor:
    """Vectors ``(heads, n, d_head)`` rotated by position."""
    if head.rotary is None:
        return vectors
    return rotate_tokens(vectors[None], head.rotary, place[None])[0]


def _turned_covariance(covariance: Tensor, head: HeadProjections, place: Tensor) -> Tensor:
    """``Σ_p R_p C R_pᵀ`` over positions, ``(heads, d_head, d_head)``."""
    if head.rotary is None or not len(place):
        return covariance * len(place)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()[:, None]).mT  # (heads, directions, d_head)
    heads, d_head, _ = root.shape
    out = torch.zeros_like(covariance)
    for some in place.split(64):
        lines = root[:, :, None].expand(-1, -1, len(some), -1).reshape(1, heads * d_head, len(some), d_head)
        turned = rotate_tokens(lines, head.rotary, some[None]).reshape(heads, -1, d_head)
        out = out + turned.mT @ turned
    return out


def _joint(moments: TokenMoments, length: int) -> tuple[Tensor, Tensor]:
    """Joint means by position and covariance of (q, k), also of cross-attention, whose sides are independent."""
    if moments.cross_scatter is not None:
        return position_means(moments, length)
    groups = moments.heads // moments.kv_heads
    mean_q, cov_q = side_means(moments.query, length)
    mean_k, cov_k = (part.repeat_interleave(groups, 0) for part in side_means(moments.key, length))
    nothing = torch.zeros_like(cov_q)
    covariance = torch.cat([torch.cat([cov_q, nothing], -1), torch.cat([nothing, cov_k], -1)], -2)
    return torch.cat([mean_q, mean_k], -1), covariance


def _drawn(
    moments: TokenMoments, length: int, sequences: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(sequences, heads, length, d_head)``, float32, before rotation."""
    mean, covariance = _joint(moments.regular(), length)
    root = _root(covariance)
    shape = (sequences, moments.heads, length, 2 * moments.d_head)
    noise = torch.randn(shape, generator=generator).to(root.device)
    if moments.cross_scatter is not None:
        noise[:, :, 0] = 0
    else:
        noise[:, :, 0, moments.d_head :] = 0
    tokens = mean.float() + noise @ root.mT
    part = moments.like_first
    if part is not None and float(part.query.count) > 0:
        is_like_first = torch.rand(sequences, 1, length, 1, generator=generator).to(root.device)
        is_like_first = is_like_first < float(part.query.count / moments.query.count)
        is_like_first[:, :, 0] = False
        mean, covariance = joint_moments(part)
        noise = torch.randn(shape, generator=generator).to(root.device)
        tokens = torch.where(is_like_first, mean.float()[:, None] + noise @ _root(covariance).mT, tokens)
    query, key = tokens.split(moments.d_head, -1)
    return query, key


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()[:, None]).float()


def _bias(moments: TokenMoments, length: int) -> Tensor | None:
    if moments.offset_bias is None:
        return None
    known = (moments.offset_bias.shape[1] + 1) // 2
    place = torch.arange(length, device=moments.offset_bias.device)
    return moments.offset_bias[:, place[None] - place[:, None] + known - 1].float()[None]


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
