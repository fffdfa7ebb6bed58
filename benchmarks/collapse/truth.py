"""What became of a run, by its training loss alone.

The rule, fixed before any detector was tuned:

- The loss is smoothed by the median of the last :data:`SMOOTH` steps.
- A family's reference is three plain runs of it, of seeds that no other run has: the median of their smoothed
  losses at each step, and the median of their means over the last tenth of the steps, their final loss.
- A run **fails** when a loss is not finite, or its own mean over the last tenth is above ``MARGIN`` times the
  final loss of the reference. Else it is **fine**.
- A run that fails has **diverged** when a loss is not finite or its smoothed loss ends above ``MARGIN`` times the
  lowest that it ever was; else it is stuck on a **plateau**.
- The **step of failure** is the first step whose loss is not finite; or, where that is earlier, the first step
  from which on the smoothed loss is above ``SHOWS`` times the reference at nine of ten steps until the end, that
  step among them. From there on somebody who has healthy runs beside it sees it in the loss.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 1.1
SHOWS = 1.05
SMOOTH = 20
SHARE = 0.9


@dataclass(frozen=True)
class Reference:
    """What is healthy in a family.

    Attributes:
        level: median over its runs of the smoothed loss at each step.
        final: median over its runs of the mean loss of the last tenth of the steps.
    """

    level: Sequence[float]
    final: float


@dataclass(frozen=True)
class Truth:
    """What became of a run.

    Attributes:
        outcome: ``"diverged"``, ``"plateau"`` or ``"fine"``.
        final: mean loss of the last tenth of the steps; NaN where one is not finite.
        failure: step of failure, counted from 1; None where it is fine.
    """

    outcome: str
    final: float
    failure: int | None

    @property
    def fails(self) -> bool:
        return self.outcome != "fine"


def smoothed(losses: Sequence[float]) -> list[float]:
    """Median of the last steps up to each."""
    return [statistics.median(losses[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(losses))]


def final(losses: Sequence[float]) -> float:
    """Mean of the last tenth."""
    tail = losses[-max(1, len(losses) // 10) :]
    return math.fsum(tail) / len(tail)


def reference(runs: Sequence[Sequence[float]]) -> Reference:
    """Of the losses of a family's reference runs, all of the same length."""
    level = [statistics.median(values) for values in zip(*(smoothed(losses) for losses in runs), strict=True)]
    return Reference(level, statistics.median(final(losses) for losses in runs))


def judge(losses: Sequence[float], healthy: Reference) -> Truth:
    """What became of a run with these losses."""
    broken = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    until = len(losses) if broken is None else broken - 1
    end = math.nan if broken else final(losses)
    if end <= MARGIN * healthy.final:
        return Truth("fine", end, None)
    smooth = smoothed(losses[:until])
    behind = [own > SHOWS * level for own, level in zip(smooth, healthy.level, strict=False)]
    failure, count = broken or len(losses), 0
    for index in reversed(range(until)):
        count += behind[index]
        if behind[index] and count >= SHARE * (until - index):
            failure = index + 1
    diverged = broken is not None or smooth[-1] > MARGIN * min(smooth)
    return Truth("diverged" if diverged else "plateau", end, failure)
