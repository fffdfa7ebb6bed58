"""Plan for reading one attention layer: located and compiled once, then read from live parameters."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.functional.rotary import Rotary
from lightning_qk.heads.facts import (
    Finding,
    LayerFacts,
    Layout,
    Side,
    describe,
    learnt_factors,
)
from lightning_qk.heads.inferred_layout import Found, check_tokens, find_rows
from lightning_qk.heads.layouts import KnownLayout, added_to_queries, borrows_keys, fitting_layouts
from lightning_qk.heads.norms import (
    NormPlan,
    feeding_norm,
    fold_layer_norm,
    fold_qk_norm,
    is_before_projections,
    is_behind_rotation,
    plan_norm_of,
    plan_qk_norm,
)
from lightning_qk.heads.position import NONE, RELATIVE_BIAS, Rotation, find_position, find_rotation
from lightning_qk.heads.projection import adapter_around, with_adapter
from lightning_qk.heads.projections import (
    Affine,
    HeadProjections,
    InaccessibleWeights,
    NotTokenAttention,
    Sizes,
    UnreadLayer,
    layer_sizes,
    softmax_scaling,
)
from lightning_qk.heads.sharding import alive, gathered, whole
from lightning_qk.heads.sites import AttentionLayer
from lightning_qk.heads.trials import input_arguments

_BY_RUNNING = "found by running"
"""Name of layouts that were inferred by running a layer."""


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
    with gathered(facts.unit, facts.root):
        return compile_reader(facts, locate(facts), fold_norm)


def locate(facts: LayerFacts) -> Layout:
    """Where a layer's weights lie: by the table where its class is known, else by running it alone.

    The first entry of the table that fits is taken, tentative ones only if they explain the layer's sizes.

    Raises:
        UnreadLayer: neither finds them.
    """
    if facts.finding.layout is not None:
        return _by_table(facts, facts.finding.layout)
    first: UnreadLayer | None = None
    if facts.trusts_names:
        module = facts.layer.module
        check_tokens(module, facts.layer.config)
        for known in fitting_layouts(module, facts.kv_source):
            try:
                return replace(_by_table(facts, known), clip=facts.clip)
            except UnreadLayer as reason:  # noqa: PERF203
                first = first or reason
                if not known.tentative:
                    break
    if isinstance(first, InaccessibleWeights):
        raise first
    return _by_running(facts, first)


def _by_running(facts: LayerFacts, first: UnreadLayer | None) -> Layout:
    """The layout that a run of the layer alone shows; ``first`` is why an entry of the table does not fit."""
    module = facts.layer.module
    if borrows_keys(module):
        raise first or UnreadLayer("it uses the keys of an earlier layer, which no run of it alone tells")
    try:
        found = find_rows(module, facts.layer.config, ways=facts.finding.ways)
        # What contradicts the layer's own sizes counts only if it runs to its end so.
        if first is None or found.complete:
            return _inferred(facts, found)
    except InaccessibleWeights:
        raise
    except UnreadLayer as reason:
        if first is None and isinstance(reason, NotTokenAttention):
            raise
        raise first or UnreadLayer(_why_run(module, reason)) from None
    raise first


def _inferred(facts: LayerFacts, found: Found) -> Layout:
    """The layout that a run of the layer alone shows."""
    heads, d_head = found.query.rows.shape
    query, key = (
        Side(
            own.projection,
            _rows_at(own.rows),
            None if own.norm is None else plan_norm_of(own.norm, len(own.rows), d_head, side),
        )
        for side, own in (("query", found.query), ("key", found.key))
    )
    return Layout(
        _BY_RUNNING,
        query,
        key,
        Sizes(heads, len(found.key.rows), d_head, found.key.shared),
        softmax_scaling(facts.layer.module, d_head) if found.scaling is None else found.scaling,
        normalizes=any(own.norm is not None or own.normed for own in (found.query, found.key)),
        # Of several inputs of one width only a call tells whether they are the same.
        crosses=found.crosses and found.is_decided,
        is_decided=found.is_decided,
        clip=found.clip,
        obstacle=None
        if found.is_exclusive
        else (
            "which make more than queries and keys (values that are the keys, say), or of which a run of the "
            "layer alone does not tell: give queries and keys projections of their own"
        ),
        is_capped=found.is_capped,
        is_added_to=found.is_added_to,
        is_turned=found.is_turned,
    )


def _rows_at(places: Tensor) -> Callable[[Tensor, Sizes], Tensor]:
    """What takes the rows at places (heads, d_head) from a tensor (out, ...): a view where they are regular."""
    heads, d_head = places.shape
    start = int(places[0, 0])
    step = int(places[1, 0]) - start if heads > 1 else d_head
    regular = start + step * torch.arange(heads)[:, None] + torch.arange(d_head)
    is_view = step >= d_head and torch.equal(places, regular)

    def take(rows: Tensor, sizes: Sizes) -> Tensor:
        if is_view:
            return rows[start : start + (heads - 1) * step + d_head].unfold(0, d_head, step).movedim(-1, 1)
        return rows[places.to(rows.device)]

    return take


def _by_table(facts: LayerFacts, known: KnownLayout) -> Layout:
    """The layout that an entry of the table says.

    Raises:
        UnreadLayer: it does not go with what the layer has.
    """
    layer, module = facts.layer, facts.layer.module
    source = facts.kv_source or module
    query = known.query.projection(module)
    key = query if known.key == known.query else known.key.projection(module, facts.kv_source)
    around = adapter_around(module, layer.ancestors)
    if around is not None:
        fused = query is key
        query = with_adapter(query, around)
        key = query if fused else with_adapter(key, around)
    sizes = layer_sizes(module, layer.config, (query.rows, key.rows), known.order.blocks, key.shared)
    inner = [*known.query.inner_norms(module), *known.key.inner_norms(source)]
    factors = learnt_factors(module)
    norms = (
        plan_qk_norm(module, "query", sizes, inner),
        plan_qk_norm(source, "key", sizes, inner),
    )
    if norms[0] is not None and is_before_projections(module, norms[0], query.columns):
        norms = None, None
    added = (*added_to_queries(module), *facts.finding.added)
    cosine = any(factor.normalizes for factor in factors.values())
    if factors:
        scaling = 1.0 / sizes.d_head if cosine else 1.0
    else:
        scaling = softmax_scaling(module, sizes.d_head)
    return Layout(
        known.name,
        Side(query, known.order.query, norms[0], factors.get("query"), added),
        Side(key, known.order.key, norms[1], factors.get("key")),
        sizes,
        scaling,
        normalizes=cosine or known.normalizes or any(norm is not None for norm in norms),
        crosses=known.crosses,
        is_decided=facts.finding.layout is None or len(input_arguments(module)) <= 1,
        inner_norms=tuple(inner),
    )


def compile_reader(facts: LayerFacts, layout: Layout, fold_norm: bool = False) -> "LayerReader":
    """A reader of a layer whose weights were located; ``fold_norm`` looks for the norm that feeds it."""
    layer, sizes, finding = facts.layer, layout.sizes, facts.finding
    query, key = layout.query.projection, layout.key.projection
    self_attention = not layout.crosses and not layer.is_cross
    if finding.self_attention is not None:
        self_attention = finding.self_attention
    self_attention = self_attention and query.columns == key.columns
    behind = [side.qk_norm for side in (layout.query, layout.key) if side.qk_norm is not None]
    where = (layer.module, layer.ancestors)
    feeding = None
    if fold_norm and self_attention and facts.key_layer is None:
        known = [*layout.inner_norms, *(norm.module for norm in behind)]
        feeding = feeding_norm(*where, query.columns, known)
    # Of what all keys share there is one a token.
    heads = 1 if sizes.shared else sizes.kv_heads
    rotation = find_rotation(*where, layer.config, sizes.d_head, heads=heads, is_cross=layer.is_cross)
    position = find_position(*where, layer.config, rotation, is_cross=layer.is_cross)
    # What a run shows weighs more than names that say nothing.
    if position == NONE and layout.is_added_to:
        position = RELATIVE_BIAS
    elif position == NONE and layout.is_turned:
        position = None
    gain_behind = bool(behind) and is_behind_rotation(layer.module, behind[0])
    return LayerReader(facts, layout, self_attention, feeding, rotation, position, gain_behind)


class LayerReader:
    """Reads one layer; it is kept beside a model, refers to modules weakly and holds no weights.

    Attributes:
        name: qualified name.
        sizes: head counts and width of a head.
        width: d_query and d_key.
        scaling: the softmax scale.
        layout: the layout's name.
        position: what positions do to the logits.
        qk_norm: a norm is between projection and dot product.
        normalizes: it acts on the very vectors that are multiplied, and not on a latent within the projections:
            a factor on those weights is lost.
        self_attention: queries and keys come from the same tokens.
        key_layer: qualified name of the layer whose keys are used, None for own ones.
        is_decided: whether `self_attention` is known. False where the layer's forward takes queries and keys as
            arguments of their own, and nothing but a call tells whether they are the same tensor: taken for
            self-attention until then, unless names say that it crosses (see `Finding`).
        clip: the bound that q and k are clamped to behind the projections, or None: the form is that without it.
        obstacle: why heads must not be scaled by their rows, as a clause about the weights, or None.
        is_capped: a layer of no known class bounds its large logits.
        gain_behind_rotation: the gain of the norm of queries and keys acts on what was rotated.
    """

    def __init__(
        self,
        facts: LayerFacts,
        layout: Layout,
        self_attention: bool,
        feeding: NormPlan | None,
        rotation: Rotation,
        position: str | None,
        gain_behind_rotation: bool,
    ) -> None:
        self.name, self.key_layer = facts.layer.name, facts.key_layer
        self._layer = weakref.ref(facts.layer.module)
        self._unit, self._root = facts.unit, facts.root
        self._constants = facts.constants
        self.layout, self.query, self.key = layout.name, layout.query, layout.key
        self.sizes, self.scaling = layout.sizes, layout.scaling
        self.width = layout.query.projection.columns, layout.key.projection.columns
        self.qk_norm, self.normalizes = layout.qk_norm, layout.normalizes
        self.is_decided, self.is_capped = layout.is_decided, layout.is_capped
        self.clip, self.obstacle = layout.clip, layout.obstacle
        self.self_attention, self.position = self_attention, position
        self._feeding, self._rotation = feeding, rotation
        self.gain_behind_rotation = gain_behind_rotation

    def is_current(self) -> bool:
        """Whether the numbers that the layer keeps beside its parameters are those that it was compiled with."""
        return self._constants.are_kept()

    def reads_as(self, other: "LayerReader") -> bool:
        """Whether another plan of the layer says the same; both are then taken to be current."""
        if self._told() != other._told():
            return False
        self._constants.keep()
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
        rotary = self._rotation.read()
        if rotary is not None and 2 * rotary.inv_freq.numel() == self.sizes.shared:
            return rotary._replace(start=self.sizes.d_head - self.sizes.shared)
        return rotary

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return alive(self._layer)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.sizes.heads

    @property
    def norm_folded(self) -> bool:
        """Whether the norm that feeds the layer is part of what is read."""
        return self._feeding is not None

    @property
    def route(self) -> str:
        """How the weights were found, see :attr:`HeadProjections.route`."""
        found = "inferred" if self.layout == _BY_RUNNING else "table"
        runs = self.query.projection.as_matrix or self.key.projection.as_matrix
        return f"{found}, as a matrix" if runs else found

    @property
    def norms(self) -> list[NormPlan]:
        """The norms that are folded into the weights."""
        return [norm for norm in (self._feeding, self.query.qk_norm, self.key.qk_norm) if norm is not None]

    @property
    def is_flat(self) -> bool:
        """Whether FSDP's first version flattens the weights: they are whole inside of :meth:`gathered` only."""
        return self._unit is not None

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
        return gathered(self._unit, self._root, grads=grads)

    def parameters(self, side: str | None = None) -> list[nn.Parameter]:
        """The parameters that the weights of query and key (or of one, by name) depend on, each once."""
        modules: list[nn.Module] = [] if self._feeding is None else [self._feeding.module]
        found: list[nn.Parameter] = []
        for own in (self.query, self.key) if side is None else (self._side(side),):
            found += own.projection.weight_parameters()
            if own.qk_norm is not None:
                modules.append(own.qk_norm.module)
            if own.factor is not None:
                found.append(getattr(alive(self._layer), own.factor.parameter))
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
        folded = (self._feeding, own.qk_norm, own.factor)
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
        if self._feeding is not None:
            norm = self._feeding.read()
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
            factor = whole(side.factor.values(alive(self._layer)))
            weight = weight * factor[..., None]
            bias = None if bias is None else bias * factor
        for name in side.added:
            numbers = whole(getattr(alive(self._layer), name)).reshape(weight.shape[:2])
            bias = numbers if bias is None else bias + numbers
        return Affine(weight, bias)


def _why_run(module: nn.Module, reason: UnreadLayer) -> str:
    """Why a layer is not read that had to be run."""
    kind = type(module).__name__
    if next(fitting_layouts(module), None) is not None:
        return (
            f"{kind} is no class of a known library, so that the names of its children do not tell its layout, "
            f"and running it alone does not tell: {reason}"
        )
    children = ", ".join(name for name, _ in module.named_children()) or "none"
    return (
        f"{kind} has no known layout of q and k (its children: {children}), and running it alone does not tell: "
        f"{reason}"
    )
