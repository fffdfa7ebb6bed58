"""Logits of one attention call by chunks of query rows: scale, soft cap, bias, and which pairs are visible."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional._checks import (
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
from lightning_qk.functional._precision import at_least_float32, norms

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``mask(batch, head, query, key)``: True where the key is visible, of index tensors that broadcast."""

# Additive masks use -inf, the smallest number of a dtype or round numbers such as -1e4. No bias of a real
# model comes near: softmax of a pair this far down is 0 in every precision.
MASKED_BELOW = -9e3
# What hidden keys are pushed down by, in float32 and in float64: far more than any logit of a call in range (see
# Logits.in_range), and finite, so that its product with 0 is 0.
_FAR = {torch.float32: 1e30, torch.float64: 1e300}
# Logits whose squares, and sums of them, have all their digits.
_RANGE = {torch.float32: (1e-15, 1e18), torch.float64: (1e-140, 1e140)}
# Elements of one chunk of logits, 8 MiB in float32: large enough for the products, small enough for caches.
CHUNK_ELEMENTS = 1 << 21


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


class Logits(NamedTuple):
    """One attention call, checked: what the chunks are computed from."""

    query: Tensor  # (batch, heads, n, d_head), any float dtype
    key: Tensor  # (batch, kv_heads, m, d_head); for chunks: contiguous, float32 at least
    mask: Tensor | MaskFunction | None  # a tensor: 4-D, broadcastable
    bias: Tensor | None  # 4-D, broadcastable
    sinks: Tensor | None  # (heads,)
    is_causal: bool
    sliding_window: int | None
    query_offset: int
    scaling: float
    softcap: float | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, n, m)``."""
        return (*self.query.shape[:3], self.key.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """Of the chunks."""
        return self.key.dtype

    @property
    def device(self) -> torch.device:
        """Of the chunks."""
        return self.key.device

    @classmethod
    def check(
        cls,
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
        query_offset: int = 0,
    ) -> "Logits":
        """Check the tensors of a call; what is what: :func:`~lightning_qk.functional.attention_statistics`.

        Raises:
            ValueError: shapes that do not fit, or a mask that is neither boolean nor floating.
        """
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
                f"expected at least one head and a d_head of at least 1, got shape {tuple(query.shape)}: "
                "pass the tensors as the attention function receives them"
            )
        one_device(
            query=query, key=key, bias=bias, mask=mask if isinstance(mask, Tensor) else None, sinks=sinks
        )
        boolean(is_causal, "is_causal")
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
        return cls(
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
        )

    def in_range(self) -> "Logits":
        """The same call in a precision whose range its logits do not leave, with a key for chunks.

        Logits beyond 1e18, or all below 1e-15, are computed in float64. Where that is not enough, and on devices
        where looking at the size would wait for them, the logits become NaN, one sequence and head by itself.
        """
        source = self._replace(key=at_least_float32(self.key).contiguous())
        if source.key.numel() == 0 or source.query.numel() == 0 or source.key.dtype not in _RANGE:
            return source
        size = source._size()
        fits = _fits(size, source.key.dtype)
        if source.device.type == "cpu":
            if bool(fits.all()):
                return source
            source = source._replace(key=source.key.double())
            fits = _fits(size, torch.float64)
            if bool(fits.all()):
                return source
        return source._replace(query=torch.where(fits, source.query, torch.nan))

    def _size(self) -> Tensor:
        """No logit of a sequence and head has a larger modulus, ``(batch|1, heads, 1, 1)``; float64 on the CPU."""
        wide = torch.float64 if self.device.type == "cpu" else self.key.dtype
        of_query, of_key = (_longest(part, wide) for part in (self.query, self.key))
        size = of_query * of_key.repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        size = (size * abs(self.scaling))[..., None, None]
        if self.softcap is not None:
            size = size.clamp_max(abs(self.softcap))
        for added in (self.bias, self.mask):
            if isinstance(added, Tensor) and added.is_floating_point() and added.numel():
                # A broadcast tensor is read once.
                own = added[tuple(slice(1) if step == 0 else slice(None) for step in added.stride())]
                largest = own.amax((2, 3), keepdim=True) if added is self.mask else _modulus(own)
                size = size + largest.to(wide).clamp_min(0)
        return size

    def chunk(self, index: slice | Tensor, buffer: Tensor) -> "Chunk":
        """Logits of some query rows, and which keys they see.

        Args:
            index: a slice of rows, or indices of shape ``(batch, rows)``, others for each sequence.
            buffer: where the logits are put, flat, as many elements as :meth:`chunks` promises at most.
        """
        key = self.key
        position = self.positions(index)
        edge = 0
        if isinstance(index, slice) and self.is_causal and self.mask is None and self.sliding_window is None:
            # Keys before the first of these rows are seen by all of them, keys after the last by none.
            edge = min(max(index.start + self.query_offset, 0), key.shape[2])
            key = key[:, :, : max(min(index.stop + self.query_offset, key.shape[2]), 1)]
        query = take_rows(self.query, index).to(key.dtype)
        batch, heads, count, d_head = query.shape
        kv_heads, width = key.shape[1:3]
        # Query heads of one group become rows of one product: key heads are never repeated in memory.
        grouped = (query * self.scaling).reshape(batch * kv_heads, heads // kv_heads * count, d_head)
        logits = buffer[: batch * heads * count * width]
        torch.bmm(
            grouped,
            key.reshape(batch * kv_heads, width, d_head).mT,
            out=logits.view(*grouped.shape[:2], width),
        )
        logits = logits.view(batch, heads, count, width)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.bias is not None:
            logits += take_rows(self.bias, index)[..., :width]
        visible = self.visible(index, position, slice(edge, width))
        mask = self.mask
        if visible is not None and isinstance(mask, Tensor) and mask.dtype != torch.bool:
            logits += torch.where(visible, take_rows(mask, index), 0.0)
        sinks = None if self.sinks is None else self.sinks.to(logits.dtype).view(1, heads, 1)
        return Chunk(logits, None if visible is None else visible.to(logits.dtype), edge, position, sinks)

    def visible(self, index: slice | Tensor, position: Tensor, keys: slice) -> Tensor | None:
        """Visibility of some keys to some rows, ``(batch|1, heads|1, rows, keys)``; None: all of them."""
        visible = None
        if isinstance(self.mask, Tensor):
            mask = take_rows(self.mask, index)[..., keys]
            visible = mask if mask.dtype == torch.bool else mask > MASKED_BELOW
        elif self.mask is not None:
            visible = self._evaluate(self.mask, index, keys)
        if self.is_causal or self.sliding_window is not None:
            places = torch.arange(keys.start, keys.stop, device=position.device)
            ahead = places - position[:, None, :, None]
            if self.is_causal:
                visible = ahead <= 0 if visible is None else visible & (ahead <= 0)
            if self.sliding_window is not None:
                near = ahead.abs() < self.sliding_window
                visible = near if visible is None else visible & near
        return visible

    def _evaluate(self, mask: MaskFunction, index: slice | Tensor, keys: slice) -> Tensor:
        """A mask function on some rows and keys, ``(batch|1, heads|1, rows, keys)``."""
        device = self.query.device
        batch, heads = self.query.shape[:2]
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=device)[None]
        rows, width = index.shape[-1], keys.stop - keys.start
        visible = mask(
            torch.arange(batch, device=device)[:, None, None, None],
            torch.arange(heads, device=device)[:, None, None],
            index[:, None, :, None],
            torch.arange(keys.start, keys.stop, device=device),
        )
        shape = tuple(visible.shape) if isinstance(visible, Tensor) else None
        padded = (1,) * (4 - len(shape or ())) + (shape or ())
        fits = all(n in (1, full) for n, full in zip(padded, (batch, heads, rows, width), strict=False))
        if shape is None or visible.dtype != torch.bool or len(padded) != 4 or not fits:
            got = type(visible).__name__ if shape is None else f"{visible.dtype} of shape {shape}"
            raise ValueError(
                "expected the mask function to return a boolean tensor that broadcasts to (batch, heads, rows, "
                f"keys) = {(batch, heads, rows, width)}, got {got}: index with the four tensors together, as in "
                "document[batch, query]"
            )
        return visible.reshape(padded).expand(-1, -1, rows, width)

    def positions(self, index: slice | Tensor) -> Tensor:
        """Positions of some rows on the axis of the keys, ``(batch|1, rows)``."""
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=self.query.device)[None]
        return index + self.query_offset

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of ``count`` rows whose logits have ``CHUNK_ELEMENTS`` elements at most, or one row."""
        return _chunks(self.shape, count)


class GivenLogits(NamedTuple):
    """Logits that were computed elsewhere, hidden keys pushed down by value: what the chunks are taken from."""

    logits: Tensor  # (batch, heads, n, m), any float dtype
    used: Tensor  # (batch, n): rows that may be looked at; the others may hold anything
    query_offset: int
    sinks: Tensor | None = None  # (batch, heads, n)
    largest: Tensor | None = None  # (batch,): the largest logit of the rows that may be looked at
    wide: bool = False  # chunks in float64, whatever the logits are in
    fits: Tensor | None = None  # (batch,): the others become NaN

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, n, m)``."""
        batch, heads, n, m = self.logits.shape
        return batch, heads, n, m

    @property
    def dtype(self) -> torch.dtype:
        """Of the chunks."""
        return torch.float64 if self.wide or self.logits.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """Of the chunks."""
        return self.logits.device

    def in_range(self) -> "GivenLogits":
        """The same in a precision whose range the logits do not leave, as :meth:`Logits.in_range`."""
        if self.largest is None or self.dtype == torch.float64:
            return self
        # What is far below is hidden, and relative logits are 0 at most.
        fits = _fits(self.largest.float().clamp_min(0), torch.float32)
        if self.device.type == "cpu":
            return self if bool(fits.all()) else self._replace(wide=True)
        return self._replace(fits=fits)

    @classmethod
    def check(
        cls,
        logits: Tensor,
        query_mask: Tensor | None,
        self_attention: bool,
        query_offset: int,
        sinks: Tensor | None = None,
    ) -> "GivenLogits":
        """Check the tensor and find the rows that count.

        A row counts where some head sees a key, and a token that no row sees is padding: its own row counts
        not. One pass for the rows and one for the keys; the mask is never in memory.

        Raises:
            ValueError: another number of axes, no floating dtype, or a query mask that does not fit.
        """
        floating(logits, "logits (batch, heads, n, m)")
        query_offset = integer(query_offset, "query_offset")
        if logits.dim() != 4:
            raise ValueError(
                "expected floating logits (batch, heads, n, m), got "
                f"{logits.dtype} of shape {tuple(logits.shape)}: give each head an axis of its own"
            )
        batch, heads, n, m = logits.shape
        check_query_mask(query_mask, batch, n)
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
        if logits.numel() == 0:
            none = torch.zeros(batch, n, dtype=torch.bool, device=logits.device)
            return cls(logits, none, query_offset, sinks)
        # Not "> bound", so that NaN is no mask: it is to be seen in the statistics.
        top = logits.amax((1, 3))
        valid = ~(top <= MASKED_BELOW)
        if self_attention and query_offset >= 0 and query_offset + n <= m:
            seen = ~(logits.amax((1, 2)) <= MASKED_BELOW)
            valid &= seen[:, query_offset : query_offset + n]
        if query_mask is not None:
            valid &= query_mask.to(device=valid.device, dtype=torch.bool)
        return cls(logits, valid, query_offset, sinks, torch.where(valid, top, 0.0).amax(1))

    def chunk(self, index: slice | Tensor, buffer: Tensor) -> Chunk:
        """Some query rows, and which keys they see; arguments as those of :meth:`Logits.chunk`."""
        rows = take_rows(self.logits, index)
        used = self.used[:, index] if isinstance(index, slice) else self.used.gather(1, index)
        hidden = (rows <= MASKED_BELOW) | ~used[:, None, :, None]
        x = buffer[: rows.numel()].view(rows.shape)
        x.copy_(rows)
        if self.fits is not None:
            x.masked_fill_(~self.fits[:, None, None, None], torch.nan)
        x.masked_fill_(hidden, 0.0)
        if isinstance(index, slice):
            position = torch.arange(index.start, index.stop, device=self.device)[None]
        else:
            position = index
        sinks = None
        if self.sinks is not None:
            sinks = take_rows(self.sinks[..., None], index)[..., 0].to(x.dtype)
            sinks = torch.where(used[:, None], sinks, 0.0)
        return Chunk(x, (~hidden).to(x.dtype), 0, position + self.query_offset, sinks)

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of ``count`` rows whose logits have ``CHUNK_ELEMENTS`` elements at most, or one row."""
        return _chunks(self.shape, count)


def _longest(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest Euclidean norm of each sequence and head, ``(batch, heads)``."""
    return norms(vectors, dtype).amax(-1)


def _modulus(tensor: Tensor) -> Tensor:
    low, high = tensor.amin((2, 3), keepdim=True), tensor.amax((2, 3), keepdim=True)
    return torch.maximum(high, -low)


def _fits(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Which sizes of logits have squares within the range of a dtype, or are 0."""
    low, high = _RANGE[dtype]
    # What is not a number says so by itself.
    return (
        (size == 0)
        | ((size >= low) & (size <= high))
        | size.isnan()
        | (size.isinf() & (size.device.type == "cpu"))
    )


def hide(x: Tensor, shown: Tensor) -> Tensor:
    """Push logits of hidden keys far below all others, in place: where ``shown`` is 0, of a call in range.

    Arithmetic with a matrix that all heads share is many times faster than filling by a mask.
    """
    return x.add_((shown - 1) * _FAR[x.dtype])


def _chunks(shape: tuple[int, int, int, int], count: int) -> Iterator[slice]:
    batch, heads, _, m = shape
    if not m:
        return  # no logit
    size = max(1, CHUNK_ELEMENTS // max(1, batch * heads * m))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _broadcast(tensor: Tensor, full: tuple[int, int, int, int], name: str) -> Tensor:
    """View with four dimensions, checked to broadcast; size-1 dimensions of batch and heads are kept."""
    shape = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    if tensor.dim() > 4 or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise ValueError(
            f"expected a {name} that broadcasts to (batch, heads, n, m) = {full}, got {tuple(tensor.shape)}: "
            f"a padding mask of shape (batch, m) becomes {name}[:, None, None, :].bool()"
        )
    return tensor.reshape(shape).expand(-1, -1, full[2], full[3])


def take_rows(tensor: Tensor, index: slice | Tensor) -> Tensor:
    """Rows of ``(batch|1, heads|1, n, x)``: a slice for all, or ``(batch, rows)`` indices a sequence."""
    if isinstance(index, slice):
        return tensor[:, :, index]
    batch = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    return tensor[batch, :, index].transpose(1, 2)


def valid_rows(
    logits: Logits, query_mask: Tensor | None, self_attention: bool
) -> tuple[Tensor, Tensor | None]:
    """Find the rows that count and the keys that are there.

    Returns:
        Rows that see a key and are no padding, boolean ``(batch, n)``; keys that some row sees, boolean
        ``(batch, m)``, or None without a mask.
    """
    batch, _, n, _ = logits.query.shape
    check_query_mask(query_mask, batch, n)
    m = logits.key.shape[2]
    device = logits.query.device
    valid = torch.full((batch, n), m > 0, device=device)
    seen = None
    if logits.mask is not None:
        sees = []
        seen = torch.zeros(batch, m, dtype=torch.bool, device=device)
        for chunk in logits.chunks(n):
            visible = logits.visible(chunk, logits.positions(chunk), slice(0, m))
            assert visible is not None  # there is a mask
            visible = visible.any(1)
            sees.append(visible.any(-1).expand(batch, -1))
            seen |= visible.any(-2)
        valid = torch.cat(sees, dim=1) if sees else valid
        if self_attention and n == m:
            valid = valid & seen
        elif self_attention and logits.query_offset + n <= m:
            valid = valid & seen[:, logits.query_offset : logits.query_offset + n]
    elif logits.is_causal or logits.sliding_window is not None:
        # Queries before the first key or further than a window behind the last.
        position = logits.positions(slice(0, n))
        reach = 0 if logits.sliding_window is None else logits.sliding_window - 1
        valid = valid & (position + (0 if logits.is_causal else reach) >= 0)
        if logits.sliding_window is not None:
            valid = valid & (position - reach < m)
    if query_mask is not None:
        valid = valid & query_mask.to(device=device, dtype=torch.bool)
    return valid, seen


def check_query_mask(query_mask: Tensor | None, batch: int, n: int) -> None:
    if query_mask is None:
        return
    if dense(query_mask, "query_mask").shape != (batch, n):
        raise ValueError(
            f"expected query_mask of shape (batch, n) = {(batch, n)}, got {tuple(query_mask.shape)}: pass one "
            "entry a query"
        )
    flags(query_mask, "query_mask")


def check_rows(rows: Any, self_attention: Any, generator: Any) -> int | None:
    """How many rows to sample, checked with what goes with it.

    Raises:
        ValueError: no integer of at least 1, no boolean, or no generator.
    """
    boolean(self_attention, "self_attention", none=True)
    generator_of(generator)
    if rows is None:
        return None
    rows = integer(rows, "rows")
    if rows < 1:
        raise ValueError(
            f"expected rows to be at least 1, or None for all rows, got {rows}: pass a whole number"
        )
    return rows


def sample_rows(valid: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
    """``rows`` indices of distinct rows for each sequence, ``(batch, rows)``, valid ones first, at random."""
    device = "cpu" if generator is None else generator.device
    order = torch.rand(valid.shape, generator=generator, device=device).to(valid.device)
    return order.masked_fill(~valid, 2.0).topk(rows, dim=1, largest=False).indices
