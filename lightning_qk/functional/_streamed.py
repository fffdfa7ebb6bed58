"""Values of attention rows with gradients, by chunks: the map is computed twice and never kept."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.logits import ProductLogits
from lightning_qk.functional.precision import at_least_float32, full_precision


# Zero times the least number is zero, zero times minus infinity is not a number.
def _least_log(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


class Softmax(NamedTuple):
    """Softmax of some query rows.

    Attributes:
        log_p: logarithms of the probabilities, ``(batch, heads, rows, keys)``; 0 where a key is hidden.
        p: probabilities, 0 where a key is hidden.
        shown: 1 where a key is visible and 0 where not, of the keys from ``edge`` on; None: all are.
        edge: how many leading keys every row sees.
        keys: how many keys each row sees, ``(batch|1, heads|1, rows)``.
        position: of the rows on the axis of the keys, ``(batch|1, rows)``.
        rows: which rows these are.
        log_sink: logarithm of the learnt sink's probability, ``(batch, heads, rows)``, or None.
    """

    log_p: Tensor
    p: Tensor
    shown: Tensor | None
    edge: int
    keys: Tensor
    position: Tensor
    rows: slice
    log_sink: Tensor | None

    def hide(self, tensor: Tensor) -> Tensor:
        """Sets a tensor of the probabilities' shape to zero where a key is hidden, in place."""
        if self.shown is not None:
            tensor[..., self.edge :].mul_(self.shown)
        return tensor


class RowGradient(NamedTuple):
    """Derivatives of a value of each row.

    Attributes:
        logits: by the row's logits, ``(batch, heads, rows, keys)``, 0 where a key is hidden.
        sinks: by the learnt sink's logit, ``(batch, heads, rows)``, or None.
        prior: by the given prior, broadcast to the logits' shape, or None.
    """

    logits: Tensor
    sinks: Tensor | None
    prior: Tensor | None = None


class RowMeasure(ABC):
    """One number of each attention row, and its derivative."""

    prior: Tensor | None = None
    """What the measure compares with, ``(batch|1, heads|1, n, m)``, where that is a tensor."""

    @abstractmethod
    def value(self, softmax: Softmax) -> tuple[Tensor, Tensor]:
        """Values ``(batch, heads, rows)``, and which rows have one, boolean and broadcastable."""

    @abstractmethod
    def gradient(self, softmax: Softmax) -> RowGradient:
        """Derivatives of the values. Rows without one may hold anything."""

    def with_prior(self, prior: Tensor | None) -> "RowMeasure":
        """The same measure with another tensor as its prior."""
        return self


def softmax_rows(logits: ProductLogits, rows: slice, buffer: Tensor) -> Softmax:
    """Softmax of some rows; the logits' key is contiguous and float32 at least."""
    chunk = logits.chunk(rows, buffer)
    x = chunk.logits
    hidden = None if chunk.shown is None else chunk.shown == 0
    if hidden is not None:
        x[..., chunk.edge :].masked_fill_(hidden, -torch.inf)
    top = x.amax(-1)
    if chunk.sinks is not None:
        top = torch.maximum(top, chunk.sinks)
    # A row that sees no key has no maximum; its values are never used.
    top = torch.where(top == -torch.inf, 0.0, top)
    x -= top[..., None]
    p = x.exp()
    total = p.sum(-1)
    if chunk.sinks is not None:
        total = total + (chunk.sinks - top).exp()
    total = torch.where(total == 0, 1.0, total)
    log_total = total.log()
    log_p = x.sub_(log_total[..., None])
    if hidden is not None:
        log_p[..., chunk.edge :].masked_fill_(hidden, 0.0)
    p /= total[..., None]
    log_sink = None if chunk.sinks is None else chunk.sinks - top - log_total
    return Softmax(
        log_p.clamp_(min=_least_log(log_p.dtype)),
        p,
        chunk.shown,
        chunk.edge,
        chunk.keys,
        chunk.position,
        rows,
        log_sink,
    )


def row_values(logits: ProductLogits, valid: Tensor, measure: RowMeasure) -> tuple[Tensor, Tensor]:
    """A measure of every row, differentiable; ``valid``: rows that count, ``(batch, n)``.

    Returns:
        Values ``(batch, heads, n)``, 0 where a row has none, and which rows have one, boolean of that shape.
    """
    mask = logits.mask if isinstance(logits.mask, Tensor) else None
    return _RowValues.apply(
        logits.query, logits.key, logits.bias, mask, logits.sinks, measure.prior, valid, logits, measure
    )


class _RowValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        prior: Tensor | None,
        valid: Tensor,
        logits: ProductLogits,
        measure: RowMeasure,
    ) -> tuple[Tensor, Tensor]:
        with full_precision(query.device):
            source = _filled(logits, query, key, bias, mask, sinks)
            measure = measure.with_prior(prior)
            batch, heads, n, _ = source.shape
            values = source.key.new_zeros(batch, heads, n)
            used = torch.zeros(batch, heads, n, dtype=torch.bool, device=query.device)
            for rows in source.chunks(n):
                softmax = softmax_rows(source, rows, source.buffer(rows.stop - rows.start))
                value, has_value = measure.value(softmax)
                has_value = has_value & valid[:, None, rows]
                used[:, :, rows] = has_value
                values[:, :, rows] = torch.where(has_value, value, 0.0)
        ctx.save_for_backward(query, key, bias, mask, sinks, prior, used)
        # Tensors only among what is saved, so that hooks (of checkpoints, of offloading) see them all.
        ctx.logits = logits.replace(
            query=query.new_empty(0),
            key=key.new_empty(0),
            bias=None,
            mask=None if mask is not None else logits.mask,
            sinks=None,
        )
        ctx.measure = measure.with_prior(None)
        ctx.mark_non_differentiable(used)
        return values, used

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, bias, mask, sinks, prior, used = ctx.saved_tensors
        with torch.no_grad(), full_precision(query.device):
            source = _filled(ctx.logits, query, key, bias, mask, sinks)
            measure = ctx.measure.with_prior(prior)
            needs = ctx.needs_input_grad
            sums = RowSums(source, needs, prior)
            for rows in source.chunks(source.shape[2]):
                softmax = softmax_rows(source, rows, source.buffer(rows.stop - rows.start))
                factor = torch.where(used[:, :, rows], grad[:, :, rows], 0.0).to(source.dtype)
                sums.add(softmax, measure.gradient(softmax), factor, used[:, :, rows])
            found = (sums.query, sums.key, sums.bias, sums.mask, sums.sinks, sums.prior)
            given = (query, key, bias, mask, sinks, prior)
            out = [
                None if total is None or like is None else total.to(like.dtype)
                for total, like in zip(found, given, strict=True)
            ]
        return (*out, None, None, None)


def _filled(
    logits: ProductLogits,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
) -> ProductLogits:
    return logits.replace(
        query=query,
        key=at_least_float32(key).contiguous(),
        bias=bias,
        mask=logits.mask if mask is None else mask,
        sinks=sinks,
    )


class RowSums:
    """Gradients of the inputs, added up over chunks."""

    def __init__(self, source: ProductLogits, needs: tuple[bool, ...], prior: Tensor | None) -> None:
        self._source = source
        self.query = source.key.new_zeros(source.query.shape) if needs[0] else None
        self.key = source.key.new_zeros(source.key.shape) if needs[1] else None
        self.bias = self._like(source.bias, needs[2])
        self.mask = self._like(source.mask if isinstance(source.mask, Tensor) else None, needs[3])
        self.sinks = self._like(source.sinks, needs[4])
        self.prior = self._like(prior, needs[5])

    def _like(self, tensor: Tensor | None, is_needed: bool) -> Tensor | None:
        return self._source.key.new_zeros(tensor.shape) if tensor is not None and is_needed else None

    def add(self, softmax: Softmax, gradient: RowGradient, factor: Tensor, used: Tensor) -> None:
        """Add one chunk: ``factor`` is the gradient of each row's value, 0 where a row has none."""
        rows, source = softmax.rows, self._source
        by_logits = gradient.logits.mul_(factor[..., None])
        # Zero times what such a row holds need not be zero.
        by_logits.masked_fill_(~used[..., None], 0.0)
        width = by_logits.shape[-1]
        if self.sinks is not None and gradient.sinks is not None:
            part = torch.where(used, gradient.sinks * factor, 0.0)
            self.sinks += part.sum((0, 2)).view_as(self.sinks)
        if self.prior is not None and gradient.prior is not None:
            part = torch.where(used[..., None], gradient.prior * factor[..., None], 0.0)
            self.prior[:, :, rows, :width] += _reduced(part, self.prior)
        for total in (self.bias, self.mask):
            if total is not None:
                total[:, :, rows, :width] += _reduced(by_logits, total)
        if source.softcap is not None:
            uncapped = source.replace(bias=None, mask=None)
            capped = (
                uncapped.chunk(rows, source.buffer(rows.stop - rows.start)).logits[..., :width]
                / source.softcap
            )
            by_logits *= 1 - capped.square()
        batch, heads, count, _ = by_logits.shape
        kv_heads = source.key.shape[1]
        grouped = by_logits.view(batch * kv_heads, heads // kv_heads * count, width) * source.scaling
        if self.query is not None:
            keys = source.key[:, :, :width].reshape(-1, width, source.key.shape[-1])
            self.query[:, :, rows] = torch.bmm(grouped, keys).view(batch, heads, count, -1)
        if self.key is not None:
            queries = source.query[:, :, rows].to(source.dtype).reshape(*grouped.shape[:2], -1)
            product = torch.bmm(grouped.mT, queries)
            self.key[:, :, :width] += product.view(batch, kv_heads, width, -1)


def _reduced(part: Tensor, like: Tensor) -> Tensor:
    """Summed over the batch and the heads where the target has one of them for all."""
    axes = [axis for axis in (0, 1) if like.shape[axis] == 1 and part.shape[axis] > 1]
    return part.sum(axes, keepdim=True) if axes else part
