"""Conditions on what was read, for scripts: ``qk/eig_var/max>3``."""

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lightning_qk.inspect.errors import BadInput
from lightning_qk.inspect.read import Reading

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"^\s*(?P<key>[^\s<>=]+)\s*(?P<operator>>=|<=|>|<)\s*(?P<number>\S+)\s*$")


class Condition(NamedTuple):
    """A bound on one number.

    Attributes:
        text: as it was given.
        key: of the number, as monitors log it.
        operator: ``>``, ``>=``, ``<`` or ``<=``.
        bound: what it is compared with.
    """

    text: str
    key: str
    operator: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether it holds; of a number that is not known, it does."""
        return math.isnan(value) or _OPERATORS[self.operator](value, self.bound)


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        BadInput: it is none.
    """
    found = _CONDITION.match(text)
    try:
        if found is None:
            raise ValueError
        bound = float(found["number"])
        if math.isnan(bound):
            raise ValueError
    except ValueError:
        raise BadInput(
            f"expected a condition such as 'qk/eig_var/max>3' after --fail-on, got {text!r}: give a key, "
            "one of >, >=, <, "
            "<=, and a number, in quotes"
        ) from None
    return Condition(text.strip(), found["key"], found["operator"], bound)


def logged_values(reading: Reading) -> dict[str, float]:
    """Every number of a reading under the key that the monitors log it by.

    ``qk/eig_var/mean``, ``/min`` and ``/max`` over all heads; ``qk/layer_03/eig_var``, the mean over the layer's
    heads; ``qk/layer_03/head_05/eig_var``; likewise ``attn/…``. Statistics that a layer cannot have are left out;
    a number that is not finite where there should be one is NaN or infinite in what is made of it.
    """
    out: dict[str, float] = {}
    for group, statistics in (("qk", reading.values), ("attn", reading.attention)):
        for name, flat in statistics.items():
            layers = [
                (label, part)
                for place, (label, part) in enumerate(zip(reading.labels, reading.split(flat), strict=True))
                if reading.has_value(name, place)
            ]
            numbers = [value for _, part in layers for value in part.tolist()]
            if not numbers:
                continue
            unknown = any(math.isnan(value) for value in numbers)
            out[f"{group}/{name}/mean"] = sum(numbers) / len(numbers)
            out[f"{group}/{name}/min"] = math.nan if unknown else min(numbers)
            out[f"{group}/{name}/max"] = math.nan if unknown else max(numbers)
            for label, part in layers:
                out[f"{group}/{label}/{name}"] = float(part.double().mean())
                for head, value in enumerate(part.tolist()):
                    out[f"{group}/{label}/head_{head:02d}/{name}"] = value
    return out


def check_condition(condition: Condition, values: Mapping[str, float]) -> float | None:
    """The number that a condition holds of, or None where it does not hold.

    Raises:
        BadInput: there is no such number.
    """
    if condition.key not in values:
        close = difflib.get_close_matches(condition.key, list(values), n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else "--json lists the keys"
        raise BadInput(f"expected a key that was read after --fail-on, got {condition.key!r}; {hint}")
    value = values[condition.key]
    return value if condition.holds(value) else None
