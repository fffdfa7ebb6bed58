"""The call of an attention function, as it was made."""

from collections.abc import Callable, Mapping
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


class UnsupportedCallError(Exception):
    """An attention call whose softmax cannot be reconstructed; the message says why and what to do."""


class UnreadableFunctionError(UnsupportedCallError):
    """The attention function computes something else of its arguments; its own softmax may yet be observed."""
