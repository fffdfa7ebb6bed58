"""Where the rows of queries or keys come from: what an entry of the layouts is made of.

A source says where in an attention layer the weights lie; planned for one layer it is an affine map of the
layer's input: a child's, a bare parameter's, or a composition of those.
"""

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_qk.heads.norms import NormPlan, plan_norm
from lightning_qk.heads.projection import AffineMap, affine_plan
from lightning_qk.heads.projections import Affine, UnreadLayer
from lightning_qk.heads.sharding import alive, check_access, is_dtensor, whole


class Source(Protocol):
    """Where one side of a layer lies."""

    def fits(self, module: nn.Module, lender: nn.Module | None = None) -> bool:
        """Whether the layer has what the source names.

        Args:
            module: the layer.
            lender: the layer whose keys it uses instead of its own.
        """

    def plan(self, module: nn.Module, lender: nn.Module | None = None) -> AffineMap:
        """How it is read from one layer.

        Raises:
            UnreadLayer: it cannot be.
        """

    def weight(self, module: nn.Module) -> Tensor | None:
        """The stored tensor whose first dimension runs over heads, where there is one."""

    def inner_norms(self, module: nn.Module) -> list[nn.Module]:
        """Norms that are part of the map itself."""


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for part in path.split("."):
        found = found._modules.get(part)
        if found is None:
            return None
    return found


class Child(NamedTuple):
    """A child that maps the layer's input.

    Attributes:
        path: of the child, dotted where it is a child's child.
    """

    path: str

    def fits(self, module: nn.Module, lender: nn.Module | None = None) -> bool:
        """Whether the layer has it."""
        return _child(lender or module, self.path) is not None

    def plan(self, module: nn.Module, lender: nn.Module | None = None) -> AffineMap:
        """How it is read from one layer."""
        return affine_plan((lender or module).get_submodule(self.path), self.path)

    def weight(self, module: nn.Module) -> Tensor | None:
        """The stored tensor, where its first dimension runs over heads."""
        return getattr(_child(module, self.path), "weight", None)

    def inner_norms(self, module: nn.Module) -> list[nn.Module]:
        """Norms that are part of the map."""
        return []


class Bare(NamedTuple):
    """A parameter of the layer itself.

    Attributes:
        name: of the parameter: ``(out, in)``, or ``(in, ...)`` with the outputs in the last dimensions.
        bias: name of the parameter that is added, of as many numbers as there are outputs.
        part: which of the bias's parts, each of as many numbers as there are outputs, is added.
        transposed: stored as ``(in, ...)``.
    """

    name: str
    bias: str | None = None
    part: int = 0
    transposed: bool = False

    def fits(self, module: nn.Module, lender: nn.Module | None = None) -> bool:
        """Whether the layer has it."""
        weight = (lender or module)._parameters.get(self.name)
        return weight is not None and weight.dim() == (3 if self.transposed else 2)

    def plan(self, module: nn.Module, lender: nn.Module | None = None) -> AffineMap:
        """How it is read from one layer."""
        return BarePlan(lender or module, self)

    def weight(self, module: nn.Module) -> Tensor | None:
        """The stored tensor, where its first dimension runs over heads."""
        return None if self.transposed else module._parameters.get(self.name)

    def inner_norms(self, module: nn.Module) -> list[nn.Module]:
        """Norms that are part of the map."""
        return []


class BarePlan:
    """How a bare parameter is read, see :class:`AffineMap`."""

    as_matrix = False

    def __init__(self, module: nn.Module, source: Bare) -> None:
        self.name = source.name
        self._module = weakref.ref(module)
        self._source = source
        weight = self._stored()
        check_access(weight, f"its parameter {source.name!r}")
        self.columns: int = weight.shape[0] if source.transposed else weight.shape[1]
        self.rows: int = weight.numel() // self.columns

    @property
    def module(self) -> nn.Module:
        """Holds the parameters."""
        return alive(self._module)

    def read(self) -> Affine:
        """The map as it is now."""
        bias = None if self._source.bias is None else getattr(self.module, self._source.bias, None)
        if bias is not None:
            start = self._source.part * self.rows
            bias = whole(bias).flatten()[start : start + self.rows]
        return Affine(self.as_rows(whole(self._stored())), bias)

    def plain_weight(self) -> nn.Parameter | None:
        """The parameter itself, where it is stored whole."""
        weight = self._stored()
        return None if is_dtensor(weight) else weight

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight depends on."""
        return [self._stored()]

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return is_dtensor(self._stored())

    def is_view(self) -> bool:
        """Whether reading takes no memory."""
        return not self.is_sharded()

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, seen as (out, in)."""
        return weight.flatten(1).T if self._source.transposed else weight

    @property
    def transposed(self) -> bool:
        """Whether the parameter is stored as ``(in, ...)``."""
        return self._source.transposed

    def stored(self) -> tuple[nn.Parameter, nn.Parameter | None, int]:
        """The parameters of weight and bias, and where in the bias its part begins."""
        bias = None if self._source.bias is None else getattr(self.module, self._source.bias, None)
        return self._stored(), bias, self._source.part * self.rows

    def _stored(self) -> nn.Parameter:
        return getattr(self.module, self._source.name)


class Constant(NamedTuple):
    """No projection: a parameter of the layer is cut into heads as it is, whatever the input.

    It is read as a bias, with weights that are zero.

    Attributes:
        name: of the parameter, whose last dimension runs over all heads.
    """

    name: str

    def fits(self, module: nn.Module, lender: nn.Module | None = None) -> bool:
        """Whether the layer has it."""
        return module._parameters.get(self.name) is not None

    def plan(self, module: nn.Module, lender: nn.Module | None = None) -> AffineMap:
        """How it is read from one layer."""
        return ConstantPlan(module, self)

    def weight(self, module: nn.Module) -> Tensor | None:
        """The stored tensor, where its first dimension runs over heads."""
        return None

    def inner_norms(self, module: nn.Module) -> list[nn.Module]:
        """Norms that are part of the map."""
        return []


class ConstantPlan:
    """How a constant is read, see :class:`AffineMap`."""

    as_matrix = False

    def __init__(self, module: nn.Module, source: Constant) -> None:
        self.name = source.name
        self._module = weakref.ref(module)
        self.rows = self.columns = self._stored().shape[-1]

    @property
    def module(self) -> nn.Module:
        """Holds the parameters."""
        return alive(self._module)

    def read(self) -> Affine:
        """The map as it is now."""
        stored = whole(self._stored()).flatten()
        return Affine(stored.new_zeros(self.rows, self.columns), stored)

    def plain_weight(self) -> nn.Parameter | None:
        """The parameter itself, where it is stored whole."""
        return None

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight depends on."""
        return []

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return is_dtensor(self._stored())

    def is_view(self) -> bool:
        """Whether reading takes no memory."""
        return False

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, seen as (out, in)."""
        return weight

    def _stored(self) -> nn.Parameter:
        return getattr(self.module, self.name)


class Latent(NamedTuple):
    """A map through a latent of low rank, with a norm on the latent: ``up(norm(down x))``.

    The norm's gain is folded in; the normalization itself, one positive number a token, stays out, and so do
    what is added behind it: the norm's offset and the bias of ``up``.

    Attributes:
        down: the child that makes the latent.
        norm: the child that normalizes it; the map is read without one where the layer has none.
        up: the child that expands it.
        shared: ``down`` has rows behind the latent, which are no part of it and pass by norm and ``up``:
            they come last in the map's rows.
        shared_norm: the child that normalizes those, where there is one.
        factors: attributes of which one may hold a factor on the normalized latent.
    """

    down: str
    norm: str
    up: str
    shared: bool = False
    shared_norm: str | None = None
    factors: tuple[str, ...] = ()

    def fits(self, module: nn.Module, lender: nn.Module | None = None) -> bool:
        """Whether the layer has it."""
        return _child(module, self.up) is not None and _child(lender or module, self.down) is not None

    def plan(self, module: nn.Module, lender: nn.Module | None = None) -> AffineMap:
        """How it is read from one layer."""
        return LatentPlan(module, lender or module, self)

    def weight(self, module: nn.Module) -> Tensor | None:
        """The stored tensor, where its first dimension runs over heads."""
        return Child(self.up).weight(module)

    def inner_norms(self, module: nn.Module) -> list[nn.Module]:
        """Norms that are part of the map."""
        paths = [self.norm] if self.shared_norm is None else [self.norm, self.shared_norm]
        return [norm for norm in (_child(module, path) for path in paths) if norm is not None]


class LatentPlan:
    """How a map through a latent is read, see :class:`AffineMap`.

    Attributes:
        shared: number of rows that pass by the latent.
        normed: a norm stands within the map.
    """

    def __init__(self, module: nn.Module, lender: nn.Module, source: Latent) -> None:
        self._down, self._up = Child(source.down).plan(lender), Child(source.up).plan(module)
        self.name = source.up
        self._rank = self._up.columns
        self.shared = self._down.rows - self._rank
        if self.shared < 0 or (self.shared > 0 and not source.shared):
            raise UnreadLayer(
                f"its {source.down!r} gives {self._down.rows} numbers, and its {source.up!r} takes {self._rank}"
            )
        self.rows = self._up.rows + self.shared
        self.columns = self._down.columns
        self._norm = _plan_norm(lender, source.norm, self._rank)
        self._shared_norm = None
        if source.shared_norm is not None and self.shared:
            self._shared_norm = _plan_norm(lender, source.shared_norm, self.shared)
        self.normed = self._norm is not None or self._shared_norm is not None
        self._layer = weakref.ref(module)
        self._factor = next((name for name in source.factors if hasattr(module, name)), None)

    @property
    def module(self) -> nn.Module:
        """Holds the parameters that expand the latent."""
        return self._up.module

    @property
    def as_matrix(self) -> bool:
        """Whether reading runs a module."""
        return self._down.as_matrix or self._up.as_matrix

    def read(self) -> Affine:
        """The composition as it is now."""
        down, up = self._down.read(), self._up.read()
        latent, weight = _part(down, 0, self._rank), up.weight
        if self._norm is not None:
            latent = _fold(self._norm, latent)
            weight = weight.to(latent.weight.dtype)
        if self._factor is not None:
            weight = weight * float(getattr(alive(self._layer), self._factor))
        rows = weight @ latent.weight
        shift = None if latent.bias is None else weight @ latent.bias
        if self._norm is None and up.bias is not None:
            shift = up.bias if shift is None else shift + up.bias
        if not self.shared:
            return Affine(rows, shift)
        shared = _part(down, self._rank, self._down.rows)
        if self._shared_norm is not None:
            shared = _fold(self._shared_norm, shared)
        if shift is not None or shared.bias is not None:
            first, second = (
                part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias.to(rows.dtype)
                for part in (Affine(rows, shift), shared)
            )
            shift = torch.cat([first, second])
        return Affine(torch.cat([rows, shared.weight.to(rows.dtype)]), shift)

    def plain_weight(self) -> nn.Parameter | None:
        """None: the weight is a product."""
        return None

    def weight_parameters(self) -> list[nn.Parameter]:
        """Those of both maps and of the norms."""
        norms = [parameter for norm in self._norms() for parameter in norm.module.parameters()]
        return [*self._down.weight_parameters(), *self._up.weight_parameters(), *norms]

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        maps = (self._down, self._up)
        return any(part.is_sharded() for part in maps) or any(norm.is_sharded() for norm in self._norms())

    def is_view(self) -> bool:
        """False: the product takes memory."""
        return False

    def as_rows(self, weight: Tensor) -> Tensor:
        """Nothing is stored as the product is."""
        return weight

    @property
    def expansion(self) -> AffineMap:
        """The map of the normalized latent; its rows come first, those that pass by the latent after them."""
        return self._up

    def _norms(self) -> list[NormPlan]:
        return [norm for norm in (self._norm, self._shared_norm) if norm is not None]


def _part(affine: Affine, start: int, stop: int) -> Affine:
    return Affine(affine.weight[start:stop], None if affine.bias is None else affine.bias[start:stop])


def _plan_norm(module: nn.Module, name: str, width: int) -> NormPlan | None:
    norm = _child(module, name)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    plan = plan_norm(norm, (width,))
    if plan is None:
        raise UnreadLayer(
            f"the norm {name!r} in its projections is a {type(norm).__name__}, which is no RMSNorm or LayerNorm"
        )
    return plan


def _fold(plan: NormPlan, affine: Affine) -> Affine:
    """Gain and centering of a norm on an affine map's output; the normalization and the offset stay out."""
    norm = plan.read()

    def fold(values: Tensor) -> Tensor:
        values = values.to(norm.gain.dtype)
        if norm.centered:
            values = values - values.mean(0, keepdim=True)
        return values * norm.gain.view(-1, *(1,) * (values.dim() - 1))

    return Affine(fold(affine.weight), None if affine.bias is None else fold(affine.bias))
