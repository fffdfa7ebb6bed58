"""Attention that takes one key a row, with the gradient of softmax attention."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qk.functional._streamed import RowGradient, RowSums, softmax_rows
from lightning_qk.functional.arguments import as_output
from lightning_qk.functional.checks import boolean
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits
from lightning_qk.functional.precision import at_least_float32, full_precision

if TYPE_CHECKING:
    from typing_extensions import Unpack


def hard_attention(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *positional: Any,
    training: bool = True,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""The value of each row's largest logit, ``o_i = v_j`` with ``j = argmax_j ω_ij`` over the visible keys.

    Values are gathered: there is no product with an n × m map, and the logits are computed some rows at a time.
    The backward pass is straight through: values get the gradient of what was taken, and the logits that of
    softmax attention, ``p_ij (∂L/∂o_i · v_j − Σ_k p_ik ∂L/∂o_i · v_k)``. Of equal logits one of the largest
    counts. Rows that see no key give zeros.

    Source: hard retrieval, arXiv 2009.14658 [S].

    Args:
        query: ``(batch, heads, n, d_head)`` as the attention function gets it, or an :class:`AttentionLogits`.
        key: ``(batch, kv_heads, m, d_head)``.
        value: ``(batch, kv_heads, m, d_value)``.
        positional: ``mask``, ``scaling`` and ``training`` by place, deprecated.
        training: whether there is a gradient at all.
        options: :class:`~lightning_qk.functional.AttentionOptions`. Learnt sinks take no part.

    Returns:
        ``(batch, heads, n, d_value)``, of the value's dtype.

    Raises:
        ValueError: shapes that do not fit, or a mask of another form.
    """
    if positional:
        names = ("mask", "scaling", "training")[: len(positional)]
        message = f"pass {', '.join(names)} of hard_attention by name"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        given: Any = dict(zip(names, positional, strict=True))
        training = given.pop("training", training)
        options = {**options, **given}
    logits, value = as_output(query, key, value, options)
    query, key = logits.query, logits.key
    boolean(training, "training")
    added = logits.mask if isinstance(logits.mask, Tensor) else None
    with torch.set_grad_enabled(training and torch.is_grad_enabled()):
        return _HardAttention.apply(query, key, value, logits.bias, added, logits)


class _HardAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        logits: ProductLogits,
    ) -> Tensor:
        batch, heads, n, m = logits.shape
        kv_heads, d_value = value.shape[1], value.shape[3]
        taken = torch.zeros(batch, heads, n, dtype=torch.long, device=query.device)
        sees = torch.ones(batch, heads, n, dtype=torch.bool, device=query.device)
        with full_precision(query.device):
            source = logits.wide()
            for rows in source.chunks(n) if m else ():
                chunk = source.chunk(rows, source.buffer(rows.stop - rows.start))
                if chunk.shown is not None:
                    chunk.logits[..., chunk.edge :].masked_fill_(chunk.shown == 0, -torch.inf)
                top, taken[:, :, rows] = chunk.logits.max(-1)
                sees[:, :, rows] = top != -torch.inf
        if not m:
            value, sees = value.new_zeros(batch, kv_heads, 1, d_value), torch.zeros_like(sees)
        index = taken.reshape(batch, kv_heads, heads // kv_heads * n, 1).expand(-1, -1, -1, d_value)
        output = value.gather(2, index).view(batch, heads, n, d_value)
        ctx.save_for_backward(query, key, value[:, :, :m], bias, mask, taken, sees)
        ctx.logits = logits.replace(
            query=query.new_empty(0),
            key=key.new_empty(0),
            bias=None,
            mask=None if mask is not None else logits.mask,
        )
        return torch.where(sees[..., None], output, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask, taken, sees = ctx.saved_tensors
        need_query, need_key, need_value, need_bias, need_mask, _ = ctx.needs_input_grad
        batch, heads, n, d_value = grad.shape
        kv_heads, m = value.shape[1:3]
        with torch.no_grad(), full_precision(query.device):
            source: ProductLogits = ctx.logits.replace(
                query=query,
                key=at_least_float32(key).contiguous(),
                bias=bias,
                mask=ctx.logits.mask if mask is None else mask,
            )
            grad = torch.where(sees[..., None], grad, 0.0).to(source.dtype)
            by_value = None
            if need_value:
                index = taken.reshape(batch, kv_heads, heads // kv_heads * n, 1).expand(-1, -1, -1, d_value)
                by_value = source.key.new_zeros(batch, kv_heads, m, d_value)
                if m:
                    by_value.scatter_add_(
                        2, index, grad.reshape(batch, kv_heads, heads // kv_heads * n, d_value)
                    )
                by_value = by_value.to(value.dtype)
            sums = RowSums(source, (need_query, need_key, need_bias, need_mask, False, False), None)
            if need_query or need_key or need_bias or need_mask:
                values = value.to(source.dtype).reshape(batch * kv_heads, m, d_value)
                for rows in source.chunks(n):
                    softmax = softmax_rows(source, rows, source.buffer(rows.stop - rows.start))
                    width = softmax.p.shape[-1]
                    part = grad[:, :, rows].reshape(batch * kv_heads, -1, d_value)
                    by_p = torch.bmm(part, values[:, :width].mT).view(softmax.p.shape)
                    by_p -= (softmax.p * by_p).sum(-1, keepdim=True)
                    used = sees[:, :, rows]
                    by_logits = RowGradient(by_p.mul_(softmax.p), None)
                    sums.add(softmax, by_logits, torch.ones_like(used, dtype=source.dtype), used)
            pairs = ((sums.query, query), (sums.key, key), (sums.bias, bias), (sums.mask, mask))
            by_query, by_key, by_bias, by_mask = (
                None if total is None or like is None else total.to(like.dtype) for total, like in pairs
            )
        return by_query, by_key, by_value, by_bias, by_mask, None
