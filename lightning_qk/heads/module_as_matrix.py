"""The affine map of a module that is no plain linear layer, found by running it.

Adapters, quantized weights, products of linear maps, layers of a user's own: whatever is affine in its input and
treats each token alone. The columns of the weight are what the module makes of the unit vectors, the bias is what
it makes of zero.
"""

import copy
import sys
import warnings
import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qk.architecture.dry_run import quietly, shadow
from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.projections import Affine, UnreadLayer
from lightning_qk.heads.sharding import alive, check_access, device_of, is_dtensor, whole

# Unit vectors that a module is run on at a time.
_BLOCK = 1024
# Parameters of at most so many numbers are varied before a module is called affine, trainable ones in any case.
_SMALL = 2**16
# Layers that quantize what they are given round it to one part in 127.
_QUANTIZED_TOLERANCE = 3e-2


class _Way(NamedTuple):
    """How tokens are given to a module.

    Attributes:
        columns: width of a token.
        trailing: number of axes behind the features: 0 for (1, tokens, features), 1 for (1, features, tokens),
            2 for (1, features, tokens, 1).
        dtype: of the tokens.
        is_wide: half precision is raised to float32.
    """

    columns: int
    trailing: int
    dtype: torch.dtype
    is_wide: bool


class ModuleMatrix:
    """Reads any module that is affine in its input.

    Whether it is affine is tried once, on a copy whose parameters are varied, so that an adapter that starts at
    zero is seen. The values are live in every :meth:`read`: adapters may be switched, disabled or merged.
    For adapters of low rank and for quantized weights a shorter way is taken where it was seen to give what the
    module gives.

    The weight is float32 at least, and differentiable in all parameters that the module's own output is
    differentiable in. The module is referred to weakly, and neither its hooks nor its dropout take part.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        """Find out how a module is read.

        Raises:
            UnreadLayer: it is not affine in its input, or treats its tokens together.
        """
        self.name = name
        self._module = weakref.ref(module)
        # Adapter state → whether the shorter way is right.
        self._is_closed: dict[Hashable, bool] = {}
        what = f"its projection {name!r} is a {type(module).__name__}"
        for tensor in (*module.parameters(), *module.buffers()):
            check_access(tensor, f"its projection {name!r}")
        with quietly(module):
            self._way, self.rows = self._find_way(module, what)
            self.columns = self._way.columns
            if not self._closed(module):
                self._check_affine(module, what)
            self._has_bias = bool(self._offset(self._runnable(module)).any()) or any(
                own.rpartition(".")[2].startswith("bias") for own, _ in module.named_parameters()
            )

    def read(self) -> Affine:
        """The map as it is now, whole and differentiable; collective where a weight is sharded."""
        module = alive(self._module)
        with full_precision(device_of(module)):
            affine = closed_form(module) if self._closed(module) else None
            if affine is not None:
                return _widened(affine)
            affine = self._run(module)
        return affine if self._has_bias else affine._replace(bias=None)

    def _closed(self, module: nn.Module) -> bool:
        """Whether the shorter way is right for the adapters that take part now; found out once for each set."""
        state = adapter_state(module)
        if state not in self._is_closed:
            with quietly(module):
                varied = self._runnable(module, vary=True)
                affine = closed_form(varied)
                self._is_closed[state] = (
                    affine is not None
                    and affine.weight.shape == (self.rows, self.columns)
                    and self._agrees(varied, _widened(affine))
                )
        return self._is_closed[state]

    def _check_affine(self, module: nn.Module, what: str) -> None:
        varied = self._runnable(module, vary=True)
        if not self._agrees(varied, self._run_copy(varied)):
            raise UnreadLayer(f"{what} whose output is not W x + b of its input, token by token")

    def _find_way(self, module: nn.Module, what: str) -> tuple[_Way, int]:
        """Try widths, arrangements and types until the module gives a token for every token."""
        tensors = [*module.parameters(), *module.buffers()]
        types = [
            tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.element_size() > 1
        ]
        wide = max(types, key=_size, default=torch.float32)
        tries: list[tuple[torch.dtype, bool]] = []
        if all(is_plain(tensor) for tensor in module.parameters()):
            tries.append((wide if wide == torch.float64 else torch.float32, True))
        tries += [
            (dtype, False) for dtype in dict.fromkeys((*types, torch.float32, torch.bfloat16, torch.float16))
        ]
        for dtype, is_wide in tries:
            copied = self._runnable(module, wide=is_wide)
            for columns in _widths(module):
                for trailing in (0, 1, 2):
                    way = _Way(columns, trailing, dtype, is_wide)
                    try:
                        out = _apply(
                            copied, torch.zeros(3, columns, dtype=dtype, device=device_of(module)), way
                        )
                    except Exception:
                        continue
                    if out is not None:
                        return way, out.shape[1]
        raise UnreadLayer(f"{what} that maps no vector of a width at hand to another one")

    def _runnable(self, module: nn.Module, *, vary: bool = False, wide: bool | None = None) -> nn.Module:
        """A copy that runs without hooks and dropout, its weights whole."""
        is_wide = self._way.is_wide if wide is None else wide
        if _changes_itself(module):
            module = copy.deepcopy(module)
        buffers = [own for own in module.buffers() if own.is_floating_point()]
        names = {id(tensor): place for place, tensor in enumerate((*module.parameters(), *buffers))}
        parameters = {id(tensor) for tensor in module.parameters()}

        def convert(tensor: Tensor) -> Tensor:
            place = names.get(id(tensor))
            if id(tensor) not in parameters and tensor.numel() <= _SMALL and not is_dtensor(tensor):
                # A forward may count in its buffers.
                tensor = tensor.clone()
            if not is_plain(tensor):
                return tensor
            plain = at_least_float32(whole(tensor)) if is_wide else whole(tensor)
            if vary and place is not None and (tensor.requires_grad or tensor.numel() <= _SMALL):
                return _varied(plain, place)
            # Of its own, since layers cast their biases in place.
            return plain.view_as(plain) if plain is tensor else plain

        copied = shadow(module, convert=convert)
        for layer in copied.modules():
            if not all(is_plain(own) for own in layer.parameters(recurse=False)):
                # In evaluation mode a quantized layer may repack its codes, and keep them so.
                layer.training = True
        return copied

    def _run(self, module: nn.Module) -> Affine:
        return self._run_copy(self._runnable(module))

    def _run_copy(self, copied: nn.Module) -> Affine:
        eye = _unit_vectors(self._way.columns, self._way.dtype, device_of(copied))
        bias = self._offset(copied)
        parts = [self._given(copied, block) - bias for block in eye.split(_BLOCK)]
        weight = torch.cat(parts).T if len(parts) > 1 else parts[0].T
        return _widened(Affine(weight, bias))

    def _offset(self, copied: nn.Module) -> Tensor:
        return self._given(
            copied, torch.zeros(1, self._way.columns, dtype=self._way.dtype, device=device_of(copied))
        )[0]

    def _given(self, copied: nn.Module, tokens: Tensor) -> Tensor:
        out = _apply(copied, tokens, self._way)
        if out is None:
            raise UnreadLayer(f"its projection {self.name!r} gives no token for each token any more")
        return out

    def _agrees(self, copied: nn.Module, affine: Affine) -> bool:
        """Whether a map gives what the module gives for vectors of signs, large ones, and uneven ones.

        Signs come through a quantization of the input unchanged, others do not.
        """
        weight, bias = affine
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (3, self.columns), generator=generator) * 2.0 - 1
        uneven = torch.randn(2, self.columns, generator=generator)
        exact = 1e-9 if self._way.dtype == torch.float64 else 1e-4
        # Quantized weights are multiplied in whatever precision their library likes.
        plain = all(is_plain(parameter) for parameter in copied.parameters())
        if not plain or not self._way.is_wide:
            exact = _QUANTIZED_TOLERANCE
        # What bounds its output does so at some size; half precision has none much larger.
        large = 1e3 if self._way.dtype in (torch.float32, torch.float64) else 64.0
        tests = (
            (torch.cat([signs, 4 * signs[:1], torch.zeros_like(signs[:1])]), exact),
            (uneven, exact),
            (large * signs, exact),
        )
        device = device_of(copied)
        with full_precision(device):
            for tokens, tolerance in tests:
                tokens = tokens.to(device, self._way.dtype)
                try:
                    got = _apply(copied, tokens, self._way)
                except Exception:
                    return False
                want = F.linear(
                    tokens.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
                )
                if got is None or got.shape != want.shape:
                    return False
                scale = float(want.abs().max())
                if not float((got.to(want.dtype) - want).abs().max()) <= tolerance * scale:
                    return False
        return True


def _apply(module: nn.Module, tokens: Tensor, way: _Way) -> Tensor | None:
    """A module's output for (tokens, columns), as (tokens, rows); None where it gives something else."""
    shaped = tokens[None]
    if way.trailing:
        shaped = shaped.mT
    if way.trailing == 2:
        shaped = shaped.unsqueeze(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = module(shaped)
    if not isinstance(out, Tensor) or out.dim() != shaped.dim() or out.shape[0] != 1:
        return None
    if way.trailing == 2:
        out = out.squeeze(-1)
    out = (out.mT if way.trailing else out)[0]
    return out if out.dim() == 2 and out.shape[0] == tokens.shape[0] else None


def _widths(module: nn.Module) -> list[int]:
    """Numbers that may be the width of a module's input, the likeliest first."""
    found = [
        width
        for layer in module.modules()
        for name in ("in_features", "in_channels", "input_size")
        if isinstance(width := getattr(layer, name, None), int)
    ]
    found += [size for parameter in module.parameters() for size in reversed(parameter.shape)]
    return [width for width in dict.fromkeys(found) if width > 0][:8]


def _varied(tensor: Tensor, place: int) -> Tensor:
    """Other values of the same size, of the same sign where they are not small."""
    wave = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float32)
    wave = torch.cos(wave * (1.7 + 0.1 * place)).view(tensor.shape).to(tensor.dtype)
    return tensor.detach() * (1 + 0.2 * wave) + 0.02 * wave


def _changes_itself(module: nn.Module) -> bool:
    """Whether a forward takes merged adapters out of the weights again, since they were disabled."""
    return any(
        getattr(layer, "merged", False) is True and getattr(layer, "disable_adapters", False) is True
        for layer in module.modules()
    )


def _widened(affine: Affine) -> Affine:
    return Affine(
        at_least_float32(affine.weight), None if affine.bias is None else at_least_float32(affine.bias)
    )


def _size(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


_IDENTITIES: "weakref.WeakValueDictionary[tuple[int, torch.dtype, torch.device], Tensor]" = (
    weakref.WeakValueDictionary()
)


def _unit_vectors(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity matrix; graphs that keep it share one."""
    key = width, dtype, device
    eye = _IDENTITIES.get(key)
    if eye is None:
        eye = _IDENTITIES[key] = torch.eye(width, dtype=dtype, device=device)
    return eye


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds the numbers that it stands for: neither quantized nor of a class of its own."""
    known = type(tensor) in (Tensor, nn.Parameter) or is_dtensor(tensor)
    return known and tensor.is_floating_point() and tensor.element_size() > 1


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
