"""Patches torch.nn.MultiheadAttention, and the encoder layer that computes it in one fused operator."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qk.capture import registry
from lightning_qk.capture.captured import Arguments, FunctionCall, sdpa_call
from lightning_qk.capture.hooks import compiled
from lightning_qk.capture.hooks.patch import Patch, patch
from lightning_qk.capture.registry import STATE


def patch_multihead(modules: Iterable[nn.Module]) -> Iterator[Callable[[], None]]:
    """Patch the forward of these nn.MultiheadAttention; yields functions that undo one patch each."""
    kinds: set[type] = {nn.MultiheadAttention}
    for module in modules:
        if hasattr(module, "linear_Q"):  # quantization's subclass computes on its own
            kinds.add(next(base for base in type(module).__mro__ if "forward" in vars(base)))
    for kind in kinds:
        yield patch(kind, "forward", _tap)
    yield patch(nn.TransformerEncoderLayer, "forward", _tap_encoder_layer)


def _tap(function: Callable[..., Any], own: Patch) -> Callable[..., Any]:
    source = compiled.source_number(None, "sdpa", _read_call)

    @functools.wraps(function)
    def tapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if own.active:
            if torch.compiler.is_dynamo_compiling():
                if compiled.is_read(STATE):
                    module = compiled.identity(self)
                    if module is not None:
                        _emit(module, source, *args, **kwargs)
                    if STATE.sdpa:
                        compiled.enter(None)
                        output = function(self, *args, **kwargs)
                        compiled.leave()
                        return output
            elif STATE.capturing and registry.is_free():
                _deliver(self, args, kwargs)
                with registry.mute():
                    return function(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    return tapped


def _emit(
    module: Tensor,
    source: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **unknown: Any,
) -> None:
    """Hand the inputs out of a graph: they are projected outside, on measured steps alone. Traced."""
    if query.is_nested or key.is_nested:
        compiled.emit_problem(module, _NESTED)
        return
    masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    flags = {"need_weights": need_weights, "is_causal": is_causal}
    compiled.emit(module, source, (query, key, value), {**masks, **flags})


def _read_call(module: Any, *args: Any, **kwargs: Any) -> FunctionCall:
    query = args[0] if args else kwargs["query"]
    key = args[1] if len(args) > 1 else kwargs["key"]
    return sdpa_call(module, read_multihead(module, *args, **kwargs), inputs=(query, key))


@torch.compiler.disable
def _deliver(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if registry.is_watched(module):
        registry.deliver(module, lambda: _read_call(module, *args, **kwargs))


def _tap_encoder_layer(function: Callable[..., Any], own: Patch) -> Callable[..., Any]:
    # In evaluation without gradients the layer may run as one operator, without its attention's forward.
    signature = inspect.signature(function)

    @functools.wraps(function)
    def tapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (own.active and STATE.capturing) or self.training or torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        before = registry.delivered()
        output = function(self, *args, **kwargs)
        if registry.delivered() == before and registry.is_watched(self.self_attn):
            _deliver_fused(self, signature.bind(self, *args, **kwargs).arguments)
        return output

    return tapped


@torch.compiler.disable
def _deliver_fused(layer: Any, arguments: dict[str, Any]) -> None:
    attention = layer.self_attn

    def read() -> FunctionCall:
        source, mask = arguments["src"], arguments.get("src_mask")
        padding = arguments.get("src_key_padding_mask")
        if source.is_nested:  # nn.TransformerEncoder took the padding out
            lengths = torch.tensor([len(part) for part in source.unbind()], device=source.device)
            source = source.to_padded_tensor(0.0)
            padding = torch.arange(source.shape[1], device=source.device) >= lengths[:, None]
        if layer.norm_first:
            source = layer.norm1(source)
        found = read_multihead(attention, source, source, source, padding, attn_mask=mask)
        return sdpa_call(attention, found, inputs=(source, source))

    registry.deliver(attention, read)


_NESTED = "nn.MultiheadAttention gets nested tensors, which are not captured: pad the sequences"


def read_multihead(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **unknown: Any,
) -> Arguments | str:
    """Arguments of the module's forward as attention over its projected heads.

    Returns:
        The arguments, or why that cannot be had.
    """
    if query.is_nested or key.is_nested:
        return _NESTED
    if module.bias_k is not None or module.add_zero_attn:
        return (
            "nn.MultiheadAttention with add_bias_kv or add_zero_attn attends to a key that is no token: build it "
            "without them to have it measured"
        )
    if query.dim() == 2:
        query, key, value = query[None], key[None], value[None]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
    elif not module.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    heads = module.num_heads
    q, k, v = (
        rows.unflatten(-1, (heads, -1)).transpose(1, 2) for rows in _project(module, query, key, value)
    )
    batch, n, m = q.shape[0], q.shape[2], k.shape[2]
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None  # as torch does: the hint stands for the mask
    else:
        is_causal = False
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(batch, heads, n, m)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    if is_causal and m > n:
        k, v = k[:, :, :n], v[:, :, :n]
    options = {"scaling": None, "is_causal": is_causal and n > 1}
    return (q, k, v, _merge(attn_mask, key_padding_mask, q.dtype)), options


def read_functional(*args: Any, **kwargs: Any) -> Arguments | str:
    """As :func:`read_multihead`, of a call of torch.nn.functional.multi_head_attention_forward."""
    given = _FUNCTIONAL.bind(*args, **kwargs)
    given.apply_defaults()
    named = SimpleNamespace(**given.arguments, batch_first=False)
    if named.static_k is not None or named.static_v is not None:
        return "multi_head_attention_forward gets static keys, which are not captured: pass them as tokens"
    if named.use_separate_proj_weight:
        named.in_proj_weight = None
    return read_multihead(
        named,
        named.query,
        named.key,
        named.value,
        named.key_padding_mask,
        named.need_weights,
        named.attn_mask,
        is_causal=named.is_causal,
    )


_FUNCTIONAL = inspect.signature(F.multi_head_attention_forward)


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if hasattr(module, "linear_Q"):
        return module.linear_Q(query), module.linear_K(key), module.linear_V(value)
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return (
        F.linear(query, weights[0], biases[0]),
        F.linear(key, weights[1], biases[1]),
        F.linear(value, weights[2], biases[2]),
    )


def _merge(mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One mask of the module's two, in which True means *not* seen."""
    given = [part for part in (mask, padding) if part is not None]
    if not given:
        return None
    if all(part.dtype == torch.bool for part in given):
        hidden = given[0] if len(given) == 1 else given[0] | given[1]
        return ~hidden
    added = [_additive(part, dtype) for part in given]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _additive(part: Tensor, dtype: torch.dtype) -> Tensor:
    if part.dtype != torch.bool:
        return part
    return torch.zeros_like(part, dtype=dtype).masked_fill(part, float("-inf"))
