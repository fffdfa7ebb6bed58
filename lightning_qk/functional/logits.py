"""One attention call, checked: its logits by chunks of query rows, and which pairs are visible."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_qk.functional._range import RANGE, bound_of_logits, fits_range
from lightning_qk.functional.chunks import (
    MASKED_BELOW,
    AttentionOptions,
    Chunk,
    MaskFunction,
    checked_logits,
    checked_products,
    take_rows,
)
from lightning_qk.functional.precision import at_least_float32, is_readable
from lightning_qk.functional.visibility import Counted, Visibility, renumbered

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# Elements of one chunk of logits, 8 MiB in float32: large enough for the products, small enough for caches.
CHUNK_ELEMENTS = 1 << 21


class AttentionLogits(ABC):
    """One attention call, checked: the argument of every function of attention.

    Made from queries and keys by :meth:`of`, or from logits by :meth:`given`. Functions that take ``query, key,
    **options`` call the first; all of them accept such an object in place of the query too.

    Attributes:
        query_offset: position of the first query on the axis of the keys; None where queries have no place there.
        self_attention: whether queries and keys are the same tokens.
        sinks: learnt extra logits, or None.
        relative: rows are known up to a constant only, so that maxima have no meaning.
    """

    query_offset: int | None
    self_attention: bool
    sinks: Tensor | None
    relative: bool

    @staticmethod
    def of(query: Tensor, key: Tensor, **options: Unpack[AttentionOptions]) -> ProductLogits:
        """The call of an attention function.

        Args:
            query: as the attention function gets it, after rotary encoding and norms, ``(batch, heads, n,
                d_head)``.
            key: ``(batch, kv_heads, m, d_head)``; ``kv_heads`` divides ``heads``.
            options: see :class:`AttentionOptions`.

        Raises:
            ValueError: shapes that do not fit, or a mask of another form.
        """
        return ProductLogits(**checked_products(query, key, **options))

    @staticmethod
    def given(
        logits: Tensor,
        *,
        query_mask: Tensor | None = None,
        query_offset: int | None = 0,
        self_attention: bool | None = None,
        relative: bool = False,
        sinks: Tensor | None = None,
    ) -> GivenLogits:
        """Logits as a softmax gets them: what is added to products, masks included, is in them.

        A key is hidden from a row where the logit is −9000 or below: −inf, the smallest number of a dtype, −1e4
        and −1e9 hide; −100 does not. A row counts where some head sees a key, and a token that no row sees is
        padding: its own row does not count.

        Args:
            logits: ``(batch, heads, n, m)``, floating; the last axis is the softmax's.
            query_mask: rows to count, boolean ``(batch, n)``.
            query_offset: position of the first query on the axis of the keys; None where queries have no place
                there: statistics of position are NaN.
            self_attention: queries and keys are the same tokens; None: when ``n == m``.
            relative: rows are known up to a constant only: maxima are NaN.
            sinks: learnt extra logits, broadcastable to ``(batch, heads, n)``; not among ``logits``.

        Raises:
            ValueError: another number of axes, no floating dtype, or a query mask or sinks that do not fit.
        """
        return GivenLogits(
            **checked_logits(logits, query_mask, query_offset, self_attention, relative, sinks)
        )

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, n, m)``."""

    @property
    @abstractmethod
    def _values(self) -> Tensor:
        """The tensor that decides device and dtype."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the chunks."""
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the chunks."""
        return self._values.device

    @property
    def result_dtype(self) -> torch.dtype:
        """Dtype of statistics: float64 where the call is, else float32."""
        return torch.float64 if self._values.dtype == torch.float64 else torch.float32

    @abstractmethod
    def counted(self) -> Counted:
        """Rows and keys that count."""

    @abstractmethod
    def seen_keys(self, counted: Counted) -> Tensor:
        """Keys that some row sees, boolean ``(batch, m)``."""

    @abstractmethod
    def without_padding(self, counted: Counted) -> Self:
        """The same call with zeros in place of padding, which may hold anything, NaN included."""

    @abstractmethod
    def in_range(self) -> Self:
        """The same call for :meth:`chunk`, in a precision whose range its logits do not leave.

        Logits beyond 1e18, or all below 1e-15, are computed in float64. Where that is not enough, and on devices
        where looking at the size would wait for them, the logits become NaN, one sequence and head by itself.
        """

    @abstractmethod
    def chunk(self, index: slice | Tensor, buffer: Tensor) -> Chunk:
        """Logits of some query rows, and which keys they see.

        Args:
            index: a slice of rows, or indices of shape ``(batch, rows)``, others for each sequence.
            buffer: where the logits are put, flat, as many elements as :meth:`chunks` promises at most.
        """

    @abstractmethod
    def visible(self, index: slice | Tensor, position: Tensor, keys: slice) -> Tensor | None:
        """Visibility of some keys to some rows, ``(batch|1, heads|1, rows, keys)``; None: all of them."""

    @abstractmethod
    def finite_heads(self) -> Tensor:
        """Heads that are finite in all tokens that count, boolean ``(heads,)``."""

    @abstractmethod
    def sequences(self, index: slice | Tensor) -> Self:
        """The same call with some of its sequences."""

    @abstractmethod
    def tokens(self, tokens: slice) -> Self:
        """The same call with consecutive tokens, queries and keys alike; only where both are the same tokens."""

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of ``count`` rows whose logits have ``CHUNK_ELEMENTS`` elements at most, or one row."""
        batch, heads, _, m = self.shape
        if not m:
            return  # no logit
        size = max(1, CHUNK_ELEMENTS // max(1, batch * heads * m))
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def buffer(self, rows: int) -> Tensor:
        """Room for the logits of so many rows of each sequence."""
        batch, heads, _, m = self.shape
        return torch.empty(batch * heads * rows * m, dtype=self.dtype, device=self.device)

    def positions(self, index: slice | Tensor) -> Tensor:
        """Positions of some rows on the axis of the keys, ``(batch|1, rows)``."""
        if isinstance(index, slice):
            index = torch.arange(index.start, index.stop, device=self.device)[None]
        return index + (self.query_offset or 0)

    def some_sequences(self, count: int | None, generator: torch.Generator | None) -> Self:
        """The same call with ``count`` of its sequences, drawn without replacement; None for all."""
        batch = self.shape[0]
        return self if count is None or count >= batch else self.sequences(self.draw(count, generator))

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """``count`` of the sequences at random, in order."""
        device = "cpu" if generator is None else generator.device
        drawn = torch.randperm(self.shape[0], generator=generator, device=device)[:count]
        return drawn.sort().values.to(self.device)

    def crop_tokens(self, length: int | None, generator: torch.Generator | None) -> Self:
        """The same call with ``length`` consecutive tokens, queries and keys alike, from a random place on.

        All of them where a sequence is not longer, or queries and keys are not the same tokens one by one.
        """
        n, m = self.shape[2:]
        if length is None or length >= n or n != m or self.query_offset or not self.self_attention:
            return self
        device = "cpu" if generator is None else generator.device
        start = int(torch.randint(n - length + 1, (), generator=generator, device=device))
        return self.tokens(slice(start, start + length))

    def replace(self, **fields: Any) -> Self:
        """The same with other fields, which are not checked again."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True, eq=False)
class ProductLogits(AttentionLogits):
    """The call of an attention function, made by :meth:`AttentionLogits.of`; fields are as checked there."""

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
    query_mask: Tensor | None
    self_attention: bool
    relative = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, n, m)``."""
        return (*self.query.shape[:3], self.key.shape[2])

    @property
    def _values(self) -> Tensor:
        return self.key

    def counted(self) -> Counted:
        """Rows and keys that count."""
        batch, _, n, m = self.shape
        valid = torch.full((batch, n), m > 0, device=self.device)
        seen = None
        if self.mask is not None:
            parts = ((rows, self.positions(rows)) for rows in self.chunks(n))
            sees, seen = self._visibility.rows_and_keys(parts, m)
            valid = sees if m else valid
            if self.self_attention and n == m:
                valid = valid & seen
            elif self.self_attention and self.query_offset + n <= m:
                valid = valid & seen[:, self.query_offset : self.query_offset + n]
        elif self.is_causal or self.sliding_window is not None:
            valid = valid & self._visibility.reaches_keys(self.positions(slice(0, n)), m)
        if self.query_mask is not None:
            valid = valid & self.query_mask.to(device=self.device, dtype=torch.bool)
        return Counted(valid, seen)

    @property
    def every_row_counts(self) -> bool:
        """No row can be padding or see no key; known without synchronizing the device."""
        every = self.query_mask is None and self.mask is None and self.sliding_window is None
        return every and (self.query_offset >= 0 or not self.is_causal)

    def seen_keys(self, counted: Counted) -> Tensor:
        """Keys that some row sees, boolean ``(batch, m)``: an interval where no mask says so."""
        if counted.keys is not None:
            return counted.keys
        n, m = self.shape[2:]
        return self._visibility.interval(range(self.query_offset, self.query_offset + n), m)

    def without_padding(self, counted: Counted) -> ProductLogits:
        """Zeros in place of rows and keys that do not count."""
        out = self
        if not self.every_row_counts:
            out = out.replace(query=torch.where(counted.rows[:, None, :, None], self.query, 0.0))
        if counted.keys is not None:
            out = out.replace(key=torch.where(counted.keys[:, None, :, None], self.key, 0.0))
        return out

    def wide(self) -> ProductLogits:
        """The same with a key for :meth:`chunk`: contiguous, float32 at least."""
        return self.replace(key=at_least_float32(self.key).contiguous())

    def finite_heads(self) -> Tensor:
        """Heads whose queries and keys are finite, boolean ``(heads,)``; rows out of ``query_mask`` left out."""
        query, key, rows = self.query, self.key, self.query_mask
        finite = _finite_heads(query, rows)
        if rows is None or key.shape[2] == query.shape[2]:
            finite &= _finite_heads(key, rows).repeat_interleave(query.shape[1] // key.shape[1])
        return finite

    def detach(self) -> ProductLogits:
        """The same without the graph of its gradients."""
        parts = vars(self).items()
        return self.replace(**{name: part.detach() for name, part in parts if isinstance(part, Tensor)})

    def products(self) -> ProductLogits:
        """The same with ``scaling q·k`` alone: of what is added, only what it hides."""
        mask = self.mask
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            mask = mask > MASKED_BELOW
        return self.replace(mask=mask, bias=None, softcap=None, sinks=None)

    def sequences(self, index: slice | Tensor) -> ProductLogits:
        """The same call with some of its sequences; slices are views."""
        batch = self.shape[0]

        def take(tensor: Tensor | None) -> Tensor | None:
            # A tensor shared by all sequences has one entry.
            return tensor if tensor is None or (tensor.shape[0] == 1 < batch) else tensor[index]

        mask = self.mask
        if isinstance(mask, Tensor):
            mask = take(mask)
        elif mask is not None and isinstance(index, Tensor):
            mask = renumbered(mask, index)
        return self.replace(
            query=self.query[index],
            key=self.key[index],
            mask=mask,
            bias=take(self.bias),
            query_mask=None if self.query_mask is None else self.query_mask[index],
        )

    def tokens(self, tokens: slice) -> ProductLogits:
        """The same call with consecutive tokens, queries and keys alike."""

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, :, tokens, tokens]

        mask = self.mask
        if isinstance(mask, Tensor):
            mask = take(mask)
        elif mask is not None:
            mask = renumbered(mask, start=tokens.start)
        return self.replace(
            query=self.query[:, :, tokens],
            key=self.key[:, :, tokens],
            mask=mask,
            bias=take(self.bias),
            query_mask=None if self.query_mask is None else self.query_mask[:, tokens],
        )

    def in_range(self) -> ProductLogits:
        """The same call in a precision whose range its logits do not leave, with a key for chunks."""
        wide = self.wide()
        if wide.key.numel() == 0 or wide.query.numel() == 0 or wide.key.dtype not in RANGE:
            return wide
        size = bound_of_logits(wide.query, wide.key, wide.scaling, wide.softcap, wide.bias, wide.mask)
        fits = fits_range(size, wide.key.dtype)
        if is_readable(wide.key):
            if bool(fits.all()):
                return wide
            wide = wide.replace(key=wide.key.double())
            fits = fits_range(size, torch.float64)
            if bool(fits.all()):
                return wide
        return wide.replace(query=torch.where(fits, wide.query, torch.nan))

    def chunk(self, index: slice | Tensor, buffer: Tensor) -> Chunk:
        """Logits of some query rows, and which keys they see; the key is as :meth:`wide` makes it."""
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

    @property
    def _visibility(self) -> Visibility:
        sizes = self.query.shape[0], self.query.shape[1]
        return Visibility(self.mask, self.is_causal, self.sliding_window, sizes, self.query.device)

    def visible(self, index: slice | Tensor, position: Tensor, keys: slice) -> Tensor | None:
        """Visibility of some keys to some rows, ``(batch|1, heads|1, rows, keys)``; None: all of them."""
        return self._visibility.of(index, position, keys)


def _finite_heads(vectors: Tensor, counts: Tensor | None) -> Tensor:
    finite = vectors.isfinite().all(-1)
    return (finite if counts is None else finite | ~counts.to(finite)[:, None]).all(-1).all(0)


@dataclasses.dataclass(frozen=True, eq=False)
class GivenLogits(AttentionLogits):
    """Logits that were computed elsewhere, hidden keys pushed down; made by :meth:`AttentionLogits.given`."""

    logits: Tensor  # (batch, heads, n, m), any float dtype
    used: Tensor  # (batch, n): rows that may be looked at; the others may hold anything
    query_offset: int | None
    self_attention: bool
    relative: bool = False
    sinks: Tensor | None = None  # (batch, heads, n)
    largest: Tensor | None = None  # (batch,): the largest logit of the rows that may be looked at
    wide: bool = False  # chunks in float64, whatever the logits are in
    fits: Tensor | None = None  # (batch,): the others become NaN

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, n, m)``."""
        return (*self.logits.shape[:3], self.logits.shape[3])

    @property
    def _values(self) -> Tensor:
        return self.logits

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the chunks."""
        return torch.float64 if self.wide else self.result_dtype

    def in_range(self) -> GivenLogits:
        """The same in a precision whose range the logits do not leave."""
        if self.largest is None or self.dtype == torch.float64:
            return self
        # What is far below is hidden, and relative logits are 0 at most.
        fits = fits_range(self.largest.float().clamp_min(0), torch.float32)
        if is_readable(self.largest):
            return self if bool(fits.all()) else self.replace(wide=True)
        return self.replace(fits=fits)

    def counted(self) -> Counted:
        """Rows that count, found when the logits were checked."""
        return Counted(self.used, None)

    def seen_keys(self, counted: Counted) -> Tensor:
        """Keys that some row sees, boolean ``(batch, m)``."""
        return ~(self.logits <= MASKED_BELOW).all(1).all(1)

    def without_padding(self, counted: Counted) -> GivenLogits:
        """The same: rows that do not count are hidden in every chunk."""
        return self

    def finite_heads(self) -> Tensor:
        """Heads whose logits are finite or hidden, boolean ``(heads,)``."""
        bad = (self.logits.isnan() | (self.logits == torch.inf)) & self.used[:, None, :, None]
        return ~bad.any(-1).any(-1).any(0)

    def sequences(self, index: slice | Tensor) -> GivenLogits:
        """The same call with some of its sequences; slices are views."""
        parts = vars(self).items()
        return self.replace(**{name: part[index] for name, part in parts if isinstance(part, Tensor)})

    def tokens(self, tokens: slice) -> GivenLogits:
        """The same call with consecutive tokens, queries and keys alike."""
        return self.replace(
            logits=self.logits[:, :, tokens, tokens],
            used=self.used[:, tokens],
            sinks=None if self.sinks is None else self.sinks[:, :, tokens],
        )

    def visible(self, index: slice | Tensor, position: Tensor, keys: slice) -> Tensor:
        """Visibility of some keys to some rows, ``(batch, heads, rows, keys)``."""
        return ~(take_rows(self.logits, index)[..., keys] <= MASKED_BELOW)

    def chunk(self, index: slice | Tensor, buffer: Tensor) -> Chunk:
        """Some query rows, and which keys they see."""
        rows = take_rows(self.logits, index)
        used = self.used[:, index] if isinstance(index, slice) else self.used.gather(1, index)
        hidden = (rows <= MASKED_BELOW) | ~used[:, None, :, None]
        x = buffer[: rows.numel()].view(rows.shape)
        x.copy_(rows)
        if self.fits is not None:
            x.masked_fill_(~self.fits[:, None, None, None], torch.nan)
        x.masked_fill_(hidden, 0.0)
        sinks = None
        if self.sinks is not None:
            sinks = take_rows(self.sinks[..., None], index)[..., 0].to(x.dtype)
            sinks = torch.where(used[:, None], sinks, 0.0)
        return Chunk(x, (~hidden).to(x.dtype), 0, self.positions(index), sinks)
