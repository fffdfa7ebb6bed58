"""What token moments predict of attention, compared with what was measured."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.record.history import History, RunRecord

_MASSES = ("sink_first", "diagonal", "max_prob")
"""Statistics that change by no more than the share of attention that is moved."""


def semantic_share(
    history: History, predicted: Mapping[str, Tensor], measured: Sequence[History], step: int
) -> Tensor | None:
    """The share of attention that has to be moved, at least, to come from the predicted to the measured one.

    The share that is moved is the total variation between two rows of attention, ``½ Σ |p - p'|``, averaged over
    rows. No statistic that is the probability of a set of keys changes by more, nor does the largest probability:
    so it is at least the largest of ``|measured - predicted|`` of ``sink_first``, ``diagonal`` and ``max_prob``.
    0 where they agree; a head may yet attend to other keys than independent tokens would. Derived.

    Args:
        history: of the predictions, for layers and heads.
        predicted: statistic → flat values of all heads.
        measured: histories of AttentionMonitors.
        step: of both.

    Returns:
        Shares in [0, 1], flat, NaN for a head of which one side is not known; None where no layer was measured.
    """
    out = torch.full((sum(history.heads),), torch.nan)
    parts = dict(zip(history.layers, history.split(out), strict=True))
    found = False
    for other in measured:
        if step not in other.steps:
            continue
        index = other.steps.index(step)
        for label, heads in zip(other.layers, other.heads, strict=True):
            if label not in parts or len(parts[label]) != heads:
                continue
            gaps = []
            for name in _MASSES:
                if name in predicted and name in other.values:
                    before = history.split(predicted[name])[history.layers.index(label)]
                    gaps.append(
                        (other.split(other.values[name][index])[other.layers.index(label)] - before).abs()
                    )
            if gaps:
                # Cross-attention has no diagonal: what is known of a head decides.
                known = torch.stack(gaps)
                largest = torch.where(known.isnan(), -1.0, known).amax(0)
                parts[label].copy_(torch.where(largest < 0, torch.nan, largest))
                found = True
    return out if found else None


class Agreement(NamedTuple):
    """How well a statistic was predicted.

    Attributes:
        heads: how many have both values.
        correlation: Spearman's rank correlation over them; NaN where all have one value.
        error: mean of ``|predicted - measured|``.
    """

    heads: int
    correlation: float
    error: float

    @property
    def words(self) -> str:
        """Both figures; where there is no correlation, why."""
        if math.isnan(self.correlation):
            return f"no correlation, as all heads are predicted or measured alike, and {self.error:.3g}"
        return f"{self.correlation:.2f} and {self.error:.3g}"


def agreement(record: RunRecord, statistic: str) -> Agreement | None:
    """How well a statistic was predicted at the newest step that has both; None for fewer than three heads."""
    predicted, measured = record.histories.get("pred"), record.attention
    if predicted is None or measured is None:
        return None
    if statistic not in predicted.values or statistic not in measured.values:
        return None
    steps = [step for step in predicted.steps if step in measured.steps]
    if not steps:
        return None
    one = predicted.values[statistic][predicted.steps.index(steps[-1])]
    other = measured.values[statistic][measured.steps.index(steps[-1])]
    own = dict(zip(predicted.layers, predicted.split(one), strict=True))
    pairs = [
        torch.stack([own[label], part])
        for label, part in zip(measured.layers, measured.split(other), strict=True)
        if label in own and len(own[label]) == len(part)
    ]
    if not pairs:
        return None
    both = torch.cat(pairs, 1)
    both = both[:, both.isfinite().all(0)].double()
    if both.shape[1] < 3:
        return None
    ranks = torch.stack([_ranks(row) for row in both])
    correlation = float(torch.corrcoef(ranks)[0, 1])
    return Agreement(both.shape[1], correlation, float((both[0] - both[1]).abs().mean()))


def _ranks(values: Tensor) -> Tensor:
    """Ranks, those of ties their mean."""
    below = (values[None] < values[:, None]).sum(1)
    same = (values[None] == values[:, None]).sum(1)
    return below + (same + 1) / 2
