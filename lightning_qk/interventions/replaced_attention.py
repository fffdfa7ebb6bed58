"""Other attention functions in place of a model's own, with the same masks, biases and dropout.

Hard, soft-capped.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.captured import OWN_SOFTMAX, attention_logits
from lightning_qk.capture.conventions import soft_cap
from lightning_qk.capture.intercept import AttentionInterceptor, Wrap
from lightning_qk.capture.registry import Run
from lightning_qk.functional.arguments import as_output
from lightning_qk.functional.hard_attention import hard_attention
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits
from lightning_qk.interventions.layers import Steered

if TYPE_CHECKING:
    from typing_extensions import Unpack

Compute = Callable[[nn.Module, ProductLogits, Tensor, float, Any], Tensor]
"""``compute(module, logits, value, dropout, extra)``: output ``(batch, heads, n, d_value)`` of one call."""

Softmax = Callable[[nn.Module, ProductLogits, Any], ProductLogits]
"""``softmax(module, logits, extra)``: the logits of the softmax in the output."""

EXTRA = "lightning_qk_extra"
"""Option of a call that is passed to both, such as what was drawn for it."""


class Replacements:
    """Makes attention functions that compute something else from the same arguments.

    Args:
        compute: their output, from logits with gradients and without a soft cap.
        softmax: what monitors measure; raises UnsupportedCallError where there is no softmax.
    """

    def __init__(self, compute: Compute, softmax: Softmax) -> None:
        self._compute = compute
        self._softmax = softmax
        # One object for each function: what a function computes is verified once for each.
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

        def measured(call: AttentionCall) -> tuple[ProductLogits, Tensor]:
            logits, value, extra = read(call)
            return self._softmax(call.module, logits, extra), value

        setattr(replaced, OWN_SOFTMAX, measured)
        return replaced


def dense_logits(logits: ProductLogits) -> tuple[Tensor, Tensor | None]:
    """The whole map of logits, in the query's precision.

    Returns:
        Logits ``(batch, heads, n, m)`` with any value at hidden keys; which keys are visible, or None for all.
    """
    query, key, softcap = logits.query, logits.key, logits.softcap
    kv_heads = key.shape[1]
    grouped = query.reshape(query.shape[0], kv_heads, -1, query.shape[-1]) @ key.mT
    x = grouped.reshape(logits.shape) * logits.scaling
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if logits.bias is not None:
        x = x + logits.bias
    visible = visible_keys(logits)
    if visible is not None and isinstance(logits.mask, Tensor) and logits.mask.dtype != torch.bool:
        x = x + torch.where(visible, logits.mask, 0.0)
    return x, visible


def visible_keys(logits: ProductLogits) -> Tensor | None:
    """Which keys each row sees, ``(batch|1, heads|1, n, m)``; None for all."""
    _, _, n, m = logits.shape
    rows = slice(0, n)
    return logits.visible(rows, logits.positions(rows), slice(0, m))


def weighted(weights: Tensor, value: Tensor, dropout: float, training: bool) -> Tensor:
    """Values summed with weights ``(batch, heads, n, m)``, after dropout."""
    weights = nn.functional.dropout(weights.to(value.dtype), dropout, training)
    batch, heads, n, m = weights.shape
    return (weights.reshape(batch, value.shape[1], -1, m) @ value).reshape(batch, heads, n, -1)


def check_cap(cap: float) -> None:
    """Raise ValueError unless the cap is positive and finite."""
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
    **options: Unpack[AttentionOptions],
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
        options: :class:`~lightning_qk.functional.AttentionOptions`.

    Returns:
        ``(batch, heads, n, d_value)``.

    Raises:
        ValueError: a cap that is not positive and finite, or shapes that do not fit.
    """
    check_cap(cap)
    logits, value = as_output(query, key, value, options)
    x, visible = dense_logits(logits.replace(softcap=float(cap)))
    sinks = logits.sinks
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if visible is not None:
        x = x.masked_fill(~visible, torch.finfo(x.dtype).min)
    if sinks is not None:
        x = torch.cat([x, sinks.to(x.dtype).view(1, -1, 1, 1).expand(*x.shape[:3], 1)], -1)
    return weighted(x.softmax(-1)[..., : logits.shape[3]], value, dropout, training)


class Replaced(Steered, ABC):
    """Exchanges the attention function of some modules; see the subclasses."""

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        *,
        cross: frozenset[str] = frozenset(),
        model: nn.Module | None = None,
        idle: Wrap | None = None,
    ) -> None:
        self._cross = cross
        self._replacements = Replacements(self._compute, self._softmax)
        self.steering = AttentionInterceptor(names, self._wrap, replaces=True, model=model, idle=idle)

    def _wrap(self, name: str, call: AttentionCall, run: Run) -> Any:
        return run(self._exchanged(name, call, {}))

    def _exchanged(
        self,
        name: str,
        call: AttentionCall,
        options: Mapping[str, Any],
        own_cap: str = "its logits are soft-capped",
    ) -> AttentionCall:
        """The call with the other function, and with more options."""
        if soft_cap(call) is not None:
            raise UnsupportedCallError(f"{own_cap}: leave it out with modules=")
        function = self._replacements.of(call, is_cross=name in self._cross)
        return call._replace(function=function, options={**call.options, **options})

    @abstractmethod
    def _softmax(self, module: nn.Module, logits: ProductLogits, extra: Any) -> ProductLogits:
        """The logits of the softmax in the output."""

    @abstractmethod
    def _compute(
        self, module: nn.Module, logits: ProductLogits, value: Tensor, dropout: float, extra: Any
    ) -> Tensor:
        """The output of one call."""


class SoftCapped(Replaced):
    """Caps the logits of some modules' attention within it; a context manager.

    flex_attention takes the cap itself. Any other function is replaced by :func:`soft_capped_attention`, which
    takes the memory of eager attention, n × m for each head.

    Args:
        names: the attention modules, and the name of each.
        cap: bound of the logits' magnitude.
        cross: names of the layers whose keys are other tokens than the queries.
        model: the model that contains the modules.

    Raises:
        ValueError: a cap that is not positive and finite; a layer whose call does not pass through transformers'
            interface, cannot be read, or has a soft cap of its own.
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
        super().__init__(names, cross=cross, model=model)

    def _wrap(self, name: str, call: AttentionCall, run: Run) -> Any:
        exchanged = self._exchanged(name, call, {"softcap": self.cap}, "it has a soft cap of its own")
        flex = sys.modules.get("transformers.integrations.flex_attention")
        takes_cap = call.function is getattr(flex, "flex_attention_forward", self)
        return run(exchanged._replace(function=call.function) if takes_cap else exchanged)

    def _softmax(self, module: nn.Module, logits: ProductLogits, extra: Any) -> ProductLogits:
        return logits.replace(softcap=self.cap)

    def _compute(
        self, module: nn.Module, logits: ProductLogits, value: Tensor, dropout: float, extra: Any
    ) -> Tensor:
        return soft_capped_attention(
            logits, value=value, cap=self.cap, dropout=dropout, training=module.training
        )


class HardRetrieval(Replaced):
    """Makes the attention of some modules hard within it; a context manager.

    See :func:`~lightning_qk.functional.hard_attention`. Dropout of attention weights is not applied: a row has
    one key only. Monitors leave these layers out, since there is no softmax in the forward pass.

    Args:
        names: the attention modules, and the name of each.
        cross: names of the layers whose keys are other tokens than the queries.
        model: the model that contains the modules.

    Raises:
        ValueError: a layer whose call does not pass through transformers' interface, cannot be read, or has
            learnt sinks.
    """

    def _softmax(self, module: nn.Module, logits: ProductLogits, extra: Any) -> ProductLogits:
        raise UnsupportedCallError(
            "hard attention takes one key of each row, without a softmax: it has no statistics"
        )

    def _compute(
        self, module: nn.Module, logits: ProductLogits, value: Tensor, dropout: float, extra: Any
    ) -> Tensor:
        if logits.sinks is not None:
            raise UnsupportedCallError("it has a learnt sink, which is no key: leave it out with modules=")
        return hard_attention(logits, value=value, training=True)
