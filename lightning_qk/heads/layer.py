"""How one attention layer is read: found out once, so that reading it again takes nothing but live tensors."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.origin import is_known
from lightning_qk.functional.rotary import Rotary
from lightning_qk.heads.dry_run import Trial, input_arguments
from lightning_qk.heads.facts import (
    CHANNELS,
    Constants,
    Factor,
    Finding,
    attends_over_channels,
    configured_clip,
    finding_of,
    learnt_factors,
)
from lightning_qk.heads.inferred_layout import Found, find_rows, rows_at
from lightning_qk.heads.layouts import Layout, added_to_queries, borrows_keys, fitting_layouts, unsupported
from lightning_qk.heads.norms import (
    NormPlan,
    Rows,
    feeding_norm,
    fold_input_norm,
    fold_qk_norm,
    is_before_projections,
    is_behind_rotation,
    plan_norm_of,
    plan_qk_norm,
)
from lightning_qk.heads.position import NONE, RELATIVE_BIAS, find_position, find_rotation
from lightning_qk.heads.projection import Projection, adapter_around, with_adapter
from lightning_qk.heads.projections import (
    Affine,
    HeadProjections,
    InaccessibleWeights,
    NotTokenAttention,
    UnreadLayer,
)
from lightning_qk.heads.sharding import alive, flat_root, flat_unit, unflattened, whole
from lightning_qk.heads.sites import Site, key_lender
from lightning_qk.heads.sizes import Sizes, expanded_sizes, head_sizes, softmax_scaling, uneven_sizes

_BY_RUNNING = "found by running"
"""What stands for the layout's name where a run told it."""


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


class LayerPlan:
    """What is known of one attention layer without its weights' values, and how to read those.

    Modules are referred to weakly, so that a plan can be kept beside a model without keeping it alive.

    Attributes:
        name: qualified name.
        sizes: head counts and width of a head.
        width: d_query and d_key.
        scaling: the softmax scale.
        layout: the layout's name.
        position: what positions do to the logits.
        qk_norm: a norm stands between projection and dot product.
        normalizes: it acts on the very vectors that are multiplied, and not on a latent within the projections:
            a factor on those weights is lost.
        self_attention: queries and keys come from the same tokens.
        norm_folded: the norm that feeds the layer is part of what is read.
        key_layer: qualified name of the layer whose keys are used, None for own ones.
        is_decided: whether `self_attention` is known. False where the layer's forward takes queries and keys as
            arguments of their own, and nothing but a call tells whether they are the same tensor: taken for
            self-attention until then, unless names say that it crosses (see `Finding`).
        clip: the bound that q and k are clamped to behind the projections, or None: the form is that without it.
        obstacle: why heads must not be scaled by their rows, as a clause about the weights, or None.
        is_capped: a layer of no known class bounds its large logits.
    """

    def __init__(
        self,
        site: Site,
        fold_norm: bool,
        wrappers: tuple[nn.Module, ...] = (),
        *,
        finding: Finding | None = None,
    ) -> None:
        """Find out how a layer is read.

        Args:
            site: the layer where it stands.
            fold_norm: look for the norm that feeds it.
            wrappers: modules around the model that the site was found in, nearest first.
            finding: what its real call has shown; None for what is known of it.

        Raises:
            UnreadLayer: it cannot be read.
        """
        chain = (site.module, *site.ancestors, *wrappers)
        self._finding = finding or finding_of(site.module) or Finding()
        ways, layout = self._finding.ways, self._finding.layout
        trusts_names = is_known(site.module) and not ways
        reason = self._finding.reason
        if reason is None and trusts_names:
            reason = unsupported(site.module)
        if reason is not None:
            raise UnreadLayer(reason)
        self.name = site.name
        unit = flat_unit(chain)
        self._unit = None if unit is None else weakref.ref(unit)
        # The outermost unit of a part of a model need not be the root: the root has to be seen to be one.
        root = flat_root(chain)
        self._root = weakref.ref(root) if root is not None and root is chain[-1] else None
        lender = key_lender(site)
        if lender is not None and unit is not None:
            raise InaccessibleWeights(
                f"its keys are those of {lender.name}, which FSDP keeps flat in a unit of its own: use FSDP2 "
                "(ModelParallelStrategy, see configs/fsdp2.yaml)"
            )
        self.key_layer = None if lender is None else lender.name
        self.is_decided = True
        self.clip: float | None = None
        self.obstacle: str | None = None
        self.is_capped = False
        self.position: str | None = None
        self._constants = Constants(site.module)
        with self.gathered():
            if layout is not None:
                self._plan(site, layout, None if lender is None else lender.module, fold_norm)
                self.is_decided = len(input_arguments(site.module)) <= 1
            elif not trusts_names:
                self._run(site, fold_norm, ways)
            else:
                self._choose(site, None if lender is None else lender.module, fold_norm)

    def _run(self, site: Site, fold_norm: bool, ways: Sequence[Trial]) -> None:
        """Plan by what a run tells, whatever the names of its children say."""
        if borrows_keys(site.module):
            raise UnreadLayer("it uses the keys of an earlier layer, which no run of it alone tells")
        try:
            found = find_rows(site.module, site.config, ways=ways)
        except (InaccessibleWeights, NotTokenAttention):
            raise
        except UnreadLayer as reason:
            raise UnreadLayer(_why_run(site.module, reason)) from None
        self._plan_found(site, found, fold_norm)

    def _choose(self, site: Site, lender: nn.Module | None, fold_norm: bool) -> None:
        """Plan by the first layout that fits, and goes with the sizes where that has to tell."""
        if attends_over_channels(site.module, site.config):
            raise NotTokenAttention(CHANNELS)
        self.clip = configured_clip(site.module, site.config)
        first: UnreadLayer | None = None
        for layout in fitting_layouts(site.module, lender):
            try:
                return self._plan(site, layout, lender, fold_norm)
            except UnreadLayer as reason:  # noqa: PERF203
                first = first or reason
                if not layout.tentative:
                    break
        if isinstance(first, InaccessibleWeights):
            raise first
        try:
            found = None if lender is not None else find_rows(site.module, site.config)
        except InaccessibleWeights:
            raise
        except UnreadLayer as reason:
            found = None
            if first is None:
                first = UnreadLayer(_why_run(site.module, reason))
        # What contradicts the layer's own sizes counts only if it runs to its end so.
        if found is None or (first is not None and not found.complete):
            assert first is not None  # a lender is found by a layout
            raise first
        self._plan_found(site, found, fold_norm)

    def _plan_found(self, site: Site, found: Found, fold_norm: bool) -> None:
        """Plan by what a run of the layer alone has told."""
        self.layout = _BY_RUNNING
        heads, d_head = found.query.rows.shape
        self.sizes = Sizes(heads, len(found.key.rows), d_head, found.key.shared)
        self.query, self.key = (
            Side(
                own.projection,
                rows_at(own.rows),
                None if own.norm is None else plan_norm_of(own.norm, len(own.rows), d_head, side),
            )
            for side, own in (("query", found.query), ("key", found.key))
        )
        self.qk_norm = any(own.norm is not None or own.normed for own in (found.query, found.key))
        self.normalizes = self.qk_norm
        self.scaling = softmax_scaling(site.module, d_head) if found.scaling is None else found.scaling
        self.is_decided, self.clip = found.is_decided, found.clip
        # Of several inputs of one width only a call tells whether they are the same.
        self._place(site, found.crosses and found.is_decided, [], fold_norm)
        self.is_capped = found.is_capped
        if not found.is_exclusive:
            self.obstacle = (
                "which make more than queries and keys (values that are the keys, say), or of which a run of the "
                "layer alone does not tell: give queries and keys projections of their own"
            )
        # What a run shows weighs more than names that say nothing.
        if self.position == NONE and found.is_added_to:
            self.position = RELATIVE_BIAS
        elif self.position == NONE and found.is_turned:
            self.position = None

    def _plan(self, site: Site, layout: Layout, lender: nn.Module | None, fold_norm: bool) -> None:
        """Plan by a layout."""
        module, source = site.module, lender or site.module
        self.layout = layout.name
        query = layout.query.projection(module)
        key = query if layout.key == layout.query else layout.key.projection(module, lender)
        around = adapter_around(module, site.ancestors)
        if around is not None:
            fused = query is key
            query = with_adapter(query, around)
            key = query if fused else with_adapter(key, around)
        self.sizes = _sizes(site, layout, query, key)
        inner = [*layout.query.inner_norms(module), *layout.key.inner_norms(source)]
        factors = learnt_factors(module)
        norms = (
            plan_qk_norm(module, "query", self.sizes, inner),
            plan_qk_norm(source, "key", self.sizes, inner),
        )
        if norms[0] is not None and is_before_projections(module, norms[0], query.columns):
            norms = None, None
        added = (*added_to_queries(module), *self._finding.added)
        self.query = Side(query, layout.order.query, norms[0], factors.get("query"), added)
        self.key = Side(key, layout.order.key, norms[1], factors.get("key"))
        cosine = any(factor.normalizes for factor in factors.values())
        within = query.normed or key.normed
        behind = any(side.qk_norm is not None for side in (self.query, self.key))
        self.normalizes = cosine or behind or layout.normalizes
        self.qk_norm = within or self.normalizes
        if factors:
            self.scaling = 1.0 / self.sizes.d_head if cosine else 1.0
        else:
            self.scaling = softmax_scaling(module, self.sizes.d_head)
        self._place(site, layout.crosses, inner, fold_norm)

    def _place(self, site: Site, crosses: bool, inner: list[nn.Module], fold_norm: bool) -> None:
        """Find out what comes to the two sides, and what positions do.

        Args:
            site: the layer.
            crosses: it is known to take queries and keys from different inputs.
            inner: norms that are part of the projections.
            fold_norm: look for the norm that feeds the layer.
        """
        query, key = self.query.projection, self.key.projection
        self._layer = weakref.ref(site.module)
        behind = [side.qk_norm for side in (self.query, self.key) if side.qk_norm is not None]
        self._gain_behind = bool(behind) and is_behind_rotation(site.module, behind[0])
        self.width = query.columns, key.columns
        self.self_attention = not crosses and not site.is_cross and query.columns == key.columns
        if self._finding.self_attention is not None:
            self.self_attention = self._finding.self_attention and query.columns == key.columns
        self._feeding: NormPlan | None = None
        if fold_norm and self.self_attention and self.key_layer is None:
            known = [*inner, *(norm.module for norm in behind)]
            self._feeding = feeding_norm(site.module, site.ancestors, query.columns, _like(query), known)
        where = (site.module, site.ancestors, site.config)
        # Of what all keys share there is one a token.
        heads = 1 if self.sizes.shared else self.sizes.kv_heads
        self._rotation = find_rotation(*where, self.sizes.d_head, heads=heads, is_cross=site.is_cross)
        self.position = find_position(*where, self._rotation, is_cross=site.is_cross)

    def is_current(self) -> bool:
        """Whether the numbers that the layer keeps beside its parameters are those that it was planned with."""
        return self._constants.are_kept()

    def reads_as(self, other: "LayerPlan") -> bool:
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
        if self._gain_behind:
            return None
        rotary = self._rotation.read()
        if rotary is not None and 2 * rotary.inv_freq.numel() == self.sizes.shared:
            return rotary._replace(start=self.sizes.d_head - self.sizes.shared)
        return rotary

    @property
    def gain_behind_rotation(self) -> bool:
        """Whether the gain of the norm of queries and keys acts on what was rotated."""
        return self._gain_behind

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
        if self._unit is None:
            return nullcontext()
        unit = self._unit()
        assert unit is not None  # it contains the layer, whose modules are alive
        return unflattened(unit, None if self._root is None else self._root(), grads=grads)

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
            query, key = fold_input_norm(norm, query), fold_input_norm(norm, key)
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

    def _split(self, side: Side, affine: Affine) -> Rows:
        weight = side.pick(affine.weight, self.sizes)
        bias = None if affine.bias is None else side.pick(affine.bias, self.sizes)
        if side.factor is not None:
            factor = whole(side.factor.values(alive(self._layer)))
            weight = weight * factor[..., None]
            bias = None if bias is None else bias * factor
        for name in side.added:
            numbers = whole(getattr(alive(self._layer), name)).reshape(weight.shape[:2])
            bias = numbers if bias is None else bias + numbers
        return Rows(weight, bias)


def _sizes(site: Site, layout: Layout, query: Projection, key: Projection) -> Sizes:
    """The head counts and width that explain the rows of a layout."""
    wanted = layout.order.blocks(1, 1)
    if all(wanted):
        return head_sizes(site.module, site.config, (query.rows, key.rows), layout.order.blocks)
    if any(wanted):
        shared = key.shared
        return expanded_sizes(site.module, site.config, query.rows, key.rows, shared)
    return uneven_sizes(site.module, site.config, query.rows)


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


def _like(affine: Projection) -> Tensor:
    """A tensor of the device and type that a map's input has."""
    return next(parameter for parameter in affine.module.parameters() if parameter.is_floating_point())


def identity(model: nn.Module) -> Iterator[int]:
    """What tells whether a model has the same modules, of the same classes, as before."""
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None:
            yield id(module)
            yield id(type(module))
            finding = finding_of(module)
            if finding is not None:
                yield id(finding)
            stack.extend(module._modules.values())
