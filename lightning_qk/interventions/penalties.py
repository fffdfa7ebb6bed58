"""Penalties of attention calls that reach the gradient without being a term of the user's loss.

A penalty is attached to the output of its call: the output passes through unchanged, and when a gradient comes
back the penalty gets one too, a constant. So it counts once for each backward pass, also where a checkpoint
computes the call twice, and not at all without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_qk.capture.call import AttentionCall
from lightning_qk.capture.captured import attention_logits
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.capture.registry import Run
from lightning_qk.functional.entropy import (
    PriorFunction,
    attention_entropy,
    diagonal_prior,
    prior_divergence,
    uniform_prior,
    window_prior,
)
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits
from lightning_qk.interventions.layers import Steered

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Penalty(NamedTuple):
    """The penalty of one call: a differentiable scalar, and scalars to log by name."""

    value: Tensor
    logged: dict[str, Tensor]


Measure = Callable[[str, ProductLogits], Penalty | None]
"""``measure(name, logits)``: penalty of one call, with gradients."""


class Auxiliary(Steered):
    """Penalties that are attached to outputs of attention calls.

    Args:
        weight: coefficient of the mean over layers.
        layers: number of layers.

    Attributes:
        weight: may be changed at any time; read in the backward pass.
        scale: factor on the loss in its backward pass: that of a gradient scaler, or one over the number of
            accumulated micro-batches. Read in the backward pass.
        enabled: whether calls get a penalty.
    """

    def __init__(self, weight: float, layers: int) -> None:
        self.weight = weight
        self.scale: float | Tensor = 1.0
        self.enabled = True
        self._layers = layers
        self._seen: list[dict[str, Tensor]] = []

    def attach(self, output: Any, penalty: Penalty) -> Any:
        """The output of an attention function, unchanged, whose gradient also reaches the penalty."""
        first = output[0] if isinstance(output, tuple) else output
        first = _Attach.apply(first, penalty.value, penalty.logged, self)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def take(self) -> dict[str, Tensor]:
        """Means over the calls of backward passes since the last ``take``; empty without any."""
        seen, self._seen = self._seen, []
        names = dict.fromkeys(name for one in seen for name in one)
        return {name: torch.stack([one[name] for one in seen if name in one]).nanmean() for name in names}

    def _reached(self, logged: dict[str, Tensor], like: Tensor) -> Tensor:
        """The gradient of a call's penalty, asked for by a backward pass."""
        self._seen.append(logged)
        return like * (self.weight / self._layers) * self.scale


class AttentionPenalty(Auxiliary):
    """Adds ``weight`` times the mean over layers of a penalty to the gradient of the loss; a context manager.

    Within it, every backward pass through the layers' attention adds the penalty's gradient, as if
    ``loss + weight * penalty`` were the loss. Calls without autograd cost nothing, outputs are bit-identical. A
    layer whose output does not reach the loss gets no penalty; several calls of one layer in one forward add
    up.

    Args:
        names: the attention modules, and the name of each.
        measure: the penalty of one call, or None where it has none.
        weight: its coefficient.
        cross: names of the layers whose keys are other tokens than the queries.
        model: the model that contains the modules, see
            :class:`~lightning_qk.capture.intercept.AttentionInterceptor`.

    Raises:
        ValueError: a layer whose call does not pass through transformers' interface, or cannot be read.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        measure: Measure,
        weight: float,
        *,
        cross: frozenset[str] = frozenset(),
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(weight, len(names))
        self._measure = measure
        self._cross = cross
        self.steering = AttentionInterceptor(names, self._wrap, model=model)

    def _wrap(self, name: str, call: AttentionCall, run: Run) -> Any:
        output = run(call)
        needs_gradient = call.query.requires_grad or call.key.requires_grad
        if not (self.enabled and torch.is_grad_enabled() and needs_gradient):
            return output
        try:
            logits, _ = attention_logits(call, self_attention=name not in self._cross)
            penalty = self._measure(name, logits)
        except Exception as error:
            # The output is kept: dropout is not drawn a second time.
            if not self.steering.tolerates(name, error):
                raise
            return output
        return output if penalty is None else self.attach(output, penalty)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, penalty: Tensor, logged: dict[str, Tensor], owner: Auxiliary
    ) -> Tensor:
        ctx.one = torch.ones_like(penalty)
        ctx.logged = {name: value.detach() for name, value in logged.items()}
        ctx.owner = owner
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, ctx.owner._reached(ctx.logged, ctx.one), None, None


Kind = Literal["diagonal", "window", "uniform"]


def named_prior(kind: str, window: int) -> PriorFunction | None:
    """The prior of a name: ``"diagonal"``, ``"window"`` (keys fewer than ``window`` away) or ``"uniform"``."""
    if kind == "window":
        return window_prior(window)
    return {"diagonal": diagonal_prior, "uniform": uniform_prior}.get(kind)


def is_positional(prior: object) -> bool:
    """Whether the prior compares positions of queries and keys, which has no meaning between two sequences."""
    return isinstance(prior, str) and prior in ("diagonal", "window")


def prior_penalty(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    prior: Tensor | PriorFunction | None = None,
    *,
    heads: Sequence[int] | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """Mean of ``KL(prior ‖ attention)`` over rows, then over heads; a differentiable scalar, streamed.

    Source: 2205.12616 [S]; the form is our own. Arguments are those of
    :func:`~lightning_qk.functional.prior_divergence`, and:

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`~lightning_qk.functional.AttentionLogits` by itself.
        key: ``(batch, kv_heads, m, d_head)``.
        prior: a tensor or a function.
        heads: indices of the query heads to pull; None for all.
        options: :class:`~lightning_qk.functional.AttentionOptions`.

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
    """:func:`prior_penalty` for :class:`AttentionPenalty`, toward what ``prior()`` returns at the call, if any."""

    def measure(name: str, logits: ProductLogits) -> Penalty | None:
        target = prior()
        if target is None:
            return None
        value = prior_penalty(logits, prior=target, heads=heads)
        return Penalty(value, {"kl": value})

    return measure


Per = Literal["head", "row"]


class Band(NamedTuple):
    """Scalars of one call.

    Attributes:
        penalty: mean distance from the band, differentiable.
        entropy: mean normalized entropy.
        outside: share of heads (or rows) outside of the band.
    """

    penalty: Tensor
    entropy: Tensor
    outside: Tensor


def check_band(low: float, high: float, per: str) -> None:
    """Raise ValueError unless ``0 <= low <= high <= 1`` and ``per`` is ``"head"`` or ``"row"``."""
    if not 0 <= low <= high <= 1:
        raise ValueError(f"expected a band 0 <= low <= high <= 1 of normalized entropy, got {low} to {high}")
    if per not in get_args(Per):
        raise ValueError(f"expected per to be 'head' or 'row', got {per!r}")


def entropy_band(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    low: float = 0.0,
    high: float = 1.0,
    *,
    per: Per = "head",
    **options: Unpack[AttentionOptions],
) -> Band:
    """How far normalized entropy is outside of a band: ``max(0, low − H) + max(0, H − high)``, averaged.

    Streamed, see :func:`~lightning_qk.functional.attention_entropy` for ``query``, ``key`` and ``options``.
    After the idea of entropy regularization with a tolerance, arXiv 2501.03489; the hinge on a fixed band is
    our own form [R].

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`~lightning_qk.functional.AttentionLogits` by itself.
        key: ``(batch, kv_heads, m, d_head)``.
        low: lower bound, in [0, 1].
        high: upper bound, in [0, 1].
        per: ``"head"``: H is a head's mean over all rows of the batch; ``"row"``: every row by itself.
        options: :class:`~lightning_qk.functional.AttentionOptions`.

    Returns:
        Scalars; zero and NaN where no row counts.

    Raises:
        ValueError: see :func:`check_band`.
    """
    check_band(low, high, per)
    reduction: Literal["batch", "none"] = "batch" if per == "head" else "none"
    entropy = attention_entropy(query, key, normalized=True, reduction=reduction, **options)
    # A head or row without a value is kept out of the graph, as a constant inside the band.
    is_there = ~entropy.detach().isnan()
    there = torch.where(is_there, entropy, low)
    distance = (low - there).clamp_min(0) + (there - high).clamp_min(0)
    count = is_there.sum()
    outside = ((distance > 0) & is_there).sum() / count
    return Band(distance.sum() / count.clamp_min(1), entropy.detach().nanmean(), outside)


def band_measure(low: float, high: float, per: Per = "head") -> Measure:
    """:func:`entropy_band` for :class:`AttentionPenalty`."""
    check_band(low, high, per)

    def measure(name: str, logits: ProductLogits) -> Penalty:
        band = entropy_band(logits, low=low, high=high, per=per)
        return Penalty(band.penalty, {"penalty": band.penalty, **band._asdict()})

    return measure
