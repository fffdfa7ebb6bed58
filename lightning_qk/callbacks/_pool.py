"""Attention sums of many calls, pooled until they are reduced over ranks."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_qk.functional.localization import AttentionSums
from lightning_qk.metrics.attention import AttentionStatistics


class AttentionPool:
    """What the layers' calls add up to since the last :meth:`reset`.

    Memory does not grow with the number of calls: sums are pooled as they come.
    """

    def __init__(self) -> None:
        self._sums: dict[str, AttentionSums] = {}

    def add(self, name: str, sums: AttentionSums, *, heads: int, where: slice | None = None) -> None:
        """Add one call.

        Args:
            name: the layer.
            sums: of the call's heads.
            heads: how many the layer has in all.
            where: which of them the call had, where other processes compute the rest; None for all.
        """
        total, weight, variance = (part.sum(1, keepdim=True) for part in sums[:3])
        pooled = AttentionSums(total, weight, variance, sums.maximum.amax(1, keepdim=True))
        if where is not None:
            empty = (0.0, 0.0, 0.0, -torch.inf)
            placed = [_place(part, heads, where, value) for part, value in zip(pooled, empty, strict=True)]
            pooled = AttentionSums(*placed)
        before = self._sums.get(name)
        if before is not None:
            pooled = AttentionSums(
                total=before.total + pooled.total,
                weight=before.weight + pooled.weight,
                variance=before.variance + pooled.variance,
                maximum=torch.maximum(before.maximum, pooled.maximum),
            )
        self._sums[name] = pooled

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget layers."""
        for name in names:
            self._sums.pop(name, None)

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()

    @property
    def heads(self) -> dict[str, int]:
        """Layer name → number of heads, of the layers that were called."""
        return {name: sums.total.shape[-1] for name, sums in self._sums.items()}

    def metric(self, heads: Mapping[str, int], device: torch.device) -> AttentionStatistics:
        """A metric that was updated with what is pooled; its ``compute`` reduces over ranks.

        Args:
            heads: every layer and its number of heads, the same on all ranks.
            device: that the ranks communicate on.
        """
        metric = AttentionStatistics(heads).to(device)
        metric.update({name: [sums] for name, sums in self._sums.items()})
        return metric


def _place(part: Tensor, heads: int, where: slice, empty: float) -> Tensor:
    out = part.new_full((*part.shape[:-1], heads), empty)
    out[..., where] = part
    return out
