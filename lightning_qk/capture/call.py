"""What the call of an attention function means: its logits."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_qk.capture.readings import (
    EAGER,
    FLASH,
    FLEX,
    SDPA,
    Reading,
    read_logits,
)
from lightning_qk.capture.record import AttentionCall, UnsupportedCallError
from lightning_qk.capture.verify import verified_reading
from lightning_qk.functional.logits import ProductLogits

OWN_SOFTMAX = "_lightning_qk_softmax"
"""Attribute of an attention function that says what softmax it takes: ``tell(call)`` gives the logits, with
gradients, and the values."""

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
    return AttentionCall(
        module, query, key, value, named.pop("attention_mask", None), implementation, named, function
    )


def attention_logits(call: AttentionCall, *, self_attention: bool | None) -> tuple[ProductLogits, Any]:
    """The logits of a call, with tensors that gradients flow through, and the value of their keys.

    transformers' own sdpa and flex functions are read as their sources say. Any other function, models' own eager
    ones and flash attention among them, is called once more at the first call of each module to find out what
    it computes: see :mod:`lightning_qk.capture.verify`.

    Args:
        call: what the attention function received.
        self_attention: whether queries and keys are the same tokens; None where unknown.

    Raises:
        UnsupportedCallError: the function's softmax cannot be reconstructed.
    """
    tell = getattr(call.function, OWN_SOFTMAX, None)
    if tell is not None:
        logits, value = tell(call)
        n, m = logits.shape[2:]
        return logits.replace(self_attention=n == m if self_attention is None else self_attention), value
    return read_logits(call, _reading(call), self_attention=self_attention)


def _reading(call: AttentionCall) -> Reading:
    name = call.implementation
    if name.startswith("paged|") or any(
        call.options.get(key) is not None for key in ("cache", "block_table")
    ):
        raise UnsupportedCallError(
            f"attention implementation {name!r} takes its keys from a paged cache: generate without continuous "
            'batching, or load the model with attn_implementation="sdpa"'
        )
    if call.function is not None:
        for known, (module, attribute) in _LIBRARY.items():
            if call.function is getattr(sys.modules.get(module), attribute, None):
                return known
        return verified_reading(call)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if "flash" in name:
        return FLASH
    raise UnsupportedCallError(
        f"attention implementation {name!r} is not known and its function not at hand: load the model with "
        'attn_implementation="sdpa" or "eager"'
    )


_LIBRARY = {
    SDPA: ("transformers.integrations.sdpa_attention", "sdpa_attention_forward"),
    FLEX: ("transformers.integrations.flex_attention", "flex_attention_forward"),
}
_BY_NAME = {"eager": EAGER, "sdpa": SDPA, "flex_attention": FLEX}


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass: gradient checkpointing's second one."""
    return torch._C._current_graph_task_id() != -1
