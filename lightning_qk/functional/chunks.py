"""Chunks of logits, rows of an attention call, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from lightning_qk.functional.checks import (
    KindError,
    boolean,
    dense,
    flags,
    floating,
    generator_of,
    integer,
    number,
    one_device,
)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``mask(batch, head, query, key)``: True where the key is visible, of index tensors that broadcast."""

# Additive masks use -inf, the smallest number of a dtype or round numbers such as -1e4. No bias of a real
# model comes near: softmax of a pair this far down is 0 in every precision.
MASKED_BELOW = -9e3
# Subtracted from hidden keys, in float32 and in float64: far more than any logit of a call in range (see
# AttentionLogits.in_range), and finite, so that its product with 0 is 0.
_FAR = {torch.float32: 1e30, torch.float64: 1e300}


class Chunk(NamedTuple):
    """Logits of some query rows.

    Attributes:
        logits: shape ``(batch, heads, rows, keys)``; any value where a key is hidden. Keys may end before the
            last where no row sees the rest.
        shown: 1 where a key is visible and 0 where not, of the keys from ``edge`` on, shape ``(batch|1,
            heads|1, rows, keys - edge)``; None when every key is visible. Keys before ``edge`` are visible.
        edge: how many leading keys every row sees.
        position: of the rows on the axis of the keys, ``(batch|1, rows)``.
        sinks: learnt extra logit of each row, ``(batch|1, heads, rows|1)``.
    """

    logits: Tensor
    shown: Tensor | None
    edge: int
    position: Tensor
    sinks: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """How many keys each row sees, ``(batch|1, heads|1, rows)``."""
        if self.shown is None:
            width = self.logits.shape[-1]
            return torch.full((1, 1, 1), width, dtype=self.logits.dtype, device=self.logits.device)
        return self.edge + self.shown.sum(-1)

    @property
    def first(self) -> Tensor | None:
        """The first key that each row sees, ``(batch|1, heads|1, rows)``; None: it is the first of all."""
        if self.shown is None or self.edge > 0:
            return None
        return self.shown.argmax(-1)


def hide(x: Tensor, shown: Tensor) -> Tensor:
    """Push logits of hidden keys far below all others, in place: where ``shown`` is 0, of a call in range.

    Arithmetic with a matrix that all heads share is many times faster than filling by a mask.
    """
    return x.add_((shown - 1) * _FAR[x.dtype])


def take_rows(tensor: Tensor, index: slice | Tensor) -> Tensor:
    """Rows of ``(batch|1, heads|1, n, x)``: a slice for all, or ``(batch, rows)`` indices a sequence."""
    if isinstance(index, slice):
        return tensor[:, :, index]
    batch = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    return tensor[batch, :, index].transpose(1, 2)


def sample_rows(valid: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
    """``rows`` indices of distinct rows for each sequence, ``(batch, rows)``, valid ones first, at random."""
    device = "cpu" if generator is None else generator.device
    order = torch.rand(valid.shape, generator=generator, device=device).to(valid.device)
    return order.masked_fill(~valid, 2.0).topk(rows, dim=1, largest=False).indices


def check_query_mask(query_mask: Tensor | None, batch: int, n: int) -> None:
    """Raises unless a query mask is None or has one flag a query."""
    if query_mask is None:
        return
    if dense(query_mask, "query_mask").shape != (batch, n):
        raise ValueError(
            f"expected query_mask of shape (batch, n) = {(batch, n)}, got {tuple(query_mask.shape)}: pass "
            "one entry a query"
        )
    flags(query_mask, "query_mask")


def check_rows(rows: Any, generator: Any) -> int | None:
    """How many rows to sample, checked with what goes with it.

    Raises:
        ValueError: no integer of at least 1, or no generator.
    """
    generator_of(generator)
    if rows is None:
        return None
    rows = integer(rows, "rows")
    if rows < 1:
        raise ValueError(
            f"expected rows to be at least 1, or None for all rows, got {rows}: pass a whole number"
        )
    return rows


def _broadcast(tensor: Tensor, full: tuple[int, int, int, int], name: str) -> Tensor:
    """View with four dimensions, checked to broadcast; size-1 dimensions of batch and heads are kept."""
    shape = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    if tensor.dim() > 4 or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise ValueError(
            f"expected a {name} that broadcasts to (batch, heads, n, m) = {full}, got {tuple(tensor.shape)}: "
            f"a padding mask of shape (batch, m) becomes {name}[:, None, None, :].bool()"
        )
    return tensor.reshape(shape).expand(-1, -1, full[2], full[3])


class AttentionOptions(TypedDict, total=False):
    """Options of an attention call beside its query and key, all optional.

    Attributes:
        mask: broadcastable to ``(batch, heads, n, m)``: boolean, True where the key is visible, or floating and
            added to the logits, where −9000 and below means not visible. Or a function ``mask(batch, head, query,
            key)`` of integer index tensors that broadcast to these shapes (a ``mask_mod`` of flex_attention)
            which returns the boolean mask: it is evaluated on some rows at a time, so that no n × m mask is ever
            in memory. None (the default) hides nothing.
        is_causal: row i sees the keys up to position ``query_offset + i``. Default False.
        scaling: factor on the dot products; None (the default) means ``d_head ** -0.5``.
        sliding_window: a key is visible only when fewer than this many positions away. None (the default): all.
        softcap: logits become ``softcap * tanh(logits / softcap)``. None (the default) for no cap.
        bias: added to the logits, broadcastable to ``(batch, heads, n, m)``. Default None.
        sinks: learnt extra logit of each head, shape ``(heads,)``. Default None.
        query_mask: rows to count, boolean ``(batch, n)``. None (the default) counts all.
        query_offset: position of the first query on the axis of the keys (of a cache, say). Default 0.
        self_attention: queries and keys are the same tokens, so that a token that no row can see is padding and
            its own row is left out. None (the default): when ``n == m``.
    """

    mask: Tensor | MaskFunction | None
    is_causal: bool
    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    bias: Tensor | None
    sinks: Tensor | None
    query_mask: Tensor | None
    query_offset: int
    self_attention: bool | None


def checked_products(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | MaskFunction | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_offset: int = 0,
    self_attention: bool | None = None,
) -> dict[str, Any]:
    """Fields of a ProductLogits, checked; see :meth:`AttentionLogits.of`."""
    floating(query, "query")
    floating(key, "key")
    if (
        query.dim() != 4
        or key.dim() != 4
        or query.shape[0] != key.shape[0]
        or query.shape[3] != key.shape[3]
        or key.shape[1] == 0
        or query.shape[1] % key.shape[1]
    ):
        raise ValueError(
            "expected query (batch, heads, n, d_head) and key (batch, kv_heads, m, d_head) with kv_heads "
            f"dividing heads, got {tuple(query.shape)} and {tuple(key.shape)}: pass the tensors as the "
            "attention function receives them"
        )
    batch, heads, n, d_head = query.shape
    if not heads or not d_head:
        raise ValueError(
            f"expected at least one head and a d_head of at least 1, got shape {tuple(query.shape)}: pass "
            "the tensors as the attention function receives them"
        )
    one_device(query=query, key=key, bias=bias, mask=mask if isinstance(mask, Tensor) else None, sinks=sinks)
    boolean(is_causal, "is_causal")
    boolean(self_attention, "self_attention", none=True)
    check_query_mask(query_mask, batch, n)
    query_offset = integer(query_offset, "query_offset")
    if sliding_window is not None:
        sliding_window = integer(sliding_window, "sliding_window")
        if sliding_window < 1:
            raise ValueError(
                f"expected sliding_window to be at least 1, or None for no window, got {sliding_window}: a "
                "row sees its own key with 1"
            )
    scaling = d_head**-0.5 if scaling is None else number(scaling, "scaling")
    if softcap is not None:
        softcap = number(softcap, "softcap")
        if softcap <= 0:
            raise ValueError(f"expected softcap to be above 0, got {softcap}: pass None for none")
    full = (batch, heads, n, key.shape[2])
    if isinstance(mask, Tensor):
        if dense(mask, "mask").dtype != torch.bool and not mask.is_floating_point():
            raise KindError(
                f"expected a boolean mask (True = visible) or an additive floating one, got {mask.dtype}: "
                "convert a mask of zeros and ones with .bool()"
            )
        mask = _broadcast(mask if mask.dtype == torch.bool else floating(mask, "mask"), full, "mask")
    elif mask is not None and not callable(mask):
        raise KindError(
            "expected a mask that is a tensor or a function of batch, head, query and key indices, got "
            f"{type(mask).__name__}"
        )
    if bias is not None:
        bias = _broadcast(floating(bias, "bias"), full, "bias")
    if sinks is not None and floating(sinks, "learnt sinks").numel() != heads:
        raise ValueError(
            f"expected one learnt sink a head, {heads}, got shape {tuple(sinks.shape)}: pass the logits of "
            "the layer's own heads"
        )
    return dict(  # noqa: C408 (fields by name)
        query=query,
        key=key,
        mask=mask,
        bias=bias,
        sinks=sinks,
        is_causal=is_causal,
        sliding_window=sliding_window,
        query_offset=query_offset,
        scaling=scaling,
        softcap=softcap,
        query_mask=query_mask,
        self_attention=n == key.shape[2] if self_attention is None else self_attention,
    )


def checked_logits(
    logits: Tensor,
    query_mask: Tensor | None,
    query_offset: int | None,
    self_attention: bool | None,
    relative: bool,
    sinks: Tensor | None,
) -> dict[str, Any]:
    """Fields of a GivenLogits, checked, with the rows that count; see :meth:`AttentionLogits.given`.

    One pass for the rows and one for the keys; the mask is never in memory.
    """
    floating(logits, "logits (batch, heads, n, m)")
    boolean(relative, "relative")
    boolean(self_attention, "self_attention", none=True)
    if query_offset is not None:
        query_offset = integer(query_offset, "query_offset")
    if logits.dim() != 4:
        raise ValueError(
            f"expected floating logits (batch, heads, n, m), got {logits.dtype} of shape "
            f"{tuple(logits.shape)}: give each head an axis of its own"
        )
    batch, heads, n, m = logits.shape
    check_query_mask(query_mask, batch, n)
    # Without a place among the keys a query's own key is not known.
    own = (n == m if self_attention is None else self_attention) and query_offset is not None
    if sinks is not None:
        floating(sinks, "learnt sinks")
        one_device(logits=logits, sinks=sinks)
        sizes = zip(reversed(sinks.shape), (n, heads, batch), strict=False)
        if sinks.dim() > 3 or any(have not in (1, want) for have, want in sizes):
            raise ValueError(
                f"expected learnt sinks that broadcast to (batch, heads, n) = {(batch, heads, n)}, got shape "
                f"{tuple(sinks.shape)}: one logit a head is sinks[:, None]"
            )
        sinks = sinks.expand(batch, heads, n)
    fields: dict[str, Any] = {
        "logits": logits,
        "query_offset": query_offset,
        "self_attention": own,
        "relative": relative,
        "sinks": sinks,
    }
    if logits.numel() == 0:
        return {**fields, "used": torch.zeros(batch, n, dtype=torch.bool, device=logits.device)}
    # Not "> bound", so that NaN is not hidden: it has to show in the statistics.
    top = logits.amax((1, 3))
    valid = ~(top <= MASKED_BELOW)
    if own and query_offset is not None and query_offset >= 0 and query_offset + n <= m:
        seen = ~(logits.amax((1, 2)) <= MASKED_BELOW)
        valid &= seen[:, query_offset : query_offset + n]
    if query_mask is not None:
        valid &= query_mask.to(device=valid.device, dtype=torch.bool)
    return {**fields, "used": valid, "largest": torch.where(valid, top, 0.0).amax(1)}
