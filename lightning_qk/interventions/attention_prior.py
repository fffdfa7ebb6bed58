"""Pull attention toward a prior."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_qk.functional.entropy import (
    PriorFunction,
    diagonal_prior,
    prior_divergence,
    uniform_prior,
    window_prior,
)
from lightning_qk.functional.logits import AttentionLogits, ProductLogits
from lightning_qk.interventions.auxiliary import Measure, Penalty

Kind = Literal["diagonal", "window", "uniform"]


def named_prior(kind: str, window: int) -> PriorFunction | None:
    """The prior of a name, or None where it has none.

    Args:
        kind: ``"diagonal"``, ``"window"`` or ``"uniform"``.
        window: of the second: keys fewer than so many positions away.
    """
    if kind == "diagonal":
        return diagonal_prior
    if kind == "window":
        return window_prior(window)
    return uniform_prior if kind in get_args(Kind) else None


def is_positional(prior: object) -> bool:
    """Whether the prior compares positions of queries and keys, which means nothing between two sequences."""
    return isinstance(prior, str) and prior in ("diagonal", "window")


def prior_penalty(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    prior: Tensor | PriorFunction | None = None,
    *,
    heads: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """Mean of ``KL(prior ‖ attention)`` over rows, then over heads; a differentiable scalar, streamed.

    Source: 2205.12616 [S]; the form is our own: see :func:`~lightning_qk.functional.prior_divergence`.

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`~lightning_qk.functional.AttentionLogits` by itself.
        key: ``(batch, kv_heads, m, d_head)``.
        prior: a tensor or a function.
        heads: indices of the query heads that are meant; None for all.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`.

    Returns:
        Zero where no row counts.

    Raises:
        ValueError: an index that is no head's, or shapes that do not fit.
    """
    count = query.shape[1]  # of both forms
    if heads is not None and not all(0 <= head < count for head in heads):
        raise ValueError(f"expected indices of heads below {count}, got {list(heads)}")
    divergence = prior_divergence(query, key, prior, reduction="batch", **options)
    if heads is not None:
        divergence = divergence[list(heads)]
    is_there = ~divergence.detach().isnan()
    return torch.where(is_there, divergence, 0.0).sum() / is_there.sum().clamp_min(1)


def prior_measure(
    prior: Callable[[], Tensor | PriorFunction | None], heads: Sequence[int] | None = None
) -> Measure:
    """The penalty of :func:`prior_penalty` for :class:`~lightning_qk.interventions.auxiliary.AttentionPenalty`.

    Args:
        prior: returns what attention is pulled toward at the call, or None for no pull.
        heads: as in :func:`prior_penalty`.
    """

    def measure(name: str, logits: ProductLogits) -> Penalty | None:
        target = prior()
        if target is None:
            return None
        value = prior_penalty(logits, prior=target, heads=heads)
        return Penalty(value, {"kl": value})

    return measure
