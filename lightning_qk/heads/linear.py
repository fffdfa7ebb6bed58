"""The affine map that a projection module really applies."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_qk.architecture.class_names import is_named
from lightning_qk.heads.affine import Affine, AffineMap
from lightning_qk.heads.effective import EffectivePlan
from lightning_qk.heads.errors import InaccessibleWeights, UnreadLayer, alive
from lightning_qk.heads.probing import make_weights, own_random_numbers, shadow, weight_hooks
from lightning_qk.heads.sharding import check_access, is_dtensor, whole
from lightning_qk.heads.stored import is_plain


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
