"""How one attention layer is read: found out once, so that reading it again takes nothing but live tensors."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.functional.rotary import Rotary
from lightning_qk.heads.errors import UnreadLayer
from lightning_qk.heads.find import Site
from lightning_qk.heads.folding import feeding_norm, fold_input_norm
from lightning_qk.heads.layouts import Layout, find_layout, unsupported
from lightning_qk.heads.linear import Affine, AffinePlan
from lightning_qk.heads.norms import NormPlan
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.qk_norm import Rows, fold_qk_norm, plan_qk_norms
from lightning_qk.heads.rotary import read_rotary
from lightning_qk.heads.sharding import flat_root, flat_unit, unflattened
from lightning_qk.heads.sizes import Sizes, head_sizes, softmax_scaling


class Side(NamedTuple):
    """Query or key of one layer: where its rows lie, and the norms to fold into them."""

    affine: AffinePlan
    pick: Callable[[Tensor, Sizes], Tensor]
    qk_norm: NormPlan | None

    def view(self, parameter: Tensor, sizes: Sizes) -> Tensor | None:
        """The part of a tensor of the weight's shape that belongs to this side, (heads, d_head, d_in), as a view.

        None where the layout's order needs a copy.
        """
        rows = self.pick(self.affine.as_rows(parameter), sizes)
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
        rotary: the layer's rotation.
        qk_norm: a norm stands between projection and dot product.
        self_attention: queries and keys come from the same tokens.
        norm_folded: the norm that feeds the layer is part of what is read.
    """

    def __init__(self, site: Site, fold_norm: bool, wrappers: tuple[nn.Module, ...] = ()) -> None:
        """Find out how a layer is read.

        Args:
            site: the layer where it stands.
            fold_norm: look for the norm that feeds it.
            wrappers: modules around the model that the site was found in, nearest first.

        Raises:
            UnreadLayer: it cannot be read.
        """
        chain = (site.module, *site.ancestors, *wrappers)
        layout = find_layout(site.module)
        if layout is None:
            children = ", ".join(name for name, _ in site.module.named_children()) or "none"
            raise UnreadLayer(
                f"{type(site.module).__name__} has no known layout of q and k (its children: {children})"
            )
        reason = unsupported(site.module)
        if reason is not None:
            raise UnreadLayer(reason)
        self.name = site.name
        self.layout = layout.name
        unit = flat_unit(chain)
        self._unit = None if unit is None else weakref.ref(unit)
        # The outermost unit of a part of a model need not be the root: the root has to be seen to be one.
        root = flat_root(chain)
        self._root = weakref.ref(root) if root is not None and root is chain[-1] else None
        with self.gathered():
            self._plan(site, layout, fold_norm)

    def _plan(self, site: Site, layout: Layout, fold_norm: bool) -> None:
        module = site.module
        query = AffinePlan(module.get_submodule(layout.query), layout.query)
        key = query
        if layout.key != layout.query:
            key = AffinePlan(module.get_submodule(layout.key), layout.key)
        self.sizes = head_sizes(module, site.config, (query.rows, key.rows), layout.order.blocks)
        self.width = query.columns, key.columns
        self.self_attention = not site.is_cross and query.columns == key.columns
        self._feeding: NormPlan | None = None
        if fold_norm and self.self_attention:
            like: Tensor = query.module.weight  # type: ignore[assignment]
            self._feeding = feeding_norm(module, site.ancestors, query.columns, like)
        norms = plan_qk_norms(module, self.sizes)
        self.query = Side(query, layout.order.query, norms.get("query"))
        self.key = Side(key, layout.order.key, norms.get("key"))
        self.qk_norm = bool(norms)
        self.scaling = softmax_scaling(module, self.sizes.d_head)
        self.rotary: Rotary | None = read_rotary(module, site.ancestors, site.config, self.sizes.d_head)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.sizes.heads

    @property
    def norm_folded(self) -> bool:
        """Whether the norm that feeds the layer is part of what is read."""
        return self._feeding is not None

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
        parts = [self.query.affine.is_sharded(), self.key.affine.is_sharded()]
        return self.is_flat or any(parts) or any(norm.is_sharded() for norm in self.norms)

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
            found += own.affine.weight_parameters()
            if own.qk_norm is not None:
                modules.append(own.qk_norm.module)
        return list(
            dict.fromkeys(found + [parameter for module in modules for parameter in module.parameters()])
        )

    def gradient_view(self, side: str) -> Tensor | None:
        """The part of a weight's ``.grad`` that belongs to one side, (heads, d_head, d_in), to be added to.

        The gradient is made where there is none. None where the side is no view of a whole weight: sharded,
        with a norm folded in, or in an order of rows that takes a copy.
        """
        own = self._side(side)
        weight = own.affine.plain_weight()
        if weight is None or self._feeding is not None or own.qk_norm is not None:
            return None
        if own.view(weight, self.sizes) is None:
            return None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return own.view(weight.grad, self.sizes)

    def _side(self, name: str) -> Side:
        return {"query": self.query, "key": self.key}[name]

    def read(self) -> HeadProjections:
        """The projections as they are now.

        Collective where weights are sharded. Differentiable, but for flat parameters outside of
        :meth:`gathered`, of which copies are given.
        """
        from_query = self.query.affine.read()
        from_key = from_query if self.key.affine is self.query.affine else self.key.affine.read()
        query, key = self._split(self.query, from_query), self._split(self.key, from_key)
        if self._feeding is not None:
            norm = self._feeding.read()
            query, key = fold_input_norm(norm, query), fold_input_norm(norm, key)
        if self.query.qk_norm is not None:
            query = fold_qk_norm(self.query.qk_norm, query)
        if self.key.qk_norm is not None:
            key = fold_qk_norm(self.key.qk_norm, key)
        return HeadProjections(
            query=query.weight,
            key=key.weight,
            query_bias=query.bias,
            key_bias=key.bias,
            scaling=self.scaling,
            layout=self.layout,
            rotary=self.rotary,
            qk_norm=self.qk_norm,
            self_attention=self.self_attention,
            norm_folded=self.norm_folded,
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
        bias = None if affine.bias is None else side.pick(affine.bias, self.sizes)
        return Rows(side.pick(affine.weight, self.sizes), bias)


def identity(model: nn.Module) -> Iterator[int]:
    """What tells whether a model has the same modules, of the same classes, as before."""
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None:
            yield id(module)
            yield id(type(module))
            stack.extend(module._modules.values())
