"""The rotation that an attention layer applies, found in the model's own rotary module."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.functional.rotary import Rotary


def read_rotary(module: nn.Module, ancestors: Sequence[nn.Module], config: Any, d_head: int) -> Rotary | None:
    """Find the frequencies and the pairing that a layer rotates with.

    A layer rotates if its forward calls a function named like ``apply_rotary_pos_emb``; the pairing is found
    by calling that function on one coordinate. The frequencies are the live buffer of the nearest rotary
    module among the layer's ancestors, of the layer's own type where a model has several.

    Args:
        module: the attention layer.
        ancestors: the modules that contain it, nearest first.
        config: the nearest configuration, or None.
        d_head: width of a head.

    Returns:
        The rotation, or None where the layer does not rotate, or not by one position in a sequence (images).
    """
    apply = _rotary_function(module)
    if apply is None or getattr(module, "use_rope", True) in (False, 0):
        return None
    inv_freq = _frequencies(module, ancestors, _layer_type(module, ancestors, config))
    if inv_freq is None or 2 * inv_freq.numel() not in _rotated_widths(module, config, d_head):
        return None
    interleaved = _is_interleaved(apply, d_head, 2 * inv_freq.numel())
    return None if interleaved is None else Rotary(inv_freq, interleaved)


def _rotary_function(module: nn.Module) -> Callable[..., Any] | None:
    forward = type(module).forward
    # Decorators hide the function that names what it calls.
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    for name in code.co_names if code is not None else ():
        if name.startswith("apply_") and "rotary" in name and "vision" not in name:
            found = forward.__globals__.get(name)
            if callable(found):
                return found
    return None


def _layer_type(module: nn.Module, ancestors: Sequence[nn.Module], config: Any) -> str | None:
    for owner in (module, *ancestors[:1]):
        for name in ("layer_type", "attention_type"):
            value = getattr(owner, name, None)
            if isinstance(value, str):
                return value
    index, types = getattr(module, "layer_idx", None), getattr(config, "layer_types", None)
    if isinstance(index, int) and types is not None and index < len(types):
        return types[index]
    return None


def _frequencies(module: nn.Module, ancestors: Sequence[nn.Module], layer_type: str | None) -> Tensor | None:
    """The 1-D ``inv_freq`` buffer that is nearest to the layer and of its type."""
    for owner in (module, *ancestors):
        children = dict(owner.named_children())
        holders = [child for name, child in children.items() if "rotary" in name or "rope" in name]
        if layer_type == "sliding_attention" and "rotary_emb_local" in children:
            # transformers before 5 kept a second module for the local layers.
            holders = [children["rotary_emb_local"]]
        for holder in holders:
            buffers = dict(holder.named_buffers(recurse=False))
            found = buffers.get(f"{layer_type}_inv_freq", buffers.get("inv_freq"))
            if found is not None and found.dim() == 1:
                return found
    return None


def _rotated_widths(module: nn.Module, config: Any, d_head: int) -> set[int]:
    """The widths that a rotation of sequence positions can have in this layer."""
    widths = {d_head}
    for name in ("rotary_ndims", "rotary_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            widths.add(value)
    parameters = getattr(config, "rope_parameters", None) or {}
    for holder in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        share = holder.get("partial_rotary_factor")
        if share is not None:
            widths.add(int(d_head * share))
    share = getattr(config, "partial_rotary_factor", None)
    if share is not None:
        widths.add(int(d_head * share))
    return widths


@lru_cache(maxsize=256)
def _is_interleaved(apply: Callable[..., Any], d_head: int, rotated: int) -> bool | None:
    """Turn the first coordinate by a quarter and see where it goes; None where that does not tell."""
    probe = torch.zeros(1, 1, 1, d_head)
    probe[..., 0] = 1
    cos, sin = torch.zeros(1, 1, rotated), torch.ones(1, 1, rotated)
    for width in (d_head, rotated):
        # Some functions rotate the first coordinates of a head, others take just the part to rotate.
        try:
            with torch.no_grad():
                turned = apply(probe[..., :width], probe[..., :width], cos, sin)[0].flatten()
        except Exception:
            continue
        if rotated > 2 and turned[rotated // 2] == 1:
            return False
        if turned[1] == 1:
            return rotated > 2
    return None
