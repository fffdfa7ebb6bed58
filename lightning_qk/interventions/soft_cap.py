"""Bound the logits of attention softly."""

import math
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.conventions import soft_cap
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.capture.registry import Run
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits, as_output
from lightning_qk.interventions.replaced import Replacements, dense_logits, weighted


def check_cap(cap: float) -> None:
    """Refuse a cap that is none.

    Raises:
        ValueError: it is not above 0 and finite.
    """
    if not (cap > 0 and math.isfinite(cap)):
        raise ValueError(f"expected a finite cap above 0, got {cap}")


def soft_capped_attention(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    value: Tensor | None = None,
    cap: float = math.inf,
    *,
    dropout: float = 0.0,
    training: bool = True,
    **options: Any,
) -> Tensor:
    """Softmax attention over ``cap · tanh(logits / cap)``; takes the memory of eager attention.

    Source: Gemma 2's soft cap (standard). Bias and mask are added after the cap.

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`~lightning_qk.functional.AttentionLogits` by itself.
        key: ``(batch, kv_heads, m, d_head)``.
        value: ``(batch, kv_heads, m, d_value)``.
        cap: bound of the logits' magnitude.
        dropout: share of the weights that are set to 0.
        training: whether dropout is applied.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`.

    Returns:
        ``(batch, heads, n, d_value)``.

    Raises:
        ValueError: a cap that is none, or shapes that do not fit.
    """
    check_cap(cap)
    logits, value = as_output(query, key, value, cast(AttentionOptions, options))
    x, visible = dense_logits(logits.replace(softcap=float(cap)))
    sinks = logits.sinks
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if visible is not None:
        x = x.masked_fill(~visible, torch.finfo(x.dtype).min)
    if sinks is not None:
        x = torch.cat([x, sinks.to(x.dtype).view(1, -1, 1, 1).expand(*x.shape[:3], 1)], -1)
    return weighted(x.softmax(-1)[..., : logits.shape[3]], value, dropout, training)


class SoftCapped:
    """Caps the logits of some modules' attention within it; a context manager.

    flex_attention takes the cap itself. In the place of any other function stands an own one, which takes the
    memory of eager attention, n × m for each head.

    Args:
        names: the attention modules, and the name of each.
        cap: bound of the logits' magnitude.
        cross: names of the layers whose keys are other tokens than the queries.
        model: what the modules are part of.

    Raises:
        ValueError: a cap that is none; a layer whose call does not pass through transformers' interface,
            cannot be read, or has a soft cap of its own.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        cap: float,
        *,
        cross: frozenset[str] = frozenset(),
        model: nn.Module | None = None,
    ) -> None:
        check_cap(cap)
        own = [
            name
            for module, name in names.items()
            if getattr(module, "attn_logit_softcapping", None) is not None
        ]
        if own:
            raise ValueError(f"expected attention without a soft cap of its own, got {', '.join(own[:3])}")
        self.cap = float(cap)
        self._cross = cross
        self._replacements = Replacements(self._compute, self._softmax)
        self.steering = AttentionInterceptor(names, self._wrap, replaces=True, model=model)

    def __enter__(self) -> "SoftCapped":
        self.steering.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.steering.remove()

    def _wrap(self, name: str, call: AttentionCall, run: Run) -> Any:
        if soft_cap(call) is not None:
            raise UnsupportedCallError("it has a soft cap of its own: leave it out with modules=")
        call_capped = call._replace(options={**call.options, "softcap": self.cap})
        flex = sys.modules.get("transformers.integrations.flex_attention")
        if call.function is getattr(flex, "flex_attention_forward", self):
            return run(call_capped)
        return run(call_capped._replace(function=self._replacements.of(call, is_cross=name in self._cross)))

    def _softmax(self, module: nn.Module, logits: ProductLogits, extra: Any) -> ProductLogits:
        return logits.replace(softcap=self.cap)

    def _compute(
        self, module: nn.Module, logits: ProductLogits, value: Tensor, dropout: float, extra: Any
    ) -> Tensor:
        return soft_capped_attention(
            logits, value=value, cap=self.cap, dropout=dropout, training=module.training
        )
