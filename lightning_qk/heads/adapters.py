"""Maps of adapters of low rank and of quantized weights, from what their modules store."""

import sys
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from lightning_qk.heads.projections import Affine
from lightning_qk.heads.sharding import is_plain, whole


def adapter_state(module: nn.Module) -> Hashable:
    """What decides which of a module's adapters take part now; the same for ever where it has none."""
    return tuple(
        (
            bool(getattr(layer, "disable_adapters", False)),
            tuple(getattr(layer, "merged_adapters", ())),
            tuple(getattr(layer, "active_adapters", ())),
        )
        for layer in module.modules()
        if hasattr(layer, "active_adapters")
    )


def closed_form(module: nn.Module) -> Affine | None:
    """The map of a module with adapters of low rank, or with a quantized weight, from what it stores.

    For PEFT's LoRA, rsLoRA and DoRA layers ``W = W_0 + s B A``, and with DoRA's magnitudes m
    ``m / ‖W_0 + s B A‖ (W_0 + s B A)``, row by row, whose norm is a constant to the gradient as it is in the
    layer's own forward. Gathers DTensors.

    Returns:
        The map in the widest type that takes part, differentiable; None where the module is nothing of the kind.
    """
    base: Any = module._modules.get("base_layer")
    if base is None:
        weight = stored_weight(module)
        return None if weight is None else Affine(weight, _bias(module))
    layer: Any = module
    disabled, merged = getattr(layer, "disable_adapters", False), getattr(layer, "merged", False)
    if disabled and merged:
        # The next forward takes the adapters out of the weights again.
        return None
    if not all(isinstance(getattr(layer, name, None), nn.ModuleDict) for name in ("lora_A", "lora_B")):
        return None
    weight = stored_weight(base)
    if weight is None:
        return None
    if getattr(layer, "fan_in_fan_out", False):
        weight = weight.T
    bias = _bias(base)
    if disabled or merged:
        return Affine(weight, bias)
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        added, shift = scaling * (whole(up.weight) @ whole(down.weight)), _bias(up)
        weight = weight + added
        if name in (getattr(layer, "lora_magnitude_vector", None) or ()):
            magnitude = whole(layer.lora_magnitude_vector[name].weight)
            factor = magnitude / weight.detach().norm(dim=1)
            weight = factor[:, None] * weight
            shift = None if shift is None else factor * shift
        if shift is not None:
            bias = scaling * shift if bias is None else bias + scaling * shift
    return Affine(weight, bias)


def stored_weight(module: nn.Module) -> Tensor | None:
    """The ``weight`` of a module as plain numbers, in the shape in which it is kept; None where there is none."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(getattr(module, "parametrizations", None), nn.Module):
        return None
    if is_plain(weight):
        return whole(weight) if weight.dim() == 2 else None
    kind = type(weight).__name__
    if kind == "Params4bit":
        library, state = _bitsandbytes(), getattr(weight, "quant_state", None)
        # In evaluation mode codes may be packed for the processor, in another order.
        if library is None or getattr(state, "packing_format_for_cpu", False):
            return None
        return library.dequantize_4bit(weight.data, state)
    if kind == "Int8Params":
        # The codes and the scale of each row move from the parameter to the module's state at its first run.
        state = getattr(module, "state", None)
        for holder in (state, weight):
            codes, scales = getattr(holder, "CB", None), getattr(holder, "SCB", None)
            if codes is not None and scales is not None:
                return codes.float() * (scales.float() / 127.0)[:, None]
        return None
    if weight.dim() == 2 and weight.is_floating_point() and hasattr(type(weight), "dequantize"):
        plain = weight.dequantize()
        return plain if type(plain) is Tensor and plain.shape == weight.shape else None
    return None


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return whole(bias) if isinstance(bias, Tensor) else None


def _bitsandbytes() -> Any:
    return getattr(sys.modules.get("bitsandbytes"), "functional", None)
