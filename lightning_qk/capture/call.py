"""The call of an attention function, as it was made."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_POSITIONAL = ("module", "query", "key", "value", "attention_mask")


class UnsupportedCallError(Exception):
    """An attention call whose softmax cannot be reconstructed; the message says why and what to do."""


class UnreadableFunctionError(UnsupportedCallError):
    """The attention function computes something else of its arguments; its own softmax may yet be observed."""


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
        inputs: what the layer projects to query and key, where the hook has it: torch's MultiheadAttention.
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


def read_call(
    function: Callable[..., Any], implementation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AttentionCall:
    """Name the arguments of a call to an attention function.

    The first five are the interface's own and mostly come by position; models pass the rest by name, and what
    comes by position beyond five is named by the function's signature.
    """
    named = dict(zip(_POSITIONAL, args, strict=False))
    if len(args) > len(_POSITIONAL):
        parameters = list(inspect.signature(function).parameters)
        named.update(zip(parameters[len(_POSITIONAL) :], args[len(_POSITIONAL) :], strict=False))
    named.update(kwargs)
    try:
        module, query, key, value = (named.pop(name) for name in _POSITIONAL[:4])
    except KeyError as error:
        raise UnsupportedCallError(f"its attention function is called without {error}") from error
    return AttentionCall(
        module, query, key, value, named.pop("attention_mask", None), implementation, named, function
    )


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: gradient checkpointing's second one."""
    return torch._C._current_graph_task_id() != -1
