"""One attention call, or one softmax, as it was made."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn


class AttentionCall(NamedTuple):
    """What an attention function was called with.

    Attributes:
        module: the attention layer.
        query: after rotary encoding and norms, shape ``(batch, heads, n, d_head)``.
        key: shape ``(batch, kv_heads, m, d_head)``.
        value: shape ``(batch, kv_heads, m, d_value)``.
        attention_mask: as the implementation takes it; its meaning depends on ``implementation``.
        implementation: name in the model's config: ``"eager"``, ``"sdpa"``, ...
        options: the other arguments (``scaling``, ``dropout``, ``is_causal``, ``softcap``, ...).
        function: what was called, by which the meaning of the arguments can be found out; None where only the
            implementation's name is known.
        inputs: what the layer projects to query and key, where whoever captured the call has it: torch's
            MultiheadAttention.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Any
    implementation: str
    options: Mapping[str, Any]
    function: Callable[..., Any] | None = None
    inputs: tuple[Tensor, ...] = ()


class SoftmaxCall(NamedTuple):
    """The softmax of attention that a layer computes itself.

    Attributes:
        module: the attention layer.
        logits: what the softmax gets, masks and biases included; its last two axes are queries and keys,
            ``(..., n, m)``. How heads and sequences lie before them:
            :func:`~lightning_qk.capture.statistics.by_head`.
        d_head: width of the vectors whose products the logits are.
        relative: rows are known up to a constant, since the layer subtracted their maximum.
        sinks: how many of the last columns, 0 or 1, are no keys but a learnt sink's logit.
        implementation: ``"softmax"``.
        options: nothing.
        operands: queries ``(..., n, d)`` and keys ``(..., m, d)`` whose products the logits are, as the layer
            multiplied them; None unless the capture asked for them.
    """

    module: nn.Module
    logits: Tensor
    d_head: int
    relative: bool = False
    sinks: int = 0
    implementation: str = "softmax"
    options: Mapping[str, Any] = MappingProxyType({})
    operands: tuple[Tensor, Tensor] | None = None


class UnsupportedCallError(Exception):
    """An attention call whose softmax cannot be reconstructed; the message says why and what to do."""


class UnreadableFunctionError(UnsupportedCallError):
    """The attention function computes something else of its arguments; its own softmax may yet be observed."""
