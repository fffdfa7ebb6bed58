"""Why a head has no number: four cases that are not the same.

At each measured step a head is in one of these states. A head that has no value because of what it is (eigenvalues
of cross-attention), one that did not run, one that ran on nothing that counts, and one that is not finite are
distinguished by how much was measured of them, not by the NaN that all of them leave.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KNOWN = 0
"""It was measured; single statistics may have no value."""
NO_VALUE = 1
"""By design: what is asked of other layers does not exist for this one, which is healthy."""
DID_NOT_RUN = 2
"""Its layer was not run at this step."""
NO_DATA = 3
"""Its layer was run, on nothing that counts: padding alone, or too few tokens."""
NOT_FINITE = 4
"""It was measured and holds NaN or inf."""
LEFT_OUT = 5
"""It cannot be measured, for a reason that is kept beside the history."""

EMPTY = {
    DID_NOT_RUN: "it did not run, or its attention could not be seen",
    NO_DATA: "it had nothing to measure: padding or generation alone, or too few tokens",
}
"""States that say something about the step and not about the head, in words: earlier numbers still hold."""

_UNKNOWN = -1


def are_empty(states: Tensor | None) -> bool:
    """Whether a step says nothing about any of these heads."""
    return states is not None and all(int(state) in EMPTY for state in states)


def pack_states(states: Sequence[Tensor | None], heads: int) -> Tensor | None:
    """States of all steps as ``(points, heads)`` int8, -1 where unknown; None where all are."""
    if all(one is None for one in states):
        return None
    unknown = torch.full((heads,), _UNKNOWN, dtype=torch.int8)
    return torch.stack([unknown if one is None else one for one in states])


def unpack_states(states: Any, points: int, heads: int) -> list[Tensor | None]:
    """What :func:`pack_states` packed; None at every step for records of versions without states."""
    if not isinstance(states, Tensor) or tuple(states.shape) != (points, heads):
        return [None] * points
    return [None if bool((row == _UNKNOWN).any()) else row.to(torch.int8).clone() for row in states]
