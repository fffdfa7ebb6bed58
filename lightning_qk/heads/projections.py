"""What is read of an attention layer: its query and key weights, split into heads, or why there are none.

Number and width of heads, and the factor on their dot products, are taken from the layer's own attributes first
and from the nearest configuration second: attention classes of transformers use many names for the same number,
and a good third keep no head count at all.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.source_code import is_named
from lightning_qk.functional.rotary import Rotary

_D_HEAD = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
    "dim_head",
    "dim_per_head",
    "attn_head_size",
    "hidden_size_per_attention_head",
    "d_head",
    "d_kv",
)
_HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_attn_heads",
    "heads",
    "nhead",
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_kv", "multi_query_group_num")

# Attributes that hold the factor itself, and attributes that hold what the logits are divided by.
_FACTOR = ("scaling", "scale", "softmax_scale", "inv_norm_factor")
_DIVISOR = ("scale_attn", "norm_factor")


class Affine(NamedTuple):
    """``x -> weight @ x + bias``, of all rows or with the rows cut into heads.

    Attributes:
        weight: shape ``(out, in)`` or ``(heads, d_head, in)``: a view of the live parameter where it is stored so.
        bias: shape ``(out,)`` or ``(heads, d_head)``, or None.
    """

    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "Affine":
        """In another type."""
        return Affine(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


@dataclass(frozen=True, eq=False)
class HeadProjections:
    """Query and key projections of every head of one attention layer.

    A head computes ``q = query[h] @ x + query_bias[h]`` and ``k = key[g] @ x + key_bias[g]`` with
    ``g = h // (heads // kv_heads)``, and its logits are ``scaling * q · k``. The tensors are differentiable
    views of the live parameters wherever the layout allows.

    Attributes:
        query: shape ``(heads, d_head, d_query)``.
        key: shape ``(kv_heads, d_head, d_key)``; fewer key heads than heads under grouped-query attention.
        query_bias: shape ``(heads, d_head)``, or None.
        key_bias: shape ``(kv_heads, d_head)``, or None.
        scaling: the factor on ``q · k`` before the softmax.
        layout: the name of the weight layout that was read.
        route: how the weights were found: ``"table"``, by a known layout, or ``"inferred"``, by running the layer
            alone; ``", as a matrix"`` is added where a projection (quantized, or with an adapter) stores no
            weight to read and is run as a linear map.
        rotary: how the layer rotates q and k with position, or None where it does not, or not by a position
            in a sequence (images), or some heads only, or where a norm's gain comes behind the rotation.
        position: what positions do to the logits: ``"rotary"``; ``"rotary (2-D)"``, by coordinates in an image
            or a video; ``"alibi"``, ``"relative bias"`` (a number for each relative position, as in T5 and Swin)
            or ``"relative product"`` (products with embeddings of relative positions, as in DeBERTa and
            Transformer-XL), which are added to ``q · k``, so that a spectrum is that of the content part;
            ``"none"``: the logits are ``q · k`` alone. None where it is not known.
        qk_norm: a norm stands between projection and dot product. Its gain is folded into the weights (for
            LayerNorm, the removal of the mean too; its offset is left out); the head is then not bilinear and
            the spectrum is that of the form before normalization. It may stand within the projection too:
            on the latent of low-rank latent attention. The weights are then those of the composition without
            the normalization, and the coordinates that bypass the latent keep their own scale.
        self_attention: queries and keys come from the same tokens. False for cross-attention, where
            eigenvalues mean nothing.
        key_layer: qualified name of the layer whose keys are used instead of own ones, or None. The bilinear form
            then relates the hidden states of two layers of one residual stream: ``key`` acts on those that
            reach that layer.
        shared: how many coordinates, the last ones of each key, all heads have in common: the rotary part of
            latent attention. It bypasses the latent, so that what norms leave out is one factor a token for
            these coordinates and another one for the others.
        norm_folded: the gain of the norm that feeds the layer is part of the weights: asked for with
            ``fold_norm=True``, and found.
        clip: the bound that the layer clamps q and k to between projection and product (``clip_qkv`` of OLMo,
            MPT and DBRX), or None. The spectrum is that of the form without it, which is exact for tokens
            whose q and k stay within the bound.
    """

    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    query_bias: Tensor | None = field(repr=False)
    key_bias: Tensor | None = field(repr=False)
    scaling: float
    layout: str
    route: str = "table"
    rotary: Rotary | None = None
    position: str | None = None
    qk_norm: bool = False
    self_attention: bool = True
    norm_folded: bool = False
    key_layer: str | None = None
    shared: int = 0
    clip: float | None = None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[0]

    @property
    def kv_heads(self) -> int:
        """Number of key heads."""
        return self.key.shape[0]

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.query.shape[1]

    @property
    def width(self) -> tuple[int, int]:
        """d_query and d_key."""
        return self.query.shape[2], self.key.shape[2]


class UnreadLayer(Exception):
    """One attention layer cannot be read; the message is the reason, as a clause that ends a sentence."""


class InaccessibleWeights(UnreadLayer):
    """The layout is known, but this process cannot reach the values; the message says how to mend it."""


class NotTokenAttention(UnreadLayer):
    """Its products run over the tokens: it attends over channels, and its softmax is not taken over tokens."""


class Sizes(NamedTuple):
    """Head counts and width of one layer.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key heads.
        d_head: width of a head.
        shared: how many coordinates, the last ones of a key, all heads have in common.
    """

    heads: int
    kv_heads: int
    d_head: int
    shared: int = 0


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            value = getattr(owner, name, None)
        except Exception:
            # A configuration of layers that differ refuses to give one number for all of them.
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _of_layer(module: nn.Module, config: Any) -> Any:
    """The layer's own configuration, where layers have one each."""
    index = getattr(module, "layer_idx", None)
    try:
        configs = getattr(config, "per_layer_config", None)
        return config if index is None or configs is None else configs[index]
    except Exception:
        # Not every configuration that offers it can make it.
        return config


def layer_sizes(
    module: nn.Module,
    config: Any,
    rows: tuple[int, int],
    blocks: Callable[[int, int], tuple[int, int]],
    shared: int = 0,
) -> Sizes:
    """The head counts and width that explain the rows of a layer's projections.

    Args:
        module: the attention layer.
        config: the nearest configuration, or None.
        rows: of the projections that hold the queries and the keys.
        blocks: see :class:`~lightning_qk.heads.layouts.Order`; 0 where values of any width lie among them.
        shared: how many rows, the last ones, all keys have in common.

    Raises:
        UnreadLayer: no head count is known, or it does not explain the rows.
    """
    wanted = blocks(1, 1)
    if all(wanted):
        return head_sizes(module, config, rows, blocks)
    return _expanded(module, config, *rows, shared) if any(wanted) else _uneven(module, config, rows[0])


def _expanded(module: nn.Module, config: Any, query_rows: int, key_rows: int, shared: int) -> Sizes:
    """The sizes of a layer whose keys and values are expanded together, with values of any width.

    Args:
        module: the attention layer.
        config: the nearest configuration, or None.
        query_rows: rows of all queries.
        key_rows: rows of all keys and values, those that all keys have in common among them.
        shared: how many those are.

    Raises:
        UnreadLayer: no head count is known, or it does not explain the rows.
    """
    heads = _number(module, _HEADS) or _number(_of_layer(module, config), _HEADS)
    if heads is None:
        raise UnreadLayer("neither it nor its config says how many heads it has")
    width, own = query_rows // heads, key_rows - shared
    if query_rows % heads or own % heads or not shared <= width <= own // heads + shared:
        raise UnreadLayer(
            f"its projections have {query_rows} rows of queries and {key_rows} of keys and values, with {shared} "
            f"that all keys share, which heads = {heads} do not explain"
        )
    return Sizes(heads, heads, width, shared)


def _uneven(module: nn.Module, config: Any, rows: int) -> Sizes:
    """The sizes of a layer that keeps q, k and values of any width together for each head.

    Raises:
        UnreadLayer: head count or width are not known, or do not explain the rows.
    """
    heads = _number(module, _HEADS) or _number(config, _HEADS)
    d_head = _number(module, ("key_dim", *_D_HEAD))
    if heads is None or d_head is None:
        raise UnreadLayer("it does not say how many heads it has and how wide their keys are")
    if rows % heads or rows // heads < 2 * d_head:
        raise UnreadLayer(
            f"its projection has {rows} rows, which heads = {heads} and d_head = {d_head} do not explain"
        )
    return Sizes(heads, heads, d_head)


def head_count(module: nn.Module) -> int | None:
    """How many heads a layer's own attributes say that it has; None where they do not."""
    return _number(module, _HEADS)


def head_sizes(
    module: nn.Module,
    config: Any,
    rows: tuple[int, int],
    blocks: Callable[[int, int], tuple[int, int]],
) -> Sizes:
    """Find the head counts and width that explain the projections' output widths.

    Args:
        module: the attention layer.
        config: the nearest configuration, or None.
        rows: output widths of the modules that hold the query and the key weights.
        blocks: maps (heads, kv_heads) to how many blocks of d_head rows each of the two modules has.

    Raises:
        UnreadLayer: no head count is known, or the known ones do not explain the widths.
    """
    config = _of_layer(module, config)
    d_head = _number(module, _D_HEAD)
    heads = _number(module, _HEADS)
    if heads is None:
        heads = _number(config, _HEADS)
    if d_head is None and heads is None:
        d_head = _number(config, _D_HEAD)
    if heads is None and d_head is None:
        raise UnreadLayer("neither it nor its config says how many heads it has or how wide they are")
    # Without a head count the rows give it, which is possible where they hold nothing but q.
    count = heads if heads is not None else rows[0] // (d_head or 1)
    for kv_heads in _kv_candidates(module, config, count, rows, d_head):
        wanted = blocks(count, kv_heads)
        width = d_head or rows[0] // wanted[0]
        if width and (wanted[0] * width, wanted[1] * width) == rows and count % kv_heads == 0:
            return Sizes(count, kv_heads, width)
    known = " and ".join(
        f"{what} = {value}" for what, value in (("heads", heads), ("d_head", d_head)) if value is not None
    )
    raise UnreadLayer(f"its projections have {rows[0]} and {rows[1]} rows, which {known} do not explain")


def _kv_candidates(
    module: nn.Module, config: Any, heads: int, rows: tuple[int, int], d_head: int | None
) -> Iterator[int]:
    own = _number(module, _KV_HEADS)
    if own is not None:
        yield own
    configured = _number(config, _KV_HEADS)
    if configured is not None:
        yield configured
    yield heads
    if d_head is not None and rows[1] // d_head > 0:
        yield rows[1] // d_head
    yield 1


def softmax_scaling(module: nn.Module, d_head: int) -> float:
    """The factor on ``q · k``, with q and k as the projections give them.

    Some layers scale q before the attention call and pass a factor of 1; the product is the same.
    """
    relative = getattr(module, "pos_att_type", None)
    if relative is not None:
        # DeBERTa and its kin average over content's product and those with relative positions.
        return (d_head * (1 + sum(kind in ("c2p", "p2c") for kind in relative))) ** -0.5
    for name in _FACTOR:
        value = getattr(module, name, None)
        if isinstance(value, bool):
            # A switch: on is the usual factor.
            return d_head**-0.5 if value else 1.0
        number = _scalar(value)
        if number == 1.0 and _takes_inverse_root(module):
            return d_head**-0.5
        if number is not None:
            # The fourth root of d_head goes to q and to k alike.
            return number**2 if d_head > 1 and math.isclose(number, d_head**-0.25) else number
    for name in _DIVISOR:
        number = _scalar(getattr(module, name, None))
        if number is not None:
            return 1.0 / number
    if hasattr(module, "relative_attention_num_buckets") or is_named(module, "GPTNeoSelfAttention"):
        # T5 and its kin, and GPT-Neo: plain dot products.
        return 1.0
    return d_head**-0.5


def _takes_inverse_root(module: nn.Module) -> bool:
    """Whether the forward takes a power of -1/2 itself: ESM scales its queries and then calls with 1."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and -0.5 in code.co_consts


def _scalar(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return None
