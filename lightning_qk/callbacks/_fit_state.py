"""What belongs to one fit: made at its start, and what of it goes into a pickle."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn


def nothing() -> None:
    """None, as a factory."""
    return None


class OfOneFit:
    """Base of callbacks whose state begins with each fit, but for one that goes on.

    A fit goes on where the same trainer, with steps behind it, fits the same module again, and where a checkpoint
    is loaded, which comes after :meth:`begin_fit`. A copy or a pickle has the arguments and what was seen, and
    none of what only a running fit needs.
    """

    fit_state: ClassVar[Mapping[str, Callable[[], Any]]] = {}
    """Attribute → what makes its first value; those of all bases count."""
    running_state: ClassVar[Mapping[str, Callable[[], Any]]] = {}
    """The same of what only a running fit needs, such as hooks and threads: left out of pickles."""

    _fit: "tuple[weakref.ref[Any], weakref.ref[nn.Module]] | None" = None

    def begin(self) -> None:
        """Give everything that belongs to one fit its first value."""
        self._fit = None
        for kind in reversed(type(self).__mro__):
            for name in ("fit_state", "running_state"):
                for attribute, make in vars(kind).get(name, {}).items():
                    setattr(self, attribute, make())

    def begin_fit(self, trainer: Any, pl_module: nn.Module) -> None:
        """Begin, if this fit does not go on with the one before; for ``setup``."""
        if self._fit is None or not (
            trainer.global_step > 0 and self._fit[0]() is trainer and self._fit[1]() is pl_module
        ):
            self.begin()
        self._fit = weakref.ref(trainer), weakref.ref(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what only a running fit needs, and the methods of the module that Lightning hangs on."""
        left_out = {"_fit", "log", "log_dict"}
        for kind in type(self).__mro__:
            left_out.update(vars(kind).get("running_state", {}))
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for kind in reversed(type(self).__mro__):
            for attribute, make in vars(kind).get("running_state", {}).items():
                setattr(self, attribute, make())
        vars(self).update(state)
