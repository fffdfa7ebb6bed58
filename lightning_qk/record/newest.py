"""The newest numbers of a layer: a step at which it was not run says nothing about them."""

from torch import Tensor

from lightning_qk.record.history import History
from lightning_qk.record.states import EMPTY, LEFT_OUT, NO_VALUE, are_empty


class Newest:
    """What is known of a layer at the newest step that has numbers of it.

    Attributes:
        values: statistic → values of the heads; empty where nothing is known.
        states: one a head, see :mod:`lightning_qk.record.states`; None where unknown.
        missing: why it has no numbers, or why they are not of the newest step; empty where neither holds.
        explains_nan: whether a NaN is known to be a fault or a value that does not exist by design.
        logits: its heads' largest logits at all kept steps, ``(points, heads)``; None where not recorded.
        first_norm: squared norms of its heads' W_QK at the first kept step, of several; None where not recorded.
    """

    def __init__(self, history: History | None, label: str) -> None:
        self.values: dict[str, Tensor] = {}
        self.states: Tensor | None = None
        self.missing, self.explains_nan, self.logits, self.heads = "", False, None, 0
        self.first_norm: Tensor | None = None
        if history is None or label not in history.layers:
            return
        place, reason = history.layers.index(label), history.reasons.get(label, "")
        self.heads, self.missing = history.heads[place], reason
        if not history.steps:
            return
        last = len(history.steps) - 1
        index = next((i for i in range(last, -1, -1) if not are_empty(history.state(label, i))), last)
        self.states = states = history.state(label, index)
        begin = sum(history.heads[:place])
        own = slice(begin, begin + self.heads)
        self.values = {name: flat[index][own].double() for name, flat in history.values.items()}
        self.explains_nan = states is not None or _is_cross(history, place)
        self.missing = ""
        if "max_abs_logit" in history.values:
            self.logits = history.series("max_abs_logit")[:, own]
        if "frobenius_sq" in history.values and last > 0:
            self.first_norm = history.values["frobenius_sq"][0][own].double()
        if index != last:
            why = EMPTY[int(history.state(label, last)[0])]  # type: ignore[index]  # it is empty, so it is known
            self.missing = f"measured at step {history.steps[index]}: at step {history.steps[last]} {why}"
        elif states is not None and bool((states == LEFT_OUT).all()):
            self.missing = f"it is left out: {reason}" if reason else "it is left out"
        elif states is not None and are_empty(states):
            steps = "the measured step" if last == 0 else f"the {last + 1} measured steps that are kept"
            self.missing = f"at {steps} {EMPTY[int(states[0])]}"

    @property
    def is_measured(self) -> bool:
        """Whether anything is known."""
        return any(bool(value.isfinite().any()) for value in self.values.values())

    @property
    def has_no_value(self) -> bool:
        """Whether its heads have no value by design."""
        return self.states is not None and bool((self.states == NO_VALUE).all())


def _is_cross(history: History, place: int) -> bool:
    """Cross-attention in a record without states: it has singular values, and at no step a norm."""

    def is_known(name: str, points: slice) -> bool:
        return any(
            bool(history.split(flat)[place].isfinite().any()) for flat in history.values.get(name, [])[points]
        )

    return is_known("singular_max", slice(-1, None)) and not is_known("frobenius_sq", slice(None))
