"""One affine map of a layer's input, read live from wherever its weights are kept, and the two of a layer.

A projection is a parameter, a module, or composed of others: rows of several, one behind another, a latent between
two. :class:`Layout` is what a layer has of them: one for its queries, one for its keys.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.live_weights import alive, check_access, is_dtensor, whole
from lightning_qk.heads.norms import Factor, NormPlan
from lightning_qk.heads.projections import Affine, Sizes, UnreadLayer


@dataclass(eq=False)
class StoredWeight:
    """A parameter that is the weight of an affine map, and the parameter that is its bias.

    The weight's elements are seen as ``(blocks, columns, stride)`` with the input in the middle: ``(out, in)`` has
    stride 1, ``(in, ...)`` has one block. Rows run over blocks first.

    Attributes:
        owner: the module that holds the parameter.
        name: of the parameter.
        columns: width of the input.
        stride: see above.
        bias_name: the parameter that is added, or None.
        places: which elements of the bias belong to the rows: a slice, or a tensor with -1 for none.
        bias_owner: the module that holds the bias, where it is another one.
    """

    owner: "weakref.ref[nn.Module]"
    name: str
    columns: int
    stride: int = 1
    bias_name: str | None = None
    places: slice | Tensor = field(default_factory=lambda: slice(None))
    bias_owner: "weakref.ref[nn.Module] | None" = None

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter; None while a parametrization or a hook makes the weight from others."""
        return alive(self.owner)._parameters.get(self.name)

    @property
    def bias(self) -> Any:
        """The bias's parameter, whole; None without."""
        owner = alive(self.bias_owner or self.owner)
        return None if self.bias_name is None else getattr(owner, self.bias_name, None)

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
        weight, bias = getattr(alive(self.owner), self.name), self.bias
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


@dataclass(eq=False)
class Projection:
    """An affine map of a layer's input. Resolved once; :attr:`read` takes nothing but live tensors.

    Attributes:
        name: in the layer.
        holder: the module that applies the map, or that holds its parameters.
        rows: width of the output.
        columns: width of the input.
        read: weight and bias as they are now, whole and differentiable.
        weights: the parameters that the weight may depend on; None for those of the module but for biases.
        sources: everything that is read; None for the weights, and for biases where ``weights`` is None.
        stored: the parameter that is the weight; None where the weight is computed.
        is_submodule: a submodule of the layer applies the map.
        as_matrix: reading runs a module as a linear map.
        norms: those that are part of the map.
        expansion: the map from a latent to the first rows, where there is a latent; None without.
        shared: number of rows, the last ones, that bypass the latent.
        composition: what is read, where the map is one of several projections.
    """

    name: str
    holder: "weakref.ref[nn.Module]"
    rows: int
    columns: int
    read: Callable[[], Affine]
    weights: Callable[[], Iterable[nn.Parameter]] | None = None
    sources: Callable[[], Iterable[Tensor]] | None = None
    stored: StoredWeight | None = None
    is_submodule: bool = False
    as_matrix: bool = False
    norms: Sequence[NormPlan] = ()
    expansion: "Projection | None" = None
    shared: int = 0
    composition: "Composition | None" = None

    @property
    def module(self) -> nn.Module:
        """The module that applies the map, or that holds its parameters."""
        return alive(self.holder)

    def tensors(self) -> list[Tensor]:
        """Everything that is read."""
        return list((self.sources or self.weights or self.module.parameters)())

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight may depend on, those of inactive adapters included."""
        if self.weights is not None:
            return list(self.weights())
        found = []
        for name, parameter in self.module.named_parameters():
            is_bias = name.rpartition(".")[2].startswith("bias") and "parametrizations.weight." not in name
            if not is_bias and "parametrizations.bias." not in name:
                found.append(parameter)
        return found

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
    reference = weakref.ref(owner)
    places = slice(part * rows, (part + 1) * rows)
    stored = StoredWeight(reference, name, columns, stride or rows, bias, places)

    def weights() -> list[nn.Parameter]:
        return [getattr(alive(reference), name)]

    return Projection(path or name, reference, rows, columns, stored.read, weights, stored=stored)


def constant_projection(owner: nn.Module, name: str) -> Projection:
    """A parameter that is cut into heads as it is, whatever the input: a bias, with weights that are zero."""
    reference = weakref.ref(owner)
    width = getattr(owner, name).shape[-1]

    def read() -> Affine:
        stored = whole(getattr(alive(reference), name)).flatten()
        return Affine(stored.new_zeros(width, width), stored)

    def sources() -> list[Tensor]:
        return [getattr(alive(reference), name)]

    return Projection(name, reference, width, width, read, list, sources)


def with_adapter(base: Projection, module: nn.Module, ancestors: Sequence[nn.Module]) -> Projection:
    """A projection of a layer plus the products of low rank of the adapter around the layer, where there is one.

    PEFT's adapters of torch's MultiheadAttention have the whole layer as their base.

    Args:
        base: of the layer.
        module: the layer.
        ancestors: the modules that contain it, nearest first.

    Raises:
        UnreadLayer: the adapter does something else than to add such products.
    """
    adapter = ancestors[0] if ancestors else module
    if adapter._modules.get("base_layer") is not module or not hasattr(adapter, "active_adapters"):
        return base
    reference = weakref.ref(adapter)
    for parameter in adapter.parameters():
        check_access(parameter, f"the adapter of its {base.name!r}")

    def added(name: str) -> Tensor:
        own: Any = alive(reference)
        down, up = (whole(side[name].weight) for side in (own.lora_A, own.lora_B))
        with torch.autocast(down.device.type, enabled=False):
            return own.scaling[name] * (up @ down)

    def read() -> Affine:
        own: Any = alive(reference)
        weight, bias = base.read()
        disabled, merged = bool(own.disable_adapters), tuple(own.merged_adapters)
        if merged:
            # They are in the weight; the next forward takes them out again where they are disabled.
            products = [-added(name) for name in merged if disabled]
        else:
            active = (name for name in own.active_adapters if name in own.lora_A and not disabled)
            products = [added(name) for name in active]
        for product in products:
            weight = weight + product
        return Affine(weight, bias)

    def weights() -> list[nn.Parameter]:
        own: Any = alive(reference)
        products = [parameter for side in (own.lora_A, own.lora_B) for parameter in side.parameters()]
        return base.weight_parameters() + products

    down = getattr(adapter, "lora_A", None)
    names = [*down] if isinstance(down, nn.ModuleDict) else []
    plain = bool(names) and not getattr(adapter, "lora_variant", None)
    if not plain or any(added(name).shape != (base.rows, base.columns) for name in names):
        raise UnreadLayer(
            f"an adapter is around it ({type(adapter).__name__}) that does more than add a product of low "
            f"rank to its {base.name!r}"
        )
    return Projection(
        base.name, base.holder, base.rows, base.columns, read, weights, as_matrix=base.as_matrix
    )


class Part(NamedTuple):
    """Some rows of a composition.

    Attributes:
        places: which of the composition's rows they are.
        projection: makes them.
        rows: which of its rows they are.
        source: what the projection maps; None for the layer's input.
        norm: between the two, or, without a source, behind the projection.
        factor: on the source, behind the norm; None for 1.
    """

    places: Tensor
    projection: Projection
    rows: Tensor | slice
    source: "Composition | None" = None
    norm: NormPlan | None = None
    factor: Callable[[], float] | None = None


class Composition:
    """Rows of several projections, some of which map what others give.

    As in a latent that is expanded behind a norm: the norm's gain is folded in (and the removal of the mean),
    the normalization itself stays out, and so does what is added behind it.

    Args:
        parts: all rows, each once.

    Raises:
        UnreadLayer: they map inputs of several widths.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        widths = {part.projection.columns if part.source is None else part.source.columns for part in parts}
        if len(widths) != 1:
            raise UnreadLayer("its q or k is computed from inputs of several widths")
        self.columns: int = widths.pop()
        places = torch.cat([part.places for part in parts])
        self._order = None if bool((places.diff() == 1).all()) else places.argsort()
        self.rows = len(places)

    def projections(self) -> Iterator[Projection]:
        """All projections of which it consists."""
        for part in self.parts:
            yield part.projection
            if part.source is not None:
                yield from part.source.projections()

    def norms(self) -> Iterator[NormPlan]:
        """The norms within."""
        for part in self.parts:
            if part.source is not None:
                yield from part.source.norms()
            if part.norm is not None:
                yield part.norm

    def read(self, known: dict[Projection, Affine] | None = None) -> Affine:
        """The composition as it is now; each projection is read once, those in ``known`` not at all."""
        known = {} if known is None else known
        made = [_read_part(part, known) for part in self.parts]
        dtype = functools.reduce(torch.promote_types, (own.weight.dtype for own in made))
        weight = self.ordered([own.weight.to(dtype) for own in made])
        if all(own.bias is None for own in made):
            return Affine(weight, None)
        biases = [own.weight.new_zeros(len(own.weight)) if own.bias is None else own.bias for own in made]
        return Affine(weight, self.ordered([own.to(dtype) for own in biases]))

    def ordered(self, parts: list[Tensor], dim: int = 0) -> Tensor:
        """What the parts make, one below the other, as the rows of the composition."""
        values = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
        return values if self._order is None else values.index_select(dim, self._order.to(values.device))


def composed(
    parts: Sequence[Part], name: str = "", *, expansion: Projection | None = None, shared: int = 0
) -> Projection:
    """A composition as a projection.

    Raises:
        UnreadLayer: its parts map inputs of several widths.
    """
    whole_map = Composition(parts)
    inner, norms = list(dict.fromkeys(whole_map.projections())), list(whole_map.norms())

    def gains() -> list[nn.Parameter]:
        return [parameter for norm in norms for parameter in norm.module.parameters()]

    return Projection(
        name or " + ".join(part.projection.name for part in parts),
        parts[0].projection.holder,
        whole_map.rows,
        whole_map.columns,
        whole_map.read,
        weights=lambda: [*(own for part in inner for own in part.weight_parameters()), *gains()],
        sources=lambda: [*(own for part in inner for own in part.tensors()), *gains()],
        as_matrix=any(part.as_matrix for part in inner),
        norms=norms,
        expansion=expansion,
        shared=shared,
        composition=whole_map,
    )


def _read_part(part: Part, known: dict[Projection, Affine]) -> Affine:
    if part.projection not in known:
        known[part.projection] = part.projection.read()
    weight, bias = known[part.projection]
    rows = part.rows if isinstance(part.rows, slice) else part.rows.to(weight.device)
    weight, bias = weight[rows], None if bias is None else bias[rows]
    if part.source is None:
        own = Affine(weight, bias)
        return own if part.norm is None else _gained(own, part.norm)
    below = part.source.read(known)
    if part.norm is not None:
        below, bias = _gained(below, part.norm), None
    dtype = torch.promote_types(weight.dtype, below.weight.dtype)
    weight = weight.to(dtype)
    if part.factor is not None:
        weight = part.factor() * weight
    if below.bias is not None:
        shift = weight @ below.bias.to(dtype)
        bias = shift if bias is None else bias + shift
    return Affine(weight @ below.weight.to(dtype), bias)


def _gained(affine: Affine, plan: NormPlan) -> Affine:
    """An affine map with a norm's gain, and its removal of the mean, behind it."""
    norm = plan.read()
    weight, bias = (None if values is None else values.to(norm.gain.dtype) for values in affine)
    assert weight is not None
    if norm.centered:
        weight = weight - weight.mean(0, keepdim=True)
        bias = None if bias is None else bias - bias.mean()
    return Affine(weight * norm.gain[:, None], None if bias is None else bias * norm.gain)


class Side(NamedTuple):
    """Query or key of one layer: where its rows lie, and what to fold into them."""

    projection: Projection
    pick: Callable[[Tensor, Sizes], Tensor]
    qk_norm: NormPlan | None
    factor: Factor | None = None
    added: tuple[str, ...] = ()

    def view(self, parameter: Tensor, sizes: Sizes) -> Tensor | None:
        """The part of a tensor of the weight's shape that belongs to this side, (heads, d_head, d_in), as a view.

        None where the layout's order needs a copy.
        """
        rows = self.pick(self.projection.as_rows(parameter), sizes)
        shares = rows.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        return rows if shares else None


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the weights of one layer are, and what is between them and the softmax.

    Attributes:
        layout: name of the table's entry.
        query: the query side.
        key: the key side.
        sizes: head counts and width of a head.
        scaling: the softmax scale.
        normalizes: queries or keys are normalized behind their projections.
        crosses: queries and keys are known to come from different inputs.
        is_decided: whether that is known; False where nothing but a call tells.
        clip: the bound that q and k are clamped to behind the projections, or None.
        obstacle: why heads must not be scaled by their rows, as a clause about the weights, or None.
        is_capped: large logits are bounded, of a layer that was run.
        is_added_to: something besides ``q · k`` is added to the logits, of a layer that was run.
        is_turned: queries and keys change with the token's place, of a layer that was run.
        is_complete: the layer ran to its end, of a layer that was run.
    """

    layout: str
    query: Side
    key: Side
    sizes: Sizes
    scaling: float
    normalizes: bool = False
    crosses: bool = False
    is_decided: bool = True
    clip: float | None = None
    obstacle: str | None = None
    is_capped: bool = False
    is_added_to: bool = False
    is_turned: bool = False
    is_complete: bool = True

    @property
    def qk_norm(self) -> bool:
        """Whether a norm is between the layer's input and the dot product."""
        return self.normalizes or bool(self.query.projection.norms or self.key.projection.norms)
