"""The affine map of a module: the weight that it multiplies by, or else what running it gives.

Linear layers, transformers' ``Conv1D``, convolutions over single tokens and modules of a model's own that
multiply by their 2-D ``weight`` are read as they are stored. Whatever else is affine in its input and treats each
token alone (adapters, quantized weights, products of linear maps, layers of a user's own) is run on a copy: the
columns of the weight are what the module makes of the unit vectors, the bias is what it makes of zero.
"""

import copy
import functools
import warnings
import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_qk.architecture.dry_run import device_of, make_weights, quietly, shadow, weight_hooks
from lightning_qk.architecture.source_code import is_known, is_named
from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.live_weights import (
    adapter_state,
    alive,
    check_access,
    closed_form,
    is_dtensor,
    is_plain,
    whole,
)
from lightning_qk.heads.projection import Projection, StoredWeight
from lightning_qk.heads.projections import Affine, InaccessibleWeights, UnreadLayer

# Unit vectors that a module is run on at a time.
_BLOCK = 1024
# Parameters of at most so many numbers are varied before a module is called affine, trainable ones in any case.
_SMALL = 2**16
# Layers that quantize what they are given round it to one part in 127.
_QUANTIZED_TOLERANCE = 3e-2


def projection_of(module: nn.Module, name: str) -> Projection:
    """The affine map that a module applies to each token, with parametrizations applied and DTensors gathered.

    Args:
        module: the projection.
        name: its name in the layer, for messages.

    Raises:
        UnreadLayer: the module is not affine in its input.
        InaccessibleWeights: its values are out of this process's reach.
    """
    # torch.compile wraps the module.
    module = module._modules.get("_orig_mod") or module
    try:
        return _linear(module, name)
    except InaccessibleWeights:
        raise
    except UnreadLayer as plain:
        for tensor in (*module.parameters(), *module.buffers()):
            check_access(tensor, f"its projection {name!r}")
        try:
            matrix = ModuleMatrix(module, name)
        except InaccessibleWeights:
            raise
        except UnreadLayer as reason:
            # A single module says more by what is wrong with its weight.
            raise (reason if any(True for _ in module.children()) else plain) from None
    holder = weakref.ref(module)
    return Projection(
        name, holder, matrix.rows, matrix.columns, matrix.read, is_submodule=True, as_matrix=True
    )


def _linear(module: nn.Module, name: str) -> Projection:
    """A module that multiplies by a weight of its own.

    Raises:
        UnreadLayer: it does something else.
    """
    weight, bias = _own_weight(module, name)
    transposed = _transposed(module, weight, bias, name)
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    holder = weakref.ref(module)
    stored = StoredWeight(holder, "weight", columns, rows if transposed else 1, "bias")

    read = functools.partial(_read_weight, holder, name, transposed)
    return Projection(name, holder, rows, columns, read, stored=stored, is_submodule=True)


def _read_weight(holder: "weakref.ref[nn.Module]", name: str, transposed: bool) -> Affine:
    weight, bias = _own_weight(alive(holder), name)
    weight = whole(weight)
    return Affine(weight.T if transposed else weight, None if bias is None else whole(bias))


def _own_weight(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight, ``(out, in)`` or ``(in, out)``, and bias of a single module.

    Raises:
        UnreadLayer: it has no such weight.
    """
    kind = type(module).__name__
    held = [child for child in module._modules if child != "parametrizations"]
    if held:
        raise UnreadLayer(
            f"its projection {name!r} is a {kind} that wraps {', '.join(held)}, not a plain linear map"
        )
    weight, bias = _made(module)
    if isinstance(weight, Tensor):
        check_access(weight, f"its projection {name!r}")
        # A convolution's, where it takes each token alone.
        weight = weight.flatten(1) if weight.dim() > 2 and _is_pointwise(module) else weight
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() == 0:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise UnreadLayer(
            f"its projection {name!r} is a {kind} whose weight has shape {shape}, not (out, in)"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise UnreadLayer(f"its projection {name!r} is a {kind} with a quantized weight ({weight.dtype})")
    if not is_plain(weight):
        raise UnreadLayer(
            f"the weight of its projection {name!r} is a {type(weight).__name__}, not a plain tensor"
        )
    return weight, bias


def _made(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a single module as its forward finds them, in evaluation mode.

    In training mode, to read a weight under spectral normalization would be a step of its power iteration.
    """
    hooks = weight_hooks(module)
    if hooks:
        copy = shadow(module)
        make_weights(copy, hooks)
        return getattr(copy, "weight", None), getattr(copy, "bias", None)
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        made = [
            shadow(lists[name])() if name in lists else getattr(module, name, None)
            for name in ("weight", "bias")
        ]
        return made[0], made[1]
    return getattr(module, "weight", None), getattr(module, "bias", None)


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution over one token at a time."""
    if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward):
        return False
    conv: Any = module
    alone = all(size == 1 for size in conv.kernel_size) and conv.groups == 1
    return alone and (conv.padding == "valid" or conv.padding == "same" or not any(conv.padding))


def _transposed(module: nn.Module, weight: Tensor, bias: Tensor | None, name: str) -> bool:
    """Whether the weight is stored as (in, out)."""
    # What a module has beside its weight may be zero now, or one, and take part later. Known kinds of layers, such
    # as the QuantLinear of I-BERT with its scale, go on doing what they do now.
    held = () if is_known(module) else (*module._parameters, *module._buffers)
    extra = [own for own in held if not own.startswith(("weight", "bias"))]
    if not extra and "forward" not in module.__dict__:
        forward = type(module).forward
        if forward is nn.Linear.forward or _is_pointwise(module):
            return False
        if is_named(module, "Conv1D") and not parametrize.is_parametrized(module):
            return True
    found = None if extra else _multiplies(module, weight, bias)
    if found is not None:
        return found
    raise UnreadLayer(
        f"its projection {name!r} is a {type(module).__name__}, which does more than multiply by its weight"
    )


def _multiplies(module: nn.Module, weight: Tensor, bias: Tensor | None) -> bool | None:
    """Whether a module multiplies by the transpose of its weight, or by the weight; None if by neither.

    It is seen from what the module does to several vectors at a time, large ones among them. Both are tried, since
    a square weight does not tell.
    """
    with quietly(module):
        weight, bias = whole(weight), None if bias is None else whole(bias)
        copy = shadow(module, convert=whole)
        for transposed in (False, True):
            matrix = weight.T if transposed else weight
            if all(_maps_by(copy, matrix, bias, tokens) for tokens in _probes(matrix)):
                return transposed
    return None


def _probes(matrix: Tensor) -> list[Tensor]:
    """Three tokens, and three large ones, (1, 3, in): their signs and sizes vary."""
    wave = torch.arange(3 * matrix.shape[1], device=matrix.device, dtype=torch.float32)
    tokens = (1.3 * wave).cos().view(1, 3, -1) + 0.2
    return [(size * tokens).to(matrix) for size in (1.0, 1e3 if matrix.element_size() >= 4 else 64.0)]


def _maps_by(module: nn.Module, matrix: Tensor, bias: Tensor | None, tokens: Tensor) -> bool:
    try:
        got = module(tokens)
        # Integer models give a scale beside.
        got = got[0] if isinstance(got, tuple) and got else got
        want = F.linear(tokens, matrix, bias)
    except Exception:
        return False
    tolerance = 1e-4 if matrix.element_size() >= 4 else 1e-2
    return (
        isinstance(got, Tensor)
        and got.shape == want.shape
        and bool((got - want).abs().max() <= tolerance * want.abs().max())
    )


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
        with quietly(module):
            self._way, self.rows = self._find_way(module, what)
            self.columns = self._way.columns
            if not self._closed(module):
                varied = self._runnable(module, vary=True)
                if not self._agrees(varied, self._run_copy(varied)):
                    raise UnreadLayer(f"{what} whose output is not W x + b of its input, token by token")
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
            affine = self._run_copy(self._runnable(module))
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
