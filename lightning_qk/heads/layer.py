"""One attention layer: its weights are located and how to read them is compiled once, then they are read live."""

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.functional.rotary import Rotary
from lightning_qk.heads.facts import Finding, LayerFacts, describe, layer_sizes, softmax_scaling
from lightning_qk.heads.inferred_layout import BY_RUNNING, check_tokens, infer
from lightning_qk.heads.layouts import KnownLayout, fitting_layouts
from lightning_qk.heads.live_weights import FlatUnit, alive, gathered, whole
from lightning_qk.heads.norms import (
    NormPlan,
    added_to_queries,
    feeding_norm,
    fold_layer_norm,
    fold_qk_norm,
    is_before_projections,
    is_behind_rotation,
    learnt_factors,
    plan_qk_norm,
)
from lightning_qk.heads.position import NONE, RELATIVE_BIAS, Rotation, find_position, find_rotation
from lightning_qk.heads.projection import Layout, Side, with_adapter
from lightning_qk.heads.projections import Affine, HeadProjections, InaccessibleWeights, UnreadLayer
from lightning_qk.heads.sites import AttentionLayer


def layer_reader(
    layer: AttentionLayer,
    fold_norm: bool = False,
    wrappers: tuple[nn.Module, ...] = (),
    *,
    finding: Finding | None = None,
) -> "LayerReader":
    """Find out how a layer is read.

    Args:
        layer: in its model.
        fold_norm: look for the norm that feeds it.
        wrappers: modules around the model that the layer was found in, nearest first.
        finding: what its real call has shown; None for what is known of it.

    Raises:
        UnreadLayer: it cannot be read.
    """
    facts = describe(layer, wrappers, finding)
    with gathered(facts.unit):
        layout = locate(facts)
        return compile_reader(facts, layout, fold_norm)


def locate(facts: LayerFacts) -> Layout:
    """Where a layer's weights lie: by the table where its class is known, else by running it alone.

    The first entry of the table that fits is taken, tentative ones only if they explain the layer's sizes.

    Raises:
        UnreadLayer: neither finds them.
    """
    if facts.finding.layout is not None:
        return _by_table(facts, facts.finding.layout)
    refusal = None
    for known in fitting_layouts(facts.layer.module, facts.key_module) if facts.trusts_names else ():
        try:
            layout = _by_table(facts, known)
        except UnreadLayer as reason:  # noqa: PERF203
            refusal = refusal or reason
            if not known.tentative:
                break
        else:
            check_tokens(facts.layer)
            return layout
    if isinstance(refusal, InaccessibleWeights):
        raise refusal
    return infer(facts, refusal)


def _by_table(facts: LayerFacts, known: KnownLayout) -> Layout:
    """The layout that an entry of the table says.

    Raises:
        UnreadLayer: it does not go with what the layer has.
    """
    module, ancestors, key_module = facts.layer.module, facts.layer.ancestors, facts.key_module
    query = key = with_adapter(known.query.projection(module), module, ancestors)
    if known.key != known.query:
        key = with_adapter(known.key.projection(module, key_module), module, ancestors)
    rows = query.rows, key.rows
    sizes = layer_sizes(module, facts.layer.config, rows, known.order.blocks, key.shared)
    scaling = known.scaling or softmax_scaling(module, sizes.d_head)
    factors = learnt_factors(module)
    cosine = any(factor.normalizes for factor in factors.values())
    if factors:
        scaling = 1.0 / sizes.d_head if cosine else 1.0
    added = (*added_to_queries(module), *facts.finding.added)
    inner = [norm.module for norm in (*query.norms, *key.norms)]
    norms = (
        plan_qk_norm(module, "query", sizes, inner),
        plan_qk_norm(key_module, "key", sizes, inner),
    )
    if norms[0] is not None and is_before_projections(module, norms[0], query.columns):
        norms = None, None
    return Layout(
        known.name,
        Side(query, known.order.query, norms[0], factors.get("query"), added),
        Side(key, known.order.key, norms[1], factors.get("key")),
        sizes,
        scaling,
        normalizes=cosine or known.normalizes or any(norm is not None for norm in norms),
        crosses=known.crosses,
        is_decided=facts.finding.layout is None or facts.layer.has_one_input,
        clip=facts.clip,
    )


def compile_reader(facts: LayerFacts, layout: Layout, fold_norm: bool = False) -> "LayerReader":
    """A reader of a layer whose weights were located; ``fold_norm`` looks for the norm that feeds it."""
    layer, sizes, finding = facts.layer, layout.sizes, facts.finding
    constants = Constants(layer.module)
    query, key = layout.query.projection, layout.key.projection
    self_attention = not layout.crosses and not layer.is_cross
    if finding.self_attention is not None:
        self_attention = finding.self_attention
    self_attention = self_attention and query.columns == key.columns
    behind = [side.qk_norm for side in (layout.query, layout.key) if side.qk_norm is not None]
    feeding = None
    if fold_norm and self_attention and facts.kv_source is None:
        inner = [norm.module for norm in (*query.norms, *key.norms, *behind)]
        feeding = feeding_norm(layer.module, layer.ancestors, query.columns, inner)
    gain_behind = bool(behind) and is_behind_rotation(layer.module, behind[0])
    # Of what all keys share there is one a token.
    rotation = find_rotation(layer, sizes.d_head, heads=1 if sizes.shared else sizes.kv_heads)
    position = find_position(layer, rotation)
    # What a run shows weighs more than names that say nothing.
    if position == NONE and layout.is_added_to:
        position = RELATIVE_BIAS
    elif position == NONE and layout.is_turned:
        position = None
    return LayerReader(
        **vars(layout),
        name=layer.name,
        key_layer=None if facts.kv_source is None else facts.kv_source.name,
        self_attention=self_attention,
        position=position,
        gain_behind_rotation=gain_behind,
        holder=weakref.ref(layer.module),
        constants=constants,
        unit=facts.unit,
        feeding=feeding,
        rotation=rotation,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerReader(Layout):
    """Reads one layer; it is kept beside a model, refers to modules weakly and holds no weights.

    Attributes:
        name: qualified name.
        key_layer: qualified name of the layer whose keys are used, None for own ones.
        self_attention: queries and keys come from the same tokens. Where ``is_decided`` is False, nothing but a
            call tells whether they do (see `Finding`): they are taken to until then, unless names say otherwise.
        position: what positions do to the logits.
        gain_behind_rotation: the gain of the norm of queries and keys acts on what was rotated.
        holder: the layer.
        constants: the numbers that it keeps beside its parameters.
        unit: the FSDP unit that flattens the weights.
        feeding: the norm that is folded in, of the layer's input.
        rotation: how queries and keys are rotated.
    """

    name: str
    key_layer: str | None
    self_attention: bool
    position: str | None
    gain_behind_rotation: bool
    holder: "weakref.ref[nn.Module]"
    constants: "Constants"
    unit: FlatUnit | None
    feeding: NormPlan | None
    rotation: Rotation

    @property
    def width(self) -> tuple[int, int]:
        """d_query and d_key."""
        return self.query.projection.columns, self.key.projection.columns

    def is_current(self) -> bool:
        """Whether the numbers that the layer keeps beside its parameters are those that it was compiled with."""
        return self.constants.are_kept()

    def reads_as(self, other: "LayerReader") -> bool:
        """Whether another plan of the layer says the same; both are then taken to be current."""
        if self._told() != other._told():
            return False
        self.constants.keep()
        return True

    def _told(self) -> tuple[Any, ...]:
        picked = [
            (
                side.projection.name,
                side.projection.rows,
                side.pick(torch.arange(side.projection.rows), self.sizes).tolist(),
            )
            for side in (self.query, self.key)
        ]
        kinds = [
            (
                side.projection.as_matrix,
                side.projection.stored is None,
                side.qk_norm is None,
                side.factor is None,
            )
            for side in (self.query, self.key)
        ]
        facts = (self.layout, self.scaling, self.clip, self.position, self.is_capped, self.obstacle)
        return (self.sizes, self.width, self.self_attention, picked, kinds, facts)

    @property
    def rotary(self) -> Rotary | None:
        """The layer's rotation as it is now; None too where a gain comes behind it."""
        if self.gain_behind_rotation:
            return None
        rotary = self.rotation.read()
        if rotary is not None and 2 * rotary.inv_freq.numel() == self.sizes.shared:
            return rotary._replace(start=self.sizes.d_head - self.sizes.shared)
        return rotary

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return alive(self.holder)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.sizes.heads

    @property
    def norm_folded(self) -> bool:
        """Whether the norm that feeds the layer is part of what is read."""
        return self.feeding is not None

    @property
    def route(self) -> str:
        """How the weights were found, see :attr:`HeadProjections.route`."""
        found = "inferred" if self.layout == BY_RUNNING else "table"
        runs = self.query.projection.as_matrix or self.key.projection.as_matrix
        return f"{found}, as a matrix" if runs else found

    @property
    def norms(self) -> list[NormPlan]:
        """The norms that are folded into the weights."""
        return [norm for norm in (self.feeding, self.query.qk_norm, self.key.qk_norm) if norm is not None]

    @property
    def is_flat(self) -> bool:
        """Whether FSDP's first version flattens the weights: they are whole inside of :meth:`gathered` only."""
        return self.unit is not None

    def is_sharded(self) -> bool:
        """Whether reading gathers weights from other processes now; FSDP2 shards and gathers as training goes."""
        parts = [self.query.projection.is_sharded(), self.key.projection.is_sharded()]
        return self.is_flat or any(parts) or any(norm.is_sharded() for norm in self.norms)

    def is_view(self) -> bool:
        """Whether reading takes no memory for the weights: they are views of what is stored."""
        sides = (self.query, self.key)
        return not self.norms and all(side.projection.is_view() and side.factor is None for side in sides)

    @property
    def numel(self) -> int:
        """How many numbers the weights of query and key are."""
        sizes = self.sizes
        return sizes.d_head * (sizes.heads * self.width[0] + sizes.kv_heads * self.width[1])

    def gathered(self, *, grads: bool = False) -> AbstractContextManager[None]:
        """Within this block flat parameters are whole; with ``grads`` their gradients too, to be changed."""
        return gathered(self.unit, grads=grads)

    def parameters(self, side: str | None = None) -> list[nn.Parameter]:
        """The parameters that the weights of query and key (or of one, by name) depend on, each once."""
        modules: list[nn.Module] = [] if self.feeding is None else [self.feeding.module]
        found: list[nn.Parameter] = []
        for own in (self.query, self.key) if side is None else (self._side(side),):
            found += own.projection.weight_parameters()
            if own.qk_norm is not None:
                modules.append(own.qk_norm.module)
            if own.factor is not None:
                found.append(getattr(self.module, own.factor.parameter))
        return list(
            dict.fromkeys(found + [parameter for module in modules for parameter in module.parameters()])
        )

    def gradient_view(self, side: str, made: dict[nn.Parameter, Tensor]) -> Tensor | None:
        """The part of a weight's gradient that belongs to one side, (heads, d_head, d_in), to be added to.

        None where the side is no view of a whole weight: sharded, with a norm folded in, or in an order of rows
        that takes a copy.

        Args:
            side: ``"query"`` or ``"key"``.
            made: gradients of parameters that have none yet; one that is missing is made and put there.
        """
        own = self._side(side)
        weight = own.projection.plain_weight()
        folded = (self.feeding, own.qk_norm, own.factor)
        if weight is None or any(part is not None for part in folded):
            return None
        if own.view(weight, self.sizes) is None:
            return None
        grad = weight.grad if weight.grad is not None else made.get(weight)
        if grad is None:
            grad = made[weight] = torch.zeros_like(weight)
        return own.view(grad, self.sizes)

    def _side(self, name: str) -> Side:
        return {"query": self.query, "key": self.key}[name]

    def read(self) -> HeadProjections:
        """The projections as they are now.

        Collective where weights are sharded. Differentiable, but for flat parameters outside of
        :meth:`gathered`, of which copies are given.
        """
        from_query = self.query.projection.read()
        from_key = from_query if self.key.projection is self.query.projection else self.key.projection.read()
        query, key = self._split(self.query, from_query), self._split(self.key, from_key)
        if self.feeding is not None:
            norm = self.feeding.read()
            query, key = fold_layer_norm(norm, query), fold_layer_norm(norm, key)
        if self.query.qk_norm is not None:
            query = fold_qk_norm(self.query.qk_norm, query)
        if self.key.qk_norm is not None:
            key = fold_qk_norm(self.key.qk_norm, key)
        if query.weight.dtype != key.weight.dtype:
            # What is folded into one side is not rounded to the other's type.
            dtype = torch.promote_types(query.weight.dtype, key.weight.dtype)
            query, key = query.to(dtype), key.to(dtype)
        return HeadProjections(
            query=query.weight,
            key=key.weight,
            query_bias=query.bias,
            key_bias=key.bias,
            scaling=self.scaling,
            layout=self.layout,
            route=self.route,
            rotary=self.rotary,
            position=self.position,
            qk_norm=self.qk_norm,
            self_attention=self.self_attention,
            norm_folded=self.norm_folded,
            key_layer=self.key_layer,
            shared=self.sizes.shared,
            clip=self.clip,
        )

    def copy(self) -> HeadProjections:
        """The projections as they are now, detached and on their own storage; gathers flat parameters too."""
        with self.gathered(), torch.no_grad():
            head = self.read()
            return replace(
                head,
                query=head.query.clone(),
                key=head.key.clone(),
                query_bias=None if head.query_bias is None else head.query_bias.clone(),
                key_bias=None if head.key_bias is None else head.key_bias.clone(),
            )

    def _split(self, side: Side, affine: Affine) -> Affine:
        weight = side.pick(affine.weight, self.sizes)
        bias = None if affine.bias is None else side.pick(affine.bias, self.sizes)
        if side.factor is not None:
            factor = whole(side.factor.values(self.module))
            weight = weight * factor[..., None]
            bias = None if bias is None else bias * factor
        for name in side.added:
            numbers = whole(getattr(self.module, name)).reshape(weight.shape[:2])
            bias = numbers if bias is None else bias + numbers
        return Affine(weight, bias)


# What torch itself keeps of a module; whether it trains changes with every validation.
_OF_TORCH = frozenset({*vars(nn.Module()), "training"})
# After so many changes without any effect an attribute is taken for a counter.
_HARMLESS_CHANGES = 3

_Places = dict[tuple[int, str], Any]


class Constants:
    """The plain attributes and the buffers of a layer and all modules in it, to see whether they changed.

    A temperature that is annealed, a gate that is closed, an expert that is chosen: what was found out about the
    layer holds as long as they stay. Nothing of the device is waited for. What changes several times and turns out
    to change nothing, such as a counter of steps, is not looked at any more.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._changes: dict[tuple[int, str], int] = {}
        self._kept = self._now()

    def are_kept(self) -> bool:
        """Whether nothing changed since then."""
        return self._module() is None or not self._changed(self._now())

    def keep(self) -> None:
        """Take what is there now for what was kept: it was seen to make no difference."""
        now = self._now()
        for place in self._changed(now):
            self._changes[place] = self._changes.get(place, 0) + 1
        self._kept = now

    def _changed(self, now: _Places) -> list[tuple[int, str]]:
        return [
            place
            for place in {**self._kept, **now}
            if self._kept.get(place, now) != now.get(place, now)
            and self._changes.get(place, 0) < _HARMLESS_CHANGES
        ]

    def _now(self) -> _Places:
        module = self._module()
        found: _Places = {}
        for place, own in enumerate(() if module is None else module.modules()):
            for name, value in own.__dict__.items():
                if name not in _OF_TORCH and _is_plain(value):
                    found[place, name] = value
            for name, buffer in own._buffers.items():
                if buffer is not None:
                    found[place, name] = (id(buffer), _version(buffer))
        return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(isinstance(part, bool | int | float | str) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not say."""
    return -1 if tensor.is_inference() else tensor._version
