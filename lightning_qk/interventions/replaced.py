"""Put another attention in the place of a model's own, with the same masks, biases and dropout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.verify import OWN_SOFTMAX, attention_logits
from lightning_qk.functional.logits import ProductLogits

Compute = Callable[[nn.Module, ProductLogits, Tensor, float, Any], Tensor]
"""``compute(module, logits, value, dropout, extra)``: output ``(batch, heads, n, d_value)`` of one call."""

Softmax = Callable[[nn.Module, ProductLogits, Any], ProductLogits]
"""``softmax(module, logits, extra)``: the logits of the softmax in the output."""

EXTRA = "lightning_qk_extra"
"""Option of a call that is handed to both, such as what was drawn for it."""


class Replacements:
    """Attention functions that compute something else of what others get.

    Args:
        compute: what they compute, of logits with gradients and without a soft cap.
        softmax: what monitors measure of it; raises UnsupportedCallError where there is no softmax.
    """

    def __init__(self, compute: Compute, softmax: Softmax) -> None:
        self._compute = compute
        self._softmax = softmax
        # One object for one function: what a function computes is found out once for each.
        self._made: dict[Any, Callable[..., Any]] = {}

    def of(self, call: AttentionCall, *, is_cross: bool) -> Callable[..., Any]:
        """The function for calls like this one."""
        key = (call.function, call.implementation, is_cross)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, function: Any, implementation: str, is_cross: bool) -> Callable[..., Any]:
        def replaced(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> tuple[Tensor, None]:
            call = AttentionCall(module, query, key, value, mask, implementation, options, function)
            logits, value, extra = read(call)
            output = self._compute(module, logits, value, float(options.get("dropout") or 0.0), extra)
            return output.transpose(1, 2).contiguous(), None

        def read(call: AttentionCall) -> tuple[ProductLogits, Tensor, Any]:
            options = {name: value for name, value in call.options.items() if name not in ("softcap", EXTRA)}
            own = call._replace(options=options, function=function)
            logits, value = attention_logits(own, self_attention=not is_cross)
            if logits.query.shape != call.query.shape:
                raise UnsupportedCallError("its sequences are packed in one row: pad them instead")
            return logits.replace(softcap=None), value, call.options.get(EXTRA)

        def tell(call: AttentionCall) -> tuple[ProductLogits, Tensor]:
            logits, value, extra = read(call)
            return self._softmax(call.module, logits, extra), value

        setattr(replaced, OWN_SOFTMAX, tell)
        return replaced


def dense_logits(logits: ProductLogits) -> tuple[Tensor, Tensor | None]:
    """The whole map of logits, in the query's precision.

    Returns:
        Logits ``(batch, heads, n, m)`` with any value at hidden keys; which keys are visible, or None for all.
    """
    query, key, softcap = logits.query, logits.key, logits.softcap
    batch, heads, n, m = logits.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1]) @ key.mT
    x = grouped.reshape(batch, heads, n, m) * logits.scaling
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if logits.bias is not None:
        x = x + logits.bias
    rows = slice(0, n)
    visible = logits.visible(rows, logits.positions(rows), slice(0, m))
    if visible is not None and isinstance(logits.mask, Tensor) and logits.mask.dtype != torch.bool:
        x = x + torch.where(visible, logits.mask, 0.0)
    return x, visible


def weighted(weights: Tensor, value: Tensor, dropout: float, training: bool) -> Tensor:
    """Values summed with weights ``(batch, heads, n, m)``, which are dropped out first."""
    weights = nn.functional.dropout(weights.to(value.dtype), dropout, training)
    batch, heads, n, m = weights.shape
    kv_heads = value.shape[1]
    return (weights.reshape(batch, kv_heads, -1, m) @ value).reshape(batch, heads, n, -1)
