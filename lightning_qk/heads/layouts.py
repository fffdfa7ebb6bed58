"""Where the query and key weights lie in an attention layer: one entry per layout.

A layout says what holds the weights, by the names of children and parameters, and which of its output rows
belong to q and k. It is chosen by those names, and by a fact of the layer where one name is used for two
orders. To read a new model, add a line to `LAYOUTS`; head counts, norms, rotary and scaling are found elsewhere.
"""

import inspect
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import gives_back
from lightning_qk.architecture.source_code import is_named
from lightning_qk.heads.live_weights import alive
from lightning_qk.heads.module_projection import projection_of
from lightning_qk.heads.norms import NormPlan, plan_norm
from lightning_qk.heads.projection import (
    Composition,
    Part,
    Projection,
    composed,
    constant_projection,
    parameter_projection,
)
from lightning_qk.heads.projections import Sizes, UnreadLayer


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for part in path.split("."):
        found = found._modules.get(part)
        if found is None:
            return None
    return found


class Source(ABC):
    """Parameters that hold the weights of one side of a layer."""

    @abstractmethod
    def fits(self, module: nn.Module, kv_source: nn.Module | None = None) -> bool:
        """Whether the layer has it.

        Args:
            module: the layer.
            kv_source: the layer whose keys it uses instead of its own.
        """

    @abstractmethod
    def projection(self, module: nn.Module, kv_source: nn.Module | None = None) -> Projection:
        """How it is read from one layer.

        Raises:
            UnreadLayer: it cannot be.
        """

    def weight(self, module: nn.Module) -> Tensor | None:
        """The stored tensor whose first dimension runs over heads, where there is one."""
        return None


@dataclass(frozen=True)
class Child(Source):
    """A child that maps the layer's input.

    Attributes:
        path: of the child, dotted where it is a child's child.
    """

    path: str

    def fits(self, module: nn.Module, kv_source: nn.Module | None = None) -> bool:  # noqa: D102
        return _child(kv_source or module, self.path) is not None

    def projection(self, module: nn.Module, kv_source: nn.Module | None = None) -> Projection:  # noqa: D102
        return projection_of((kv_source or module).get_submodule(self.path), self.path)

    def weight(self, module: nn.Module) -> Tensor | None:  # noqa: D102
        return getattr(_child(module, self.path), "weight", None)


@dataclass(frozen=True)
class Bare(Source):
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

    def fits(self, module: nn.Module, kv_source: nn.Module | None = None) -> bool:  # noqa: D102
        weight = (kv_source or module)._parameters.get(self.name)
        return weight is not None and weight.dim() == (3 if self.transposed else 2)

    def projection(self, module: nn.Module, kv_source: nn.Module | None = None) -> Projection:  # noqa: D102
        stride = None if self.transposed else 1
        return parameter_projection(
            kv_source or module, self.name, stride=stride, bias=self.bias, part=self.part
        )

    def weight(self, module: nn.Module) -> Tensor | None:  # noqa: D102
        return None if self.transposed else module._parameters.get(self.name)


@dataclass(frozen=True)
class Constant(Source):
    """No projection: a parameter of the layer is cut into heads as it is, whatever the input.

    Attributes:
        name: of the parameter, whose last dimension runs over all heads.
    """

    name: str

    def fits(self, module: nn.Module, kv_source: nn.Module | None = None) -> bool:  # noqa: D102
        return module._parameters.get(self.name) is not None

    def projection(self, module: nn.Module, kv_source: nn.Module | None = None) -> Projection:  # noqa: D102
        return constant_projection(module, self.name)


@dataclass(frozen=True)
class Latent(Source):
    """A map through a latent of low rank, with a norm on the latent: ``up(norm(down x))``.

    The norm's gain is folded in; the normalization itself, one positive number a token, stays out, and so do
    what is added behind it: the norm's offset and the bias of ``up``.

    Attributes:
        down: the child that makes the latent.
        norm: the child that normalizes it; the map is read without one where the layer has none.
        up: the child that expands it.
        shared: ``down`` has rows behind the latent, which are no part of it and bypass norm and ``up``:
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

    def fits(self, module: nn.Module, kv_source: nn.Module | None = None) -> bool:  # noqa: D102
        return _child(module, self.up) is not None and _child(kv_source or module, self.down) is not None

    def projection(self, module: nn.Module, kv_source: nn.Module | None = None) -> Projection:  # noqa: D102
        source = kv_source or module
        down, up = Child(self.down).projection(source), Child(self.up).projection(module)
        shared = down.rows - up.columns
        if shared < 0 or (shared > 0 and not self.shared):
            raise UnreadLayer(
                f"its {self.down!r} gives {down.rows} numbers, and its {self.up!r} takes {up.columns}"
            )
        name = next((name for name in self.factors if hasattr(module, name)), None)
        layer = weakref.ref(module)
        factor = None if name is None else lambda: float(getattr(alive(layer), name))
        below = Composition([Part(torch.arange(up.columns), down, slice(up.columns))])
        norm = _norm_in(source, self.norm, up.columns)
        parts = [Part(torch.arange(up.rows), up, slice(None), below, norm, factor)]
        if shared:
            places = torch.arange(up.rows, up.rows + shared)
            norm = None if self.shared_norm is None else _norm_in(source, self.shared_norm, shared)
            parts.append(Part(places, down, slice(up.columns, None), norm=norm))
        return composed(parts, up.name, expansion=up, shared=shared)

    def weight(self, module: nn.Module) -> Tensor | None:  # noqa: D102
        return Child(self.up).weight(module)


def _norm_in(module: nn.Module, name: str, width: int) -> NormPlan | None:
    norm = _child(module, name)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    plan = plan_norm(norm, (width,))
    if plan is None:
        raise UnreadLayer(
            f"the norm {name!r} in its projections is a {type(norm).__name__}, which is no RMSNorm or LayerNorm"
        )
    return plan


class Order(NamedTuple):
    """Which rows of the projections belong to q and k.

    Attributes:
        blocks: (heads, kv_heads) to the number of d_head-row blocks in the two modules' outputs; 0 where values of
            any width lie among them.
        query: rows ``(out, ...)`` of the query's module to ``(heads, d_head, ...)``.
        key: rows ``(out, ...)`` of the key's module to ``(kv_heads, d_head, ...)``.
    """

    blocks: Callable[[int, int], tuple[int, int]]
    query: Callable[[Tensor, Sizes], Tensor]
    key: Callable[[Tensor, Sizes], Tensor]


def _first_query(rows: Tensor, sizes: Sizes) -> Tensor:
    return _blocks(rows, 0, sizes.heads, sizes.d_head)


def _first_key(rows: Tensor, sizes: Sizes) -> Tensor:
    return _blocks(rows, 0, sizes.kv_heads, sizes.d_head)


def _key_after_query(rows: Tensor, sizes: Sizes) -> Tensor:
    return _blocks(rows, sizes.heads, sizes.kv_heads, sizes.d_head)


def _blocks(rows: Tensor, start: int, count: int, d_head: int) -> Tensor:
    return rows[start * d_head : (start + count) * d_head].unflatten(0, (count, d_head))


def _by_group(rows: Tensor, sizes: Sizes) -> Tensor:
    """Rows as (kv_heads, queries of the group + k + v, d_head, ...)."""
    return rows.unflatten(0, (sizes.kv_heads, sizes.heads // sizes.kv_heads + 2, sizes.d_head))


def _by_partition(rows: Tensor, sizes: Sizes) -> Tensor:
    """CodeGen's rows as (4 partitions, q or v or k, heads of a partition, d_head, ...)."""
    return rows.unflatten(0, (4, 3, sizes.heads // 4, sizes.d_head))


SEPARATE = Order(lambda h, g: (h, g), _first_query, _first_key)
# [Q | K | V], each whole; K and V with kv_heads.
CONTIGUOUS = Order(lambda h, g: (h + 2 * g, h + 2 * g), _first_query, _key_after_query)
# Q on its own, and [K | V].
QUERY_AND_KEY_VALUE = Order(lambda h, g: (h, 2 * g), _first_query, _first_key)
# For each group of heads that share a key: its q rows, then k, then v. One head a group: [q, k, v] per head.
GROUPED = Order(
    lambda h, g: (h + 2 * g, h + 2 * g),
    lambda rows, sizes: _by_group(rows, sizes)[:, :-2].flatten(0, 1),
    lambda rows, sizes: _by_group(rows, sizes)[:, -2],
)
# Four partitions of the heads, each [q | v | k].
PARTITIONED = Order(
    lambda h, g: (3 * h, 3 * h),
    lambda rows, sizes: _by_partition(rows, sizes)[:, 0].flatten(0, 1),
    lambda rows, sizes: _by_partition(rows, sizes)[:, 2].flatten(0, 1),
)
# One projection for both.
SHARED = Order(lambda h, g: (h, h), _first_query, _first_key)
# For each head its q rows, then as many that gate the output.
GATED = Order(
    lambda h, g: (2 * h, g),
    lambda rows, sizes: rows.unflatten(0, (sizes.heads, 2, sizes.d_head))[:, 0],
    _first_key,
)


def _expanded_key(rows: Tensor, sizes: Sizes) -> Tensor:
    """For each head k rows and v rows, then rows that all heads share and that come last in each key."""
    own = rows[: rows.shape[0] - sizes.shared].unflatten(0, (sizes.kv_heads, -1))
    own = own[:, : sizes.d_head - sizes.shared]
    if not sizes.shared:
        return own
    shared = rows[rows.shape[0] - sizes.shared :]
    return torch.cat([own, shared.expand(sizes.kv_heads, *shared.shape)], dim=1)


# Q on its own, and per head [k | v] with values of any width; what all keys share comes last.
EXPANDED = Order(lambda h, g: (h, 0), _first_query, _expanded_key)
# Per head [q | k | v] with values of any width.
UNEVEN = Order(
    lambda h, g: (0, 0),
    lambda rows, sizes: rows.unflatten(0, (sizes.heads, -1))[:, : sizes.d_head],
    lambda rows, sizes: rows.unflatten(0, (sizes.heads, -1))[:, sizes.d_head : 2 * sizes.d_head],
)


class KnownLayout(NamedTuple):
    """One way to keep the query and key weights.

    Attributes:
        name: of the layout.
        query: what holds the query weights.
        key: what holds the key weights; the same where they are fused.
        order: which rows of them are which.
        when: what else must hold of the layer.
        tentative: where the head counts do not explain the rows, the next entry that fits is tried.
        crosses: queries and keys come from different inputs whatever the layer is called.
        normalizes: the layer's forward divides queries or keys by their lengths.
        scaling: the softmax scale, where no attribute of the layer tells.
    """

    name: str
    query: Source
    key: Source
    order: Order
    when: Callable[[nn.Module], bool] = lambda module: True
    tentative: bool = False
    crosses: bool = False
    normalizes: bool = False
    scaling: float | None = None


def _of(name: str, query: str, key: str, order: Order, **options: object) -> KnownLayout:
    """A layout whose weights are children's."""
    return KnownLayout(name, Child(query), Child(key), order, **options)  # type: ignore[arg-type]


def _fused(name: str, child: str, order: Order, **options: object) -> KnownLayout:
    return _of(name, child, child, order, **options)


def _class_is(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: is_named(module, name)


def _per_head(module: nn.Module) -> bool:
    return getattr(module, "multi_query", None) is False


def _multi_query(module: nn.Module) -> bool:
    return bool(getattr(module, "multi_query", False)) and not getattr(
        module, "new_decoder_architecture", False
    )


def _gates_by_query(module: nn.Module) -> bool:
    """Whether the forward makes a gate and no child is one: it comes with the queries then."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return (
        code is not None
        and "gate" in code.co_varnames
        and not any("gate" in name for name in module._modules)
    )


_SEPARATE_NAMES = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("q", "k"),
    ("q_lin", "k_lin"),
    ("query_proj", "key_proj"),
    ("linear_q", "linear_k"),
    ("q_linear", "k_linear"),
    ("to_q", "to_k"),
    ("to_query", "to_key"),
    ("wq", "wk"),
    ("Wq", "Wk"),
    ("project_q", "project_k"),
    ("projection_query", "projection_key"),
    ("q_head", "k_head"),
    ("query_projection", "key_projection"),
)

_LATENT_QUERIES: tuple[Source, ...] = (
    Latent("q_a_proj", "q_a_layernorm", "q_b_proj", factors=("mla_scale_q_lora", "q_lora_scale")),
    Latent("q_a_proj", "q_a_norm", "q_b_proj"),
    Child("q_proj"),
)
_LATENT_KEY = Latent(
    "kv_a_proj_with_mqa",
    "kv_a_layernorm",
    "kv_b_proj",
    shared=True,
    shared_norm="k_rope_only_layernorm",
    factors=("mla_scale_kv_lora", "kv_lora_scale"),
)

_IN_PROJ = Bare("in_proj_weight", "in_proj_bias")

# The first that fits is used.
LAYOUTS: tuple[KnownLayout, ...] = (
    *(KnownLayout("latent", query, _LATENT_KEY, EXPANDED) for query in _LATENT_QUERIES),
    KnownLayout("latent query", _LATENT_QUERIES[1], Child("kv_proj"), SEPARATE),
    _of("[q,gate] per head + key", "q_proj", "k_proj", GATED, when=_gates_by_query, tentative=True),
    _of("separate", "q_proj", "k_proj", SEPARATE, when=_class_is("GPTNeoSelfAttention"), scaling=1.0),
    *(_of("separate", query, key, SEPARATE) for query, key in _SEPARATE_NAMES),
    _of("query + [K|V]", "q_attn", "c_attn", QUERY_AND_KEY_VALUE),
    _of("query + [K|V]", "to_q", "to_kv", QUERY_AND_KEY_VALUE),
    _fused("[q,k,v] per head", "c_attn", GROUPED, when=_per_head),
    _fused("[Q|K|V]", "c_attn", CONTIGUOUS),
    _fused("[Q|K|V]", "query_key_value", CONTIGUOUS, when=_multi_query),
    _fused("[q,k,v] per head", "query_key_value", GROUPED),
    _fused("[q,k,v] per head", "in_proj", GROUPED, when=_class_is("DisentangledSelfAttention")),
    _fused("[q,k,v] per head", "queries_keys_values", UNEVEN),
    _of("query + [k,v] per head", "queries.queries", "keys_values", EXPANDED),
    _of("query + [k,v] per head", "queries", "keys_values", EXPANDED),
    # Reformer's hashing attention.
    _fused("query = key", "query_key", SHARED, normalizes=True),
    # Two inputs attend to each other by one product.
    _of("separate", "vision_proj", "text_proj", SEPARATE, crosses=True),
    # A query that is learnt itself.
    KnownLayout("key", Constant("cls_token"), Child("k_proj"), SEPARATE, crosses=True),
    _fused("4 × [Q|V|K]", "qkv_proj", PARTITIONED, when=_class_is("CodeGenAttention")),
    _fused("[Q|K|V]", "qkv_proj", CONTIGUOUS),
    _fused("[Q|K|V]", "Wqkv", CONTIGUOUS),
    _fused("[Q|K|V]", "qkv", CONTIGUOUS),
    _fused("[Q|K|V]", "att_proj", CONTIGUOUS),
    _fused("[Q|K|V]", "qkv_linear", CONTIGUOUS),
    # Parameters of the layer itself: torch's MultiheadAttention and XLNet.
    KnownLayout("[Q|K|V]", _IN_PROJ, _IN_PROJ, CONTIGUOUS),
    KnownLayout(
        "separate",
        Bare("q_proj_weight", "in_proj_bias"),
        Bare("k_proj_weight", "in_proj_bias", part=1),
        SEPARATE,
    ),
    KnownLayout("separate", Bare("q", transposed=True), Bare("k", transposed=True), SEPARATE),
)


def fitting_layouts(module: nn.Module, kv_source: nn.Module | None = None) -> Iterator[KnownLayout]:
    """The layouts of an attention layer, by the names of its children and parameters, best first.

    Args:
        module: the layer.
        kv_source: the layer whose keys it uses, where it has none of its own.
    """
    borrows = kv_source is None and borrows_keys(module)
    for layout in LAYOUTS:
        if (
            layout.query.fits(module)
            and (borrows or layout.key.fits(module, kv_source))
            and layout.when(module)
        ):
            yield layout


def find_layout(module: nn.Module) -> KnownLayout | None:
    """The layout of an attention layer, or None where no entry fits."""
    return next(fitting_layouts(module), None)


def borrows_keys(module: nn.Module) -> bool:
    """Whether a layer uses the keys of an earlier one."""
    return bool(getattr(module, "is_kv_shared_layer", False))


# A module that a projection's output passes through and that is not linear in the token.
_BETWEEN = re.compile(r"^(q|k|qk|qkv|query|key)_\w*(conv|conv1d|clip|act|activation)$")


def unsupported(module: nn.Module) -> str | None:
    """Why a layer whose layout fits is not softmax attention over ``q · k`` of its own projections."""
    marks = ("q_conv1d", "conv1d", "A_log", "slope_rate", "receptance")
    if any(hasattr(module, mark) for mark in marks):
        return "it is linear attention, which has no softmax over q · k"
    if hasattr(module, "sampling_offsets"):
        return "it is deformable attention, whose weights come from the query alone: it has no keys"
    if hasattr(module, "assign_eps"):
        return "it assigns tokens to groups by a softmax over queries, not over keys"
    if hasattr(module, "w_g"):
        return "it is additive attention, which takes no products of queries and keys"
    stride = getattr(module, "query_stride", None)
    if isinstance(stride, tuple | list) or (isinstance(stride, int) and stride > 1):
        return (
            "its queries are maxima over neighbouring tokens, so that they are no projections of single ones"
        )
    if hasattr(module, "groups") and hasattr(module, "qkv"):
        return "it attends over channels, so that its products are no sums over a head's coordinates"
    for name, child in module.named_children():
        if _BETWEEN.match(name) and not gives_back(child):
            return f"its {name!r} stands between the projections and q · k"
    return None
