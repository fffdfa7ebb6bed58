"""One affine map of a layer's input, read live from wherever its weights are kept."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_qk.architecture.dry_run import make_weights, quietly, shadow, weight_hooks
from lightning_qk.architecture.source_code import is_known, is_named
from lightning_qk.heads.module_as_matrix import ModuleMatrix, is_plain
from lightning_qk.heads.projections import Affine, InaccessibleWeights, UnreadLayer
from lightning_qk.heads.sharding import alive, check_access, is_dtensor, whole


class StoredWeight:
    """A parameter that is the weight of an affine map, and the parameter that is its bias.

    The weight's elements are seen as ``(blocks, columns, stride)`` with the input in the middle: ``(out, in)`` has
    stride 1, ``(in, ...)`` has one block. Rows run over blocks first.

    Args:
        owner: the module that holds the parameter; it is referred to weakly.
        name: of the parameter.
        columns: width of the input.
        stride: see above.
        bias: name of the bias in the same module.
        places: which elements of the bias belong to the rows: a slice, or a tensor with -1 for none.
    """

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        columns: int,
        stride: int = 1,
        bias: str | None = None,
        places: slice | Tensor = slice(None),
    ) -> None:
        self._owner = self._bias_owner = weakref.ref(owner)
        self.name, self.columns, self.stride = name, columns, stride
        self._bias, self.places = bias, places

    def add_bias(self, owner: nn.Module, name: str, places: Tensor) -> None:
        """Set the bias, which another module may hold."""
        self._bias_owner, self._bias, self.places = weakref.ref(owner), name, places

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter; None while a parametrization or a hook makes the weight from others."""
        return alive(self._owner)._parameters.get(self.name)

    @property
    def bias(self) -> Any:
        """The bias's parameter, whole; None without."""
        return None if self._bias is None else getattr(alive(self._bias_owner), self._bias, None)

    @property
    def transposed(self) -> bool:
        """Whether rows of the map are not rows of the parameter."""
        return self.stride != 1

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the parameter's shape as ``(out, in)``: a view, unless rows lie in several blocks."""
        if self.stride == 1:
            return weight if weight.dim() == 2 else weight.reshape(-1, self.columns)
        if weight.numel() == self.columns * self.stride:
            return weight.reshape(self.columns, -1).T
        return weight.reshape(-1, self.columns, self.stride).transpose(1, 2).flatten(0, 1)

    def read(self) -> Affine:
        """Weight and bias as they are now, whole and differentiable."""
        weight, bias = getattr(alive(self._owner), self.name), self.bias
        if bias is None:
            return Affine(self.as_rows(whole(weight)), None)
        flat = whole(bias).flatten()
        if isinstance(self.places, slice):
            return Affine(self.as_rows(whole(weight)), flat[self.places])
        places = self.places.to(flat.device)
        added = flat[places.clamp_min(0)]
        if bool((places < 0).any()):
            added = torch.where(places < 0, torch.zeros_like(added), added)
        return Affine(self.as_rows(whole(weight)), added)


class Projection:
    """An affine map of a layer's input. Resolved once; :meth:`read` takes nothing but live tensors.

    Modules are referred to weakly. It is made by one of the functions below: by what holds the weights.

    Attributes:
        name: in the layer.
        rows: width of the output.
        columns: width of the input.
        stored: the parameter that is the weight; None where the weight is computed.
        is_submodule: a submodule of the layer applies the map.
        as_matrix: reading runs a module as a linear map.
        normed: a norm is part of the map.
        tensors: everything that is read.
        expansion: the map from a latent to the first rows, where there is a latent; None without.
        shared: number of rows, the last ones, that bypass the latent.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        rows: int,
        columns: int,
        read: Callable[[], Affine],
        weights: Callable[[], Iterable[nn.Parameter]],
        *,
        tensors: Callable[[], Iterable[Tensor]] | None = None,
        stored: StoredWeight | None = None,
        is_submodule: bool = False,
        as_matrix: bool = False,
        normed: bool = False,
        expansion: "Projection | None" = None,
        shared: int = 0,
    ) -> None:
        self.name, self.rows, self.columns = name, rows, columns
        self.read = read
        self._module = weakref.ref(module)
        self._weights, self.tensors = weights, tensors or weights
        self.stored, self.is_submodule = stored, is_submodule
        self.as_matrix, self.normed = as_matrix, normed
        self.expansion, self.shared = expansion, shared

    @property
    def module(self) -> nn.Module:
        """The module that applies the map, or that holds its parameters."""
        return alive(self._module)

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight may depend on, those of inactive adapters included."""
        return list(self._weights())

    def plain_weight(self) -> nn.Parameter | None:
        """The parameter itself, where it is stored whole and :meth:`read` gives it as it is."""
        weight = None if self.stored is None else self.stored.weight
        return None if weight is None or is_dtensor(weight) else weight

    def is_sharded(self) -> bool:
        """Whether reading gathers (collective)."""
        return any(is_dtensor(tensor) for tensor in self.tensors())

    def is_view(self) -> bool:
        """Whether reading takes no memory for the weight: it is a view of what is stored."""
        weight = self.plain_weight()
        if weight is None or self.stored is None:
            return False
        return self.stored.stride in (1, weight.numel() // self.columns)

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, as ``(out, in)``."""
        return weight if self.stored is None else self.stored.as_rows(weight)


def projection_of(module: nn.Module, name: str) -> Projection:
    """The affine map that a module applies to each token.

    Weights that are kept as they are, those of ``nn.Linear``, transformers' ``Conv1D``, convolutions over single
    tokens and modules of a model's own that multiply by their 2-D ``weight``, are read as views, with
    parametrizations applied and DTensors gathered. Everything else that is affine in its input and takes each
    token alone, such as a linear layer with an adapter, a quantized one or a chain of several, is run as a linear
    map on a copy (:mod:`~lightning_qk.heads.module_as_matrix`).

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
        try:
            return _as_matrix(module, name)
        except InaccessibleWeights:
            raise
        except UnreadLayer as reason:
            # A single module says more by what is wrong with its weight.
            raise (reason if any(True for _ in module.children()) else plain) from None


def _linear(module: nn.Module, name: str) -> Projection:
    """A module that multiplies by a weight of its own.

    Raises:
        UnreadLayer: it does something else.
    """
    weight, bias = _own_weight(module, name)
    transposed = _transposed(module, weight, bias, name)
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    stored = StoredWeight(module, "weight", columns, rows if transposed else 1, "bias")
    reference = weakref.ref(module)

    def read() -> Affine:
        weight, bias = _own_weight(alive(reference), name)
        weight = whole(weight)
        return Affine(weight.T if transposed else weight, None if bias is None else whole(bias))

    return Projection(
        name,
        module,
        rows,
        columns,
        read,
        functools.partial(_weights, reference),
        tensors=lambda: alive(reference).parameters(),
        stored=stored,
        is_submodule=True,
    )


def _as_matrix(module: nn.Module, name: str) -> Projection:
    """Any module that is affine in its input, read by running it.

    Raises:
        UnreadLayer: it is not affine.
    """
    matrix, reference = ModuleMatrix(module, name), weakref.ref(module)
    return Projection(
        name,
        module,
        matrix.rows,
        matrix.columns,
        matrix.read,
        functools.partial(_weights, reference),
        tensors=lambda: alive(reference).parameters(),
        is_submodule=True,
        as_matrix=True,
    )


def parameter_projection(
    owner: nn.Module,
    name: str,
    *,
    columns: int | None = None,
    stride: int | None = None,
    path: str = "",
    bias: str | None = None,
    part: int = 0,
) -> Projection:
    """A bare parameter, see :class:`StoredWeight`.

    Args:
        owner: holds the parameter.
        name: of the parameter.
        columns: width of the input; None for that of ``(out, in)``.
        stride: 1 for ``(out, in)``, None for ``(in, ...)``.
        path: qualified name in the layer, for messages.
        bias: name of the parameter that is added.
        part: which part of the bias, of as many numbers as there are rows.

    Raises:
        InaccessibleWeights: its values are out of this process's reach.
    """
    weight: Any = getattr(owner, name)
    check_access(weight, f"its parameter {name!r}")
    columns = columns or (weight.shape[1] if stride == 1 else weight.shape[0])
    rows = weight.numel() // columns
    stored = StoredWeight(owner, name, columns, stride or rows, bias, slice(part * rows, (part + 1) * rows))

    reference = weakref.ref(owner)

    def weights() -> list[nn.Parameter]:
        return [getattr(alive(reference), name)]

    return Projection(path or name, owner, rows, columns, stored.read, weights, stored=stored)


def constant_projection(owner: nn.Module, name: str) -> Projection:
    """A parameter that is cut into heads as it is, whatever the input: a bias, with weights that are zero."""
    reference = weakref.ref(owner)
    width = getattr(owner, name).shape[-1]

    def read() -> Affine:
        stored = whole(getattr(alive(reference), name)).flatten()
        return Affine(stored.new_zeros(width, width), stored)

    return Projection(
        name, owner, width, width, read, list, tensors=lambda: [getattr(alive(reference), name)]
    )


def adapter_around(module: nn.Module, ancestors: Sequence[nn.Module]) -> nn.Module | None:
    """The adapter that has a whole layer as its base, as PEFT's for torch's MultiheadAttention; None without."""
    if not ancestors or ancestors[0]._modules.get("base_layer") is not module:
        return None
    return ancestors[0] if hasattr(ancestors[0], "active_adapters") else None


def with_adapter(base: Projection, adapter: nn.Module) -> Projection:
    """A fused projection of a layer plus the products of low rank of the adapter around the layer.

    Raises:
        UnreadLayer: the adapter does something else than to add such products.
    """
    reference = weakref.ref(adapter)
    for parameter in adapter.parameters():
        check_access(parameter, f"the adapter of its {base.name!r}")

    def added(name: str) -> Tensor:
        layer: Any = alive(reference)
        down, up = (whole(side[name].weight) for side in (layer.lora_A, layer.lora_B))
        with torch.autocast(down.device.type, enabled=False):
            return layer.scaling[name] * (up @ down)

    def read() -> Affine:
        layer: Any = alive(reference)
        weight, bias = base.read()
        disabled, merged = bool(layer.disable_adapters), tuple(layer.merged_adapters)
        if merged:
            # They are in the weight; the next forward takes them out again where they are disabled.
            products = [-added(name) for name in merged if disabled]
        else:
            active = (name for name in layer.active_adapters if name in layer.lora_A and not disabled)
            products = [added(name) for name in active]
        for product in products:
            weight = weight + product
        return Affine(weight, bias)

    def weights() -> list[nn.Parameter]:
        layer: Any = alive(reference)
        own = [parameter for side in (layer.lora_A, layer.lora_B) for parameter in side.parameters()]
        return base.weight_parameters() + own

    layer: Any = adapter
    names = [*layer.lora_A] if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) else []
    plain = bool(names) and not getattr(layer, "lora_variant", None)
    if not plain or any(added(name).shape != (base.rows, base.columns) for name in names):
        raise UnreadLayer(
            f"an adapter is around it ({type(adapter).__name__}) that does more than add a product of low "
            f"rank to its {base.name!r}"
        )
    return Projection(
        base.name, base.module, base.rows, base.columns, read, weights, as_matrix=base.as_matrix
    )


def _weights(reference: "weakref.ref[nn.Module]") -> Iterator[nn.Parameter]:
    """The parameters of a module but for biases."""
    for name, parameter in alive(reference).named_parameters():
        own = name.rpartition(".")[2].startswith("bias") and "parametrizations.weight." not in name
        if not own and "parametrizations.bias." not in name:
            yield parameter


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
