"""Live weights as plain numbers: of shards, of adapters of low rank, of quantized parameters.

DTensors (FSDP2, tensor parallel) are gathered by their own collective, which is differentiable: the gradient of
what was gathered ends on the local shard. The flat parameters of FSDP's first version are gathered for the
time of a block. Gathering is collective: every process must read the same layers in the same order.
"""

import sys
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_qk.heads.projections import Affine, InaccessibleWeights


class ModuleGone(RuntimeError):
    """A module that was read first is not part of any model any more."""


def alive(reference: "weakref.ref[nn.Module]") -> nn.Module:
    """The module behind a weak reference.

    Raises:
        ModuleGone: as its name says.
    """
    module = reference()
    if module is None:
        raise ModuleGone(
            "expected the modules of the model that was read first, got one that is gone: keep a reference to the "
            "model, and call refresh() on the reader after replacing modules"
        )
    return module


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor; the class is looked up only where it was imported already."""
    home = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(tensor, home.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor: a DTensor is gathered (collective, differentiable), others come back unchanged."""
    if not is_dtensor(tensor):
        return tensor
    sharded: Any = tensor
    # Shards that FSDP2 keeps on the host are gathered where their processes can talk to each other.
    if sharded.device.type != sharded.device_mesh.device_type:
        sharded = sharded.to(sharded.device_mesh.device_type)
    return sharded.full_tensor()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds the numbers that it stands for: neither quantized nor of a class of its own."""
    known = type(tensor) in (Tensor, nn.Parameter) or is_dtensor(tensor)
    return known and tensor.is_floating_point() and tensor.element_size() > 1


def check_access(tensor: Tensor, what: str) -> None:
    """Raises for a weight whose values this process cannot read.

    Args:
        tensor: the weight.
        what: what it is, for the message: "its projection 'q_proj'".

    Raises:
        InaccessibleWeights: it is partitioned by DeepSpeed, or on the meta device.
    """
    if hasattr(tensor, "ds_id") or hasattr(tensor, "ds_status"):
        raise InaccessibleWeights(
            f"the weight of {what} is partitioned by DeepSpeed ZeRO stage 3, which keeps it out of reach: use "
            "stage 1 or 2, or FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)"
        )
    if tensor.is_meta:
        raise InaccessibleWeights(
            f"the weight of {what} is on the meta device, where it has no values: load or initialize the weights "
            "before they are read (module.to_empty(device=...), then the initialization)"
        )


class FlatUnit(NamedTuple):
    """A module that FSDP's first version wraps: its weights are flat outside the forward.

    Attributes:
        unit: the innermost one around a layer.
        root: the one around the whole model, or None where it is not known.
    """

    unit: "weakref.ref[nn.Module]"
    root: "weakref.ref[nn.Module] | None"


def flat_unit(chain: Sequence[nn.Module]) -> FlatUnit | None:
    """The unit that a layer is in, from the modules around it, nearest first; None where it is in none."""
    home = sys.modules.get("torch.distributed.fsdp")
    units = [] if home is None else [own for own in chain if isinstance(own, home.FullyShardedDataParallel)]
    if not units:
        return None
    # The outermost unit of a part of a model need not be the root: it is one where nothing is around it.
    return FlatUnit(weakref.ref(units[0]), weakref.ref(units[-1]) if units[-1] is chain[-1] else None)


@contextmanager
def gathered(flat: FlatUnit | None, *, grads: bool = False) -> Iterator[None]:
    """Within this block the flat parameters of an FSDP unit are whole; collective.

    Args:
        flat: the unit; nothing is done for None.
        grads: gradients too; what the block adds to them is kept.

    Raises:
        InaccessibleWeights: the units have not run yet and their root is not known, or gradients are asked of
            parameters that are flattened for good.
    """
    if flat is None:
        yield
        return
    fsdp: Any = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel
    unit: Any = flat.unit()
    assert unit is not None  # it contains the layer, whose modules are alive
    if unit._is_root is None:
        root = None if flat.root is None else flat.root()
        if root is None:
            raise InaccessibleWeights(
                "its weights are in an FSDP unit that has not run yet, and the unit around the whole model is not "
                "at hand: pass that one, or read after the first forward"
            )
        # The first unit to be gathered becomes the root, which only the outermost may be.
        with fsdp.summon_full_params(root, recurse=False, writeback=False):
            pass
    if grads and not unit._use_orig_params:
        raise InaccessibleWeights(
            "its weights are flattened by FSDP, so that no gradient can be added to one of them: pass "
            "use_orig_params=True to FSDP, or use FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)"
        )
    # Entered and left by its own statement: the context belongs to one unit and never nests.
    with fsdp.summon_full_params(unit, recurse=False, writeback=grads, with_grads=grads):
        yield


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
