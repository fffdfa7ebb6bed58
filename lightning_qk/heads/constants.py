"""What a layer computes with beside its parameters: numbers and words in attributes, and buffers."""

import weakref
from typing import Any

from torch import Tensor, nn

# What torch itself keeps of a module; whether it trains changes with every validation.
_OF_TORCH = frozenset({*vars(nn.Module()), "training"})
# After so many changes without any effect an attribute is taken for a counter.
_HARMLESS_CHANGES = 3

_Places = dict[tuple[int, str], Any]


class Constants:
    """The plain attributes and the buffers of a layer and all modules in it, to see whether they changed.

    A temperature that is annealed, a gate that is closed, an expert that is chosen: what was found out about the
    layer holds as long as they stay. Nothing of the device is waited for. What changes several times and turns out
    to change nothing, such as a counter of steps, is not looked at any more.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._changes: dict[tuple[int, str], int] = {}
        self._kept = self._now()

    def are_kept(self) -> bool:
        """Whether nothing changed since then."""
        return self._module() is None or not self._changed(self._now())

    def keep(self) -> None:
        """Take what is there now for what was kept: it was seen to make no difference."""
        now = self._now()
        for place in self._changed(now):
            self._changes[place] = self._changes.get(place, 0) + 1
        self._kept = now

    def _changed(self, now: _Places) -> list[tuple[int, str]]:
        return [
            place
            for place in {**self._kept, **now}
            if self._kept.get(place, now) != now.get(place, now)
            and self._changes.get(place, 0) < _HARMLESS_CHANGES
        ]

    def _now(self) -> _Places:
        module = self._module()
        found: _Places = {}
        for place, own in enumerate(() if module is None else module.modules()):
            for name, value in own.__dict__.items():
                if name not in _OF_TORCH and _is_plain(value):
                    found[place, name] = value
            for name, buffer in own._buffers.items():
                if buffer is not None:
                    found[place, name] = (id(buffer), _version(buffer))
        return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(isinstance(part, bool | int | float | str) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not say."""
    return -1 if tensor.is_inference() else tensor._version
