"""Which keys a query row sees: masks, causality and windows, and which rows and keys count by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.chunks import MASKED_BELOW, MaskFunction, take_rows


class Counted(NamedTuple):
    """What counts of a call.

    Attributes:
        rows: rows that see a key and are no padding, boolean ``(batch, n)``.
        keys: keys that some row sees, boolean ``(batch, m)``; None without a mask: unseen keys are finite too.
    """

    rows: Tensor
    keys: Tensor | None


class Visibility(NamedTuple):
    """What decides which keys a row sees.

    Attributes:
        mask: as of :class:`~lightning_qk.functional.chunks.AttentionOptions`; a tensor has four axes.
        is_causal: see there.
        sliding_window: see there.
        sizes: batch and heads.
        device: of the results.
    """

    mask: Tensor | MaskFunction | None
    is_causal: bool
    sliding_window: int | None
    sizes: tuple[int, int]
    device: torch.device

    def of(self, index: slice | Tensor, position: Tensor, keys: slice) -> Tensor | None:
        """Visibility of some keys to some rows, ``(batch|1, heads|1, rows, keys)``; None: all of them.

        Args:
            index: a slice of rows, or indices of shape ``(batch, rows)``.
            position: of these rows on the axis of the keys, ``(batch|1, rows)``.
            keys: which of them.
        """
        visible = None
        if isinstance(self.mask, Tensor):
            mask = take_rows(self.mask, index)[..., keys]
            visible = mask if mask.dtype == torch.bool else mask > MASKED_BELOW
        elif self.mask is not None:
            visible = evaluate_mask(self.mask, self.sizes, index, keys, self.device)
        if self.is_causal or self.sliding_window is not None:
            places = torch.arange(keys.start, keys.stop, device=position.device)
            ahead = places - position[:, None, :, None]
            if self.is_causal:
                visible = ahead <= 0 if visible is None else visible & (ahead <= 0)
            if self.sliding_window is not None:
                near = ahead.abs() < self.sliding_window
                visible = near if visible is None else visible & near
        return visible

    def rows_and_keys(self, parts: Iterable[tuple[slice, Tensor]], keys: int) -> tuple[Tensor, Tensor]:
        """Rows that see a key, ``(batch, n)``, and keys that some row sees, ``(batch, keys)``, under a mask.

        Args:
            parts: slices of all rows, and their positions.
            keys: how many there are.
        """
        seen = torch.zeros(self.sizes[0], keys, dtype=torch.bool, device=self.device)
        sees = [seen[:, :0]]
        for rows, position in parts:
            visible = self.of(rows, position, slice(0, keys))
            assert visible is not None  # there is a mask
            visible = visible.any(1)
            sees.append(visible.any(-1).expand(len(seen), -1))
            seen |= visible.any(-2)
        return torch.cat(sees, dim=1), seen

    def reaches_keys(self, position: Tensor, keys: int) -> Tensor:
        """Rows that are not before the first key nor further than a window behind the last, by their positions."""
        reach = 0 if self.sliding_window is None else self.sliding_window - 1
        reached = position + (0 if self.is_causal else reach) >= 0
        return reached if self.sliding_window is None else reached & (position - reach < keys)

    def interval(self, rows: range, keys: int) -> Tensor:
        """Keys that some of consecutive rows see where there is no mask, boolean ``(batch, keys)``."""
        low, high = 0, keys
        if self.sliding_window is not None:
            low, high = rows.start - self.sliding_window + 1, rows.stop - 1 + self.sliding_window
        if self.is_causal:
            high = min(high, rows.stop)
        place = torch.arange(keys, device=self.device)
        return ((place >= low) & (place < high)).expand(self.sizes[0], keys)


def evaluate_mask(
    mask: MaskFunction, sizes: Sequence[int], index: slice | Tensor, keys: slice, device: torch.device
) -> Tensor:
    """A mask function on some rows and keys, ``(batch|1, heads|1, rows, keys)``; ``sizes`` are batch and heads."""
    batch, heads = sizes
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
            "expected the mask function to return a boolean tensor that broadcasts to (batch, heads, "
            f"rows, keys) = {(batch, heads, rows, width)}, got {got}: index with the four tensors "
            "together, as in document[batch, query]"
        )
    return visible.reshape(padded).expand(-1, -1, rows, width)


def renumbered(mask: MaskFunction, sequences: Tensor | None = None, start: int = 0) -> MaskFunction:
    """The mask function of some sequences, or from some token on."""
    return lambda sequence, head, query, key: mask(
        sequence if sequences is None else sequences[sequence], head, query + start, key + start
    )
