"""One attention call, and what it means for the statistics."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class AttentionCall(NamedTuple):
    """What a transformers attention function was called with.

    Attributes:
        module: the attention layer.
        query: after rotary encoding and norms, shape ``(batch, heads, n, d_head)``.
        key: shape ``(batch, kv_heads, m, d_head)``.
        value: shape ``(batch, kv_heads, m, d_value)``.
        attention_mask: as the implementation takes it; its meaning depends on ``implementation``.
        implementation: name in the model's config: ``"eager"``, ``"sdpa"``, ...
        options: the other arguments (``scaling``, ``dropout``, ``is_causal``, ``softcap``, ...).
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Any
    implementation: str
    options: Mapping[str, Any]


class UnsupportedCallError(Exception):
    """An attention call whose softmax cannot be reconstructed; the message says why and what to do."""


_POSITIONAL = ("module", "query", "key", "value", "attention_mask")


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
    return AttentionCall(module, query, key, value, named.pop("attention_mask", None), implementation, named)


def statistics_arguments(call: AttentionCall, *, self_attention: bool | None) -> dict[str, Any]:
    """Arguments of :func:`~lightning_qk.functional.attention_statistics` for the softmax of a call.

    Args:
        call: what the attention function received.
        self_attention: whether queries and keys are the same tokens; None where unknown.

    Raises:
        UnsupportedCallError: the implementation's mask is of a form that is not known here.
    """
    if call.implementation not in ("eager", "sdpa"):
        raise UnsupportedCallError(
            f"attention implementation {call.implementation!r} is not captured: load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    options = call.options
    n, m = call.query.shape[2], call.key.shape[2]
    key, mask = call.key, call.attention_mask
    is_causal = False
    if mask is None and call.implementation == "sdpa":
        # As transformers' sdpa function decides, which cuts the keys to the queries when it is causal.
        asked = options.get("is_causal")
        is_causal = bool(getattr(call.module, "is_causal", True) if asked is None else asked) and n > 1
        if is_causal and m > n:
            key, m = key[:, :, :n], n
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedCallError(f"expected a mask of four dimensions, got {shape}")
        mask = mask.detach()[..., :m]
    sinks = options.get("s_aux")
    if sinks is None:
        sinks = getattr(call.module, "sinks", None)
    bias = options.get("position_bias")
    return {
        "query": call.query.detach(),
        "key": key.detach(),
        "mask": mask,
        "is_causal": is_causal,
        "scaling": options.get("scaling"),
        "softcap": options.get("softcap"),
        "bias": None if bias is None else bias.detach()[..., :m],
        "sinks": None if not isinstance(sinks, Tensor) else sinks.detach(),
        # With a cache the queries are the newest of the keys' tokens.
        "query_offset": m - n if n < m and self_attention else 0,
        "self_attention": self_attention,
    }


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: gradient checkpointing's second one."""
    return torch._C._current_graph_task_id() != -1
