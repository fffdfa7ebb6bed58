"""How many heads a layer has, how wide they are, and the factor on their dot products.

Taken from the layer's own attributes first and from the nearest configuration second: attention classes of
transformers use many names for the same number, and a good third keep no head count at all.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_qk.heads.classes import is_named
from lightning_qk.heads.errors import UnreadLayer

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


class Sizes(NamedTuple):
    """Head counts and width of one layer."""

    heads: int
    kv_heads: int
    d_head: int


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


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
    for name in _FACTOR:
        value = getattr(module, name, None)
        if isinstance(value, bool):
            # A switch: on is the usual factor.
            return d_head**-0.5 if value else 1.0
        number = _scalar(value)
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


def _scalar(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return None
