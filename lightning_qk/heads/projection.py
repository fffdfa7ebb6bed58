"""An affine map, and what a way to read one from a module looks like."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_qk.architecture.origin import is_named
from lightning_qk.heads.dry_run import make_weights, own_random_numbers, shadow, weight_hooks
from lightning_qk.heads.module_as_matrix import EffectivePlan, is_plain
from lightning_qk.heads.norms import Norm, NormPlan
from lightning_qk.heads.projections import Affine, InaccessibleWeights, UnreadLayer
from lightning_qk.heads.sharding import alive, check_access, is_dtensor, whole


class AffineMap(Protocol):
    """How one projection is read: found out once, its values taken anew by every :meth:`read`.

    Attributes:
        name: of the projection in its layer.
        rows: width of its output.
        columns: width of its input.
        as_matrix: its values come from running a module as a linear map, rather than from a stored weight.
    """

    name: str
    rows: int
    columns: int

    @property
    def as_matrix(self) -> bool:
        """Whether reading runs a module."""

    @property
    def module(self) -> nn.Module:
        """The projection."""

    def read(self) -> Affine:
        """The map as it is now, whole and differentiable; collective where the weight is sharded."""

    def plain_weight(self) -> nn.Parameter | None:
        """The parameter itself, where it is stored whole and :meth:`read` gives it as it is."""

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight may depend on."""

    def is_sharded(self) -> bool:
        """Whether reading gathers."""

    def is_view(self) -> bool:
        """Whether :meth:`read` takes no memory for the weight, but gives a view of what is stored."""

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, seen as (out, in)."""


class AffinePlan:
    """How one projection with a weight of its own is read, which takes no memory.

    Made once, since telling how a weight is stored can take a run of the module. The module is referred to
    weakly, and its weight and bias are taken anew by every :meth:`read`.
    """

    as_matrix = False

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self._module = weakref.ref(module)
        self.transposed = False
        weight, bias = self._live(module)
        self.transposed = _transposed(module, weight, bias, name)
        rows, columns = weight.shape[::-1] if self.transposed else weight.shape
        self.rows: int = rows
        self.columns: int = columns

    @property
    def module(self) -> nn.Module:
        """The projection."""
        return alive(self._module)

    def read(self) -> Affine:
        """The map as it is now, whole and differentiable; collective where the weight is sharded."""
        weight, bias = self._live(self.module)
        weight = whole(weight)
        return Affine(weight.T if self.transposed else weight, None if bias is None else whole(bias))

    def plain_weight(self) -> nn.Parameter | None:
        """The parameter itself, where it is stored whole and :meth:`read` gives it as it is."""
        weight = self.module._parameters.get("weight")
        return None if weight is None or is_dtensor(weight) else weight

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight depends on: itself, or what a parametrization makes it from."""
        return [
            parameter
            for name, parameter in self.module.named_parameters()
            if not name.startswith(("bias", "parametrizations.bias."))
        ]

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return any(is_dtensor(parameter) for parameter in self.module.parameters())

    def is_view(self) -> bool:
        """Whether :meth:`read` gives a view of what is stored."""
        return self.plain_weight() is not None

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, seen as (out, in)."""
        if weight.dim() > 2:
            weight = weight.flatten(1)
        return weight.T if self.transposed else weight

    def _live(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        name, kind = self.name, type(module).__name__
        held = [child for child in module._modules if child != "parametrizations"]
        if held:
            raise UnreadLayer(
                f"its projection {name!r} is a {kind} that wraps {', '.join(held)}, not a plain linear map"
            )
        weight, bias = _made(module)
        if isinstance(weight, Tensor):
            check_access(weight, f"its projection {name!r}")
            weight = self._as_matrix(module, weight)
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

    def _as_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """A convolution's weight as (out, in), where it takes each token alone."""
        return weight.flatten(1) if weight.dim() > 2 and _is_pointwise(module) else weight


def affine_plan(module: nn.Module, name: str) -> AffineMap:
    """Find out how to read the affine map that a projection applies.

    Weights that are kept as they are, those of ``nn.Linear``, transformers' ``Conv1D``, convolutions over single
    tokens and modules of a model's own that multiply by their 2-D ``weight``, are read as views, with
    parametrizations applied and DTensors gathered. Everything else that is affine in its input and takes each
    token alone, such as a linear layer with an adapter, a quantized one or a chain of several, is read by
    :class:`~lightning_qk.heads.effective.EffectivePlan`, which runs it on a copy.

    Args:
        module: the projection.
        name: its name in the layer, for messages.

    Raises:
        UnreadLayer: the module is not affine in its input.
        InaccessibleWeights: its values are out of this process's reach.
    """
    # What torch.compile makes of a module has the module inside.
    module = module._modules.get("_orig_mod") or module
    try:
        return AffinePlan(module, name)
    except InaccessibleWeights:
        raise
    except UnreadLayer as plain:
        try:
            return EffectivePlan(module, name)
        except InaccessibleWeights:
            raise
        except UnreadLayer as reason:
            # A single module says more by what is wrong with its weight.
            raise (reason if any(True for _ in module.children()) else plain) from None


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
    # What a module has beside its weight may be zero now, or one, and take part later.
    held = (*module._parameters, *module._buffers)
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
    with torch.no_grad(), own_random_numbers(weight.device):
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


def adapter_around(module: nn.Module, ancestors: Sequence[nn.Module]) -> nn.Module | None:
    """The adapter that a layer is the base of, or None."""
    if not ancestors or ancestors[0]._modules.get("base_layer") is not module:
        return None
    return ancestors[0] if hasattr(ancestors[0], "active_adapters") else None


class AdaptedPlan:
    """A fused projection of a layer with a product of low rank beside it, see :class:`AffineMap`."""

    def __init__(self, plan: AffineMap, adapter: nn.Module) -> None:
        """Find out how the two are read.

        Raises:
            UnreadLayer: the adapter does something else than to add a product of low rank.
        """
        self.name, self.rows, self.columns = plan.name, plan.rows, plan.columns
        self._plan = plan
        self._adapter = weakref.ref(adapter)
        layer: Any = adapter
        for parameter in adapter.parameters():
            check_access(parameter, f"the adapter of its {plan.name!r}")
        names = [*layer.lora_A] if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) else []
        plain = bool(names) and not getattr(layer, "lora_variant", None)
        if not plain or any(self._added(name).shape != (self.rows, self.columns) for name in names):
            raise UnreadLayer(
                f"an adapter is around it ({type(adapter).__name__}) that does more than add a product of low "
                f"rank to its {plan.name!r}"
            )

    @property
    def module(self) -> nn.Module:
        """The layer that holds the projection."""
        return self._plan.module

    @property
    def as_matrix(self) -> bool:
        """Whether reading runs a module."""
        return self._plan.as_matrix

    def read(self) -> Affine:
        """The map as it is now, with the adapters that take part now."""
        layer: Any = alive(self._adapter)
        weight, bias = self._plan.read()
        disabled, merged = bool(layer.disable_adapters), tuple(layer.merged_adapters)
        if merged:
            # They are in the weight; the next forward takes them out again where they are disabled.
            added = [-self._added(name) for name in merged if disabled]
        else:
            added = [
                self._added(name) for name in layer.active_adapters if name in layer.lora_A and not disabled
            ]
        for product in added:
            weight = weight + product
        return Affine(weight, bias)

    def plain_weight(self) -> nn.Parameter | None:
        """None: the weight is a sum."""
        return None

    def weight_parameters(self) -> list[nn.Parameter]:
        """Those of the base and of all adapters."""
        layer: Any = alive(self._adapter)
        own = [parameter for side in (layer.lora_A, layer.lora_B) for parameter in side.parameters()]
        return self._plan.weight_parameters() + own

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return self._plan.is_sharded() or any(is_dtensor(own) for own in self.weight_parameters())

    def is_view(self) -> bool:
        """False: the sum takes memory."""
        return False

    def as_rows(self, weight: Tensor) -> Tensor:
        """The tensor itself: what is read has the form (out, in)."""
        return weight

    def _added(self, name: str) -> Tensor:
        layer: Any = alive(self._adapter)
        down, up = (whole(side[name].weight) for side in (layer.lora_A, layer.lora_B))
        with torch.autocast(down.device.type, enabled=False):
            return layer.scaling[name] * (up @ down)


class Part(NamedTuple):
    """Some rows of a composition.

    Attributes:
        places: which of the composition's rows they are.
        affine: the projection that makes them.
        rows: which of its rows they are.
        source: what it maps; None for the layer's input.
        norm: what stands between the two.
        factor: on the source, behind the norm.
    """

    places: Tensor
    affine: AffineMap
    rows: Tensor
    source: "Composed | None" = None
    norm: NormPlan | None = None
    factor: float = 1.0


class Composed:
    """Rows of several projections, some of which map what others give: see :class:`AffineMap`.

    As in a latent that is expanded behind a norm: the norm's gain is folded in (and the removal of the mean),
    the normalization itself stays out, and so does what is added behind it.
    """

    def __init__(self, parts: list[Part]) -> None:
        """Put parts together.

        Raises:
            UnreadLayer: they map inputs of several widths.
        """
        self.parts = parts
        widths = {part.affine.columns if part.source is None else part.source.columns for part in self.parts}
        if len(widths) != 1:
            raise UnreadLayer("its q or k is made of inputs of several widths")
        self.name = " + ".join(part.affine.name for part in self.parts)
        self.rows: int = sum(len(part.rows) for part in parts)
        self.columns: int = widths.pop()
        self.normed: bool = any(
            part.norm is not None or (part.source is not None and part.source.normed) for part in self.parts
        )

    @property
    def module(self) -> nn.Module:
        """The projection of the first rows."""
        return self.parts[0].affine.module

    @property
    def as_matrix(self) -> bool:
        """Whether reading runs a module."""
        inner = [part.source for part in self.parts if part.source is not None]
        return any(affine.as_matrix for affine in (*inner, *(part.affine for part in self.parts)))

    def read(self) -> Affine:
        """The composition as it is now."""
        made = [_read_part(part) for part in self.parts]
        dtype = functools.reduce(torch.promote_types, (own.weight.dtype for own in made))
        places = torch.cat([part.places for part in self.parts]).argsort()
        weight = torch.cat([own.weight.to(dtype) for own in made])[places.to(made[0].weight.device)]
        if all(own.bias is None for own in made):
            return Affine(weight, None)
        biases = [own.weight.new_zeros(len(own.weight)) if own.bias is None else own.bias for own in made]
        bias = torch.cat([own.to(dtype) for own in biases])[places.to(biases[0].device)]
        return Affine(weight, bias)

    def plain_weight(self) -> nn.Parameter | None:
        """None: the weight is put together."""
        return None

    def weight_parameters(self) -> list[nn.Parameter]:
        """Those of all projections and of the norms between them."""
        found: list[nn.Parameter] = []
        for part in self.parts:
            found += part.affine.weight_parameters()
            if part.source is not None:
                found += part.source.weight_parameters()
            if part.norm is not None:
                found += part.norm.module.parameters()
        return found

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return any(
            part.affine.is_sharded()
            or (part.source is not None and part.source.is_sharded())
            or (part.norm is not None and part.norm.is_sharded())
            for part in self.parts
        )

    def is_view(self) -> bool:
        """False: what is put together takes memory."""
        return False

    def as_rows(self, weight: Tensor) -> Tensor:
        """Nothing is stored as it is read."""
        return weight


def _read_part(part: Part) -> Affine:
    weight, bias = part.affine.read()
    rows = part.rows.to(weight.device)
    weight, bias = weight[rows], None if bias is None else bias[rows]
    if part.source is None:
        return Affine(weight, bias)
    below = part.source.read()
    if part.norm is not None:
        below, bias = _gained(below, part.norm.read()), None
    dtype = torch.promote_types(weight.dtype, below.weight.dtype)
    weight = part.factor * weight.to(dtype)
    if below.bias is not None:
        shift = weight @ below.bias.to(dtype)
        bias = shift if bias is None else bias + shift
    return Affine(weight @ below.weight.to(dtype), bias)


def _gained(affine: Affine, norm: Norm) -> Affine:
    """An affine map with a norm's gain, and its removal of the mean, behind it."""
    weight, bias = (None if values is None else values.to(norm.gain.dtype) for values in affine)
    assert weight is not None
    if norm.centered:
        weight = weight - weight.mean(0, keepdim=True)
        bias = None if bias is None else bias - bias.mean()
    return Affine(weight * norm.gain[:, None], None if bias is None else bias * norm.gain)
