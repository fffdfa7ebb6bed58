"""The newest numbers of a layer: a step at which it was not run says nothing about them."""

from typing import Any

import numpy as np
import torch

from lightning_qk.record.history import History
from lightning_qk.record.states import EMPTY, LEFT_OUT, NO_VALUE, are_empty

Numbers = np.ndarray[Any, np.dtype[np.float64]]
# NumPy throughout: torch's operators have costs of their own, and layers are judged at every measured step.


class Rows:
    """A history's rows as arrays, each made once for all layers."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._rows: dict[tuple[str, int], Any] = {}

    def row(self, name: str, index: int) -> Any:
        """Values of a statistic at a kept step, one a head, in float32."""
        if (name, index) not in self._rows:
            self._rows[name, index] = self.history.values[name][index].numpy()
        return self._rows[name, index]

    def all(self, index: int) -> dict[str, Any]:
        """Statistic → values at a kept step, one a head, in float32."""
        names = list(self.history.values)
        if any((name, index) not in self._rows for name in names):
            table = torch.stack([self.history.values[name][index] for name in names]).numpy()
            self._rows |= {(name, index): row for name, row in zip(names, table, strict=True)}
        return {name: self._rows[name, index] for name in names}

    def states(self, index: int) -> Any:
        """States at a kept step, one a head; None where unknown."""
        found = self.history.states[index]
        if found is None:
            return None
        if ("", index) not in self._rows:
            self._rows["", index] = found.numpy()
        return self._rows["", index]

    def place(self, label: str) -> slice:
        """Where the heads of a layer are in a row."""
        index = self.history.layers.index(label)
        begin = sum(self.history.heads[:index])
        return slice(begin, begin + self.history.heads[index])


class Newest:
    """What is known of a layer at the newest step that has numbers of it.

    Args:
        rows: the history; None: there is none.
        label: the layer.

    Attributes:
        values: statistic → values of the heads; empty where nothing is known.
        states: one a head, see :mod:`lightning_qk.record.states`; None where unknown.
        missing: why it has no numbers, or why they are not of the newest step; empty where neither holds.
        explains_nan: whether a NaN is known to be a fault or a value that does not exist by design.
        first_norm: squared norms of its heads' W_QK at the first kept step, of several; None where not recorded.
    """

    def __init__(self, rows: Rows | None, label: str) -> None:
        self.values: dict[str, Numbers] = {}
        self.states: np.ndarray[Any, np.dtype[np.int8]] | None = None
        self.missing, self.explains_nan, self.heads = "", False, 0
        self.first_norm: Numbers | None = None
        if rows is None or label not in rows.history.layers:
            return
        history = rows.history
        own, reason = rows.place(label), history.reasons.get(label, "")
        self.heads, self.missing = own.stop - own.start, reason
        if not history.steps:
            return
        last = len(history.steps) - 1

        def states_at(point: int) -> Any:
            found = rows.states(point)
            return None if found is None else found[own]

        index = next((i for i in range(last, -1, -1) if not are_empty(states_at(i))), last)
        self.states = states = states_at(index)
        self.values = {name: row[own].astype(np.float64) for name, row in rows.all(index).items()}
        self.explains_nan = states is not None or _is_cross(rows, own)
        self.missing = ""
        if "frobenius_sq" in history.values and last > 0:
            self.first_norm = rows.row("frobenius_sq", 0)[own].astype(np.float64)
        if index != last:
            why = EMPTY[int(states_at(last)[0])]  # it is empty, so it is known
            self.missing = f"measured at step {history.steps[index]}: at step {history.steps[last]} {why}"
        elif states is not None and bool((states == LEFT_OUT).all()):
            self.missing = f"it is left out: {reason}" if reason else "it is left out"
        elif states is not None and are_empty(states):
            steps = "the measured step" if last == 0 else f"the {last + 1} measured steps that are kept"
            self.missing = f"at {steps} {EMPTY[int(states[0])]}"

    @property
    def is_measured(self) -> bool:
        """Whether anything is known."""
        return any(bool(np.isfinite(value).any()) for value in self.values.values())

    @property
    def has_no_value(self) -> bool:
        """Whether its heads have no value by design."""
        return self.states is not None and bool((self.states == NO_VALUE).all())


def _is_cross(rows: Rows, own: slice) -> bool:
    """Cross-attention in a record without states: it has singular values, and at no step a norm."""

    def is_known(name: str, points: range) -> bool:
        return any(bool(np.isfinite(rows.row(name, point)[own]).any()) for point in points)

    known, count = rows.history.values, len(rows.history)
    has_singular = "singular_max" in known and is_known("singular_max", range(count - 1, count))
    return has_singular and not ("frobenius_sq" in known and is_known("frobenius_sq", range(count)))
