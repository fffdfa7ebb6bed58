"""Sums of many attention calls, pooled until they are reduced over ranks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_qk.functional.attention import AttentionSums, MeanSums
from lightning_qk.metrics.means import HeadMeans

# How the parts of additive forms are pooled; the others are added.
_MAXIMUM = "maximum"


class SumsPool:
    """What the layers' calls add up to since the last :meth:`reset`.

    Memory does not grow with the number of calls: sums are pooled as they come.

    Attributes:
        lost: layer → why a call of it is missing, so that the others say nothing.
        left_out_calls: layers that had calls which are not to be measured.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self.lost: dict[str, str] = {}
        self.left_out_calls: set[str] = set()

    def add(
        self, name: str, sums: AttentionSums | MeanSums, *, heads: int, where: slice | None = None
    ) -> None:
        """Add one call.

        Args:
            name: the layer.
            sums: of the call's heads, each part of shape ``(..., batch, heads)``.
            heads: how many the layer has in all.
            where: which of them the call had, where other processes compute the rest; None for all.
        """
        pooled: dict[str, Tensor] = {}
        for part, value in sums._asdict().items():
            is_maximum = part == _MAXIMUM
            over = value.amax(1, keepdim=True) if is_maximum else value.sum(1, keepdim=True)
            pooled[part] = (
                over if where is None else _place(over, heads, where, -torch.inf if is_maximum else 0.0)
            )
            before = self._sums.get(name)
            if before is not None:
                old = getattr(before, part)
                pooled[part] = torch.maximum(old, pooled[part]) if is_maximum else old + pooled[part]
        self._sums[name] = type(sums)(**pooled)

    @property
    def names(self) -> frozenset[str]:
        """The layers that had a call."""
        return frozenset(self._sums)

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget layers."""
        for name in names:
            self._sums.pop(name, None)

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self.lost = {}
        self.left_out_calls = set()

    def into(self, metric: HeadMeans) -> None:
        """Update a metric with what is pooled."""
        metric.update({name: [sums] for name, sums in self._sums.items()})


def _place(part: Tensor, heads: int, where: slice, empty: float) -> Tensor:
    out = part.new_full((*part.shape[:-1], heads), empty)
    out[..., where] = part
    return out
