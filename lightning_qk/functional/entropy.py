"""Entropy of attention and its divergence from a prior, with gradients, in memory linear in length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lightning_qk.functional._streamed import RowGradient, RowMeasure, Softmax, row_values
from lightning_qk.functional.arguments import as_products
from lightning_qk.functional.checks import KindError, boolean, dense, floating, integer, one_device
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits
from lightning_qk.functional.precision import full_precision

if TYPE_CHECKING:
    from typing_extensions import Unpack

Reduction = Literal["sequence", "batch", "none"]
PriorFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``prior(batch, head, position, key)``: mass of index tensors that broadcast; positions on the keys' axis."""


def attention_entropy(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    *,
    normalized: bool = False,
    reduction: Reduction = "sequence",
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Mean entropy of attention rows, differentiable, in memory linear in the sequence length.

    ``H_i = −Σ_j p_ij log p_ij`` over the visible keys, in nats; its gradient by the logits is
    ``∂H_i/∂ω_ij = −p_ij (log p_ij + H_i)`` (standard). The backward pass computes the logits again, some rows at
    a time. A learnt sink is one more outcome, as in :func:`attention_statistics`.

    Args:
        query: ``(batch, heads, n, d_head)`` as the attention function gets it, or an :class:`AttentionLogits`.
        key: ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
        normalized: divide by ``log n_i``, of the number of visible keys (and the sink); rows with one outcome
            are left out.
        reduction: ``"sequence"``: means over the rows of each sequence, ``(batch, heads)``; ``"batch"``: over
            all rows, ``(heads,)``; ``"none"``: every row, ``(batch, heads, n)``. NaN where no row counts.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`. A floating mask, a
            bias and sinks get a gradient where they require one, as query and key do.

    Raises:
        ValueError: shapes that do not fit, a mask of another form, or another reduction.
    """
    boolean(normalized, "normalized")
    _check_reduction(reduction)
    return _reduce(*_rows(_Entropy(normalized), as_products(query, key, options)), reduction)


def prior_divergence(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    prior: Tensor | PriorFunction | None = None,
    *,
    reduction: Reduction = "sequence",
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Kullback-Leibler divergence of attention from a prior, ``KL(π ‖ p)``, in memory linear in length.

    For row i ``Σ_j π_ij (log π_ij − log p_ij)``, in nats, where π is the prior over the visible keys, divided by
    its sum there: a prior may be unnormalized, and mass on hidden keys counts as none. Rows without mass on a
    visible key are left out. The gradient by the logits is ``p_ij − π_ij``; the backward pass computes the
    logits again, some rows at a time. A learnt sink takes probability and has no prior.

    Source: grounding priors, arXiv 2205.12616 [S]; the form is our own.

    Args:
        query: ``(batch, heads, n, d_head)`` as the attention function gets it, or an :class:`AttentionLogits`.
        key: ``(batch, kv_heads, m, d_head)``.
        prior: masses of at least 0 (a negative one makes its row NaN): a tensor that broadcasts to ``(batch,
            heads, n, m)``, of any dtype, or a function of index tensors that is evaluated on some rows at a
            time, such as :func:`diagonal_prior`, :func:`window_prior` or :func:`uniform_prior`. A floating
            tensor gets a gradient where it requires one.
        reduction: as in :func:`attention_entropy`.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`.

    Raises:
        ValueError: shapes that do not fit, a mask of another form, or another reduction.
    """
    logits = as_products(query, key, options)
    if isinstance(prior, Tensor):
        if dense(prior, "prior").is_complex() or (prior.is_floating_point() and prior.dtype.itemsize < 2):
            floating(prior, "prior")
        one_device(query=logits.query, prior=prior)
        prior = _broadcast_prior(prior, logits.shape)
    elif not callable(prior):
        raise KindError(
            f"expected a prior that is a tensor or a function of index tensors, got {type(prior).__name__}: "
            "pass uniform_prior, say"
        )
    _check_reduction(reduction)
    return _reduce(*_rows(_Divergence(prior), logits), reduction)


def diagonal_prior(batch: Tensor, head: Tensor, position: Tensor, key: Tensor) -> Tensor:
    """All mass on the token itself."""
    return (key == position).float()


def uniform_prior(batch: Tensor, head: Tensor, position: Tensor, key: Tensor) -> Tensor:
    """The same mass on every visible key."""
    return torch.ones((1, 1, 1, 1), device=key.device)


def window_prior(width: int) -> PriorFunction:
    """The same mass on all visible keys fewer than ``width`` positions away.

    Raises:
        ValueError: a width below 1.
    """
    width = integer(width, "width")
    if width < 1:
        raise ValueError(f"expected a window of at least 1 position, got {width}: 1 is the token itself")

    def prior(batch: Tensor, head: Tensor, position: Tensor, key: Tensor) -> Tensor:
        return ((key - position).abs() < width).float()

    return prior


def _rows(measure: RowMeasure, logits: ProductLogits) -> tuple[Tensor, Tensor]:
    with full_precision(logits.device):
        with torch.no_grad():
            counted = logits.counted()
        return row_values(logits.without_padding(counted), counted.rows, measure)


def _reduce(values: Tensor, used: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return torch.where(used, values, math.nan)
    axes = (2,) if reduction == "sequence" else (0, 2)
    return values.sum(axes) / used.sum(axes)


def _check_reduction(reduction: object) -> None:
    if not isinstance(reduction, str) or reduction not in get_args(Reduction):
        raise ValueError(
            f"expected reduction to be 'sequence', 'batch' or 'none', got {reduction!r}: pass one of the three"
        )


def _broadcast_prior(prior: Tensor, full: tuple[int, ...]) -> Tensor:
    shape = (1,) * (4 - prior.dim()) + tuple(prior.shape)
    if prior.dim() > 4 or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise ValueError(
            f"expected a prior that broadcasts to (batch, heads, n, m) = {full}, got {tuple(prior.shape)}: "
            "one a sequence, (batch, n, m), becomes prior[:, None]"
        )
    return prior.reshape(shape).expand(-1, -1, full[2], full[3])


class _Entropy(RowMeasure):
    def __init__(self, normalized: bool) -> None:
        self._normalized = normalized

    def value(self, softmax: Softmax) -> tuple[Tensor, Tensor]:
        outcomes = self._outcomes(softmax)
        entropy = _entropy(softmax)
        if not self._normalized:
            return entropy, softmax.keys > 0
        return entropy / outcomes.log(), (outcomes > 1) & (softmax.keys > 0)

    def gradient(self, softmax: Softmax) -> RowGradient:
        entropy = _entropy(softmax)
        over = self._outcomes(softmax).log() if self._normalized else torch.ones_like(softmax.keys)
        by_sink = None
        if softmax.log_sink is not None:
            by_sink = -softmax.log_sink.exp() * (softmax.log_sink + entropy) / over
        by_logits = softmax.log_p + entropy[..., None]
        return RowGradient(by_logits.mul_(softmax.p).div_(-over[..., None]), by_sink)

    @staticmethod
    def _outcomes(softmax: Softmax) -> Tensor:
        return softmax.keys + (softmax.log_sink is not None)


def _entropy(softmax: Softmax) -> Tensor:
    entropy = -(softmax.p * softmax.log_p).sum(-1)
    if softmax.log_sink is not None:
        entropy = entropy - softmax.log_sink.exp() * softmax.log_sink
    return entropy


class _Divergence(RowMeasure):
    def __init__(self, prior: Tensor | PriorFunction | None) -> None:
        self._function = None if isinstance(prior, Tensor) else prior
        self.prior = prior if isinstance(prior, Tensor) else None

    def with_prior(self, prior: Tensor | None) -> _Divergence:
        return _Divergence(self._function if prior is None else prior)

    def value(self, softmax: Softmax) -> tuple[Tensor, Tensor]:
        mass, total = self._mass(softmax)
        value = torch.special.xlogy(mass, mass).sum(-1) - (mass * softmax.log_p).sum(-1)
        # Mass where the probability is 0 to all digits.
        lost = (softmax.log_p == torch.finfo(softmax.log_p.dtype).min) & (mass > 0)
        value = value.masked_fill(lost.any(-1), math.inf)
        return value, total != 0

    def gradient(self, softmax: Softmax) -> RowGradient:
        mass, total = self._mass(softmax)
        by_sink = None if softmax.log_sink is None else softmax.log_sink.exp()
        by_prior = None
        if self.prior is not None and self.prior.requires_grad:
            gap = torch.where(mass > 0, mass.log() - softmax.log_p, 0.0)
            mean = (mass * gap).sum(-1, keepdim=True)
            by_prior = softmax.hide((gap - mean).div_(torch.where(total == 0, 1.0, total)[..., None]))
        return RowGradient(softmax.p - mass, by_sink, by_prior)

    def _mass(self, softmax: Softmax) -> tuple[Tensor, Tensor]:
        """The prior over visible keys, normalized, and its sum before, ``(batch, heads, rows)``."""
        batch, heads, _, width = softmax.p.shape
        device = softmax.p.device
        if self.prior is not None:
            given = self.prior[:, :, softmax.rows, :width]
        else:
            assert self._function is not None  # one of the two
            given = self._function(
                torch.arange(batch, device=device)[:, None, None, None],
                torch.arange(heads, device=device)[:, None, None],
                softmax.position[:, None, :, None],
                torch.arange(width, device=device),
            )
            _check_function(given, softmax)
        # A copy of its own: it is written to.
        mass = softmax.hide(given.to(softmax.p.dtype) * torch.ones_like(softmax.p))
        total = mass.sum(-1)
        return mass.div_(torch.where(total == 0, 1.0, total)[..., None]), total


def _check_function(given: object, softmax: Softmax) -> None:
    full = tuple(softmax.p.shape)
    shape = tuple(given.shape) if isinstance(given, Tensor) else None
    sizes = zip(reversed(shape or ()), reversed(full), strict=False)
    if shape is None or len(shape) > 4 or any(have not in (1, want) for have, want in sizes):
        got = type(given).__name__ if shape is None else f"shape {shape}"
        raise ValueError(
            "expected the prior's function to return a tensor that broadcasts to (batch, heads, rows, keys) "
            f"= {full}, got {got}: index with the four tensors together"
        )
