"""Where the query and key weights lie in an attention layer: one entry per layout.

A layout names the children that hold the weights and says which of their output rows belong to q and k. It
is chosen by the children's names, and by a flag of the layer where one name is used for two orders. To read a
new model, add its children's names to `LAYOUTS`; head counts, norms, rotary and scaling are found elsewhere.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from lightning_qk.heads.classes import is_named
from lightning_qk.heads.sizes import Sizes


class Order(NamedTuple):
    """Which rows of the projections belong to q and k.

    Attributes:
        blocks: (heads, kv_heads) to the number of d_head-row blocks in the two modules' outputs.
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


class Layout(NamedTuple):
    """One way to keep the query and key weights.

    Attributes:
        name: of the layout.
        query: the child that holds the query weights.
        key: the child that holds the key weights; the same one where they are fused.
        order: which rows of them are which.
        when: what else must hold of the layer.
    """

    name: str
    query: str
    key: str
    order: Order
    when: Callable[[nn.Module], bool] = lambda module: True


def _class_is(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: is_named(module, name)


def _per_head(module: nn.Module) -> bool:
    return getattr(module, "multi_query", None) is False


def _multi_query(module: nn.Module) -> bool:
    return bool(getattr(module, "multi_query", False)) and not getattr(
        module, "new_decoder_architecture", False
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
)

# The first that fits is used.
LAYOUTS: tuple[Layout, ...] = (
    *(Layout("separate", query, key, SEPARATE) for query, key in _SEPARATE_NAMES),
    Layout("query + [K|V]", "q_attn", "c_attn", QUERY_AND_KEY_VALUE),
    Layout("query + [K|V]", "to_q", "to_kv", QUERY_AND_KEY_VALUE),
    Layout("[q,k,v] per head", "c_attn", "c_attn", GROUPED, when=_per_head),
    Layout("[Q|K|V]", "c_attn", "c_attn", CONTIGUOUS),
    Layout("[Q|K|V]", "query_key_value", "query_key_value", CONTIGUOUS, when=_multi_query),
    Layout("[q,k,v] per head", "query_key_value", "query_key_value", GROUPED),
    Layout("4 × [Q|V|K]", "qkv_proj", "qkv_proj", PARTITIONED, when=_class_is("CodeGenAttention")),
    Layout("[Q|K|V]", "qkv_proj", "qkv_proj", CONTIGUOUS),
    Layout("[Q|K|V]", "Wqkv", "Wqkv", CONTIGUOUS),
    Layout("[Q|K|V]", "qkv", "qkv", CONTIGUOUS),
    Layout("[Q|K|V]", "att_proj", "att_proj", CONTIGUOUS),
)


def find_layout(module: nn.Module) -> Layout | None:
    """The layout of an attention layer, by the names of its children, or None where no entry fits."""
    children = module._modules
    for layout in LAYOUTS:
        if (
            children.get(layout.query) is not None
            and children.get(layout.key) is not None
            and layout.when(module)
        ):
            return layout
    return None


# A module that a projection's output passes through and that is not linear in the token.
_BETWEEN = re.compile(r"^(q|k|qk|qkv|query|key)_\w*(conv|conv1d|clip|act|activation)$")


def unsupported(module: nn.Module) -> str | None:
    """Why a layer whose layout fits is not softmax attention over ``q · k`` of its own projections."""
    if any(hasattr(module, mark) for mark in ("q_conv1d", "conv1d", "A_log", "slope_rate")):
        return "it is linear attention, which has no softmax over q · k"
    if getattr(module, "logit_scale", None) is not None:
        return "it is cosine attention with a learnt temperature, whose logits are not a scaled q · k"
    if hasattr(module, "pos_att_type"):
        return "it is disentangled attention, whose logits add products with relative position embeddings"
    if getattr(module, "is_kv_shared_layer", False):
        return "it uses the keys of an earlier layer, so that its own key weights take no part"
    for name, _ in module.named_children():
        if _BETWEEN.match(name):
            return f"its {name!r} stands between the projections and q · k"
    return None
