"""A penalty's weight as a share of the gradient of the loss: measured over the first steps, and kept."""

import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_qk.callbacks._ranks import total

STEPS = 10
"""Steps that a share is measured over."""

_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")


def parse_weight(weight: float | str) -> tuple[float, float | None]:
    """A coefficient and no share; or 1 and the share that was asked for, a fraction.

    Raises:
        ValueError: neither a number of at least 0 nor a percentage.
    """
    if isinstance(weight, str):
        found = _PERCENT.fullmatch(weight)
        if found is None:
            raise ValueError(
                f"expected weight to be a number of at least 0 or a share such as '10%', got {weight!r}: pass one "
                "of the two"
            )
        return 1.0, float(found.group(1)) / 100
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"expected a finite weight of at least 0, got {weight}: pass 0 to switch it off")
    return float(weight), None


class GradientShare:
    """The coefficient for which a penalty's gradient has a share of the norm that the loss's has.

    Both norms are those over the weights that the penalty reaches. The median of the first :data:`STEPS` ratios
    counts, at each of these steps that of those so far; the same on every process.

    Args:
        share: a fraction.

    Attributes:
        ratios: of the norm of the loss's gradient to that of the penalty's, of the first steps.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.ratios: list[float] = []

    @property
    def is_known(self) -> bool:
        """Whether all steps that count were seen."""
        return len(self.ratios) >= STEPS

    @property
    def weight(self) -> float:
        """The coefficient; 0 before the first step with two gradients."""
        return self.share * statistics.median(self.ratios) if self.ratios else 0.0

    def see(self, trainer: Trainer, squares: Tensor, scale: Tensor | None) -> None:
        """Take the squared norms of a step's two gradients, ``(2,)``; a collective call.

        Args:
            trainer: of the training.
            squares: of the loss's gradient and of the penalty's, on this process. Whole copies of the weights
                count once a process in both.
            scale: of the loss's gradient, or None.
        """
        loss, penalty = total(trainer, squares.double()).sqrt().tolist()
        if scale is not None:
            loss /= float(scale)
        if math.isfinite(loss) and math.isfinite(penalty) and loss > 0 and penalty > 0:
            self.ratios.append(loss / penalty)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"ratios": list(self.ratios)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with it; another share counts from the same ratios."""
        self.ratios = list(state.get("ratios", ()))
