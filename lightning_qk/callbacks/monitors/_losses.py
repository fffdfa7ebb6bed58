"""Measurements that are lost for a reason that may pass, such as memory that ran out."""

from collections.abc import Iterable, Mapping, MutableMapping

MOST_FAILURES = 3
"""After so many failures one after the other something is not tried again."""


def lost_reason(error: Exception) -> str:
    """Why a measurement is lost, as a clause."""
    return f"measuring it failed ({type(error).__name__}: {error})"


class Losses:
    """Counts, for each layer, how many measurements were lost one after the other.

    Attributes:
        was_told: whether the first of them was said.
    """

    def __init__(self) -> None:
        self.was_told = False
        self._in_a_row: dict[str, int] = {}

    def end(self, names: Iterable[str], lost: Mapping[str, str], problems: MutableMapping[str, str]) -> None:
        """End a measurement.

        Args:
            names: all layers.
            lost: those of which it is lost, and why.
            problems: where those go that were lost too often, not to be listened to again.
        """
        for name in names:
            if name not in lost:
                self._in_a_row.pop(name, None)
                continue
            times = self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
            if times >= MOST_FAILURES:
                problems.setdefault(name, f"{lost[name]}, {times} times in a row")
