"""Hooks that a monitor's own failure never leaves: training goes on without the monitor."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import lightning.pytorch

HOOKS = frozenset(
    name
    for name, value in vars(lightning.pytorch.Callback).items()
    if callable(value) and not name.startswith("_")
)
"""Names of everything that a trainer calls on a callback."""

# What still runs on a monitor that watches nothing (any more): a new start, and the end.
_ALWAYS = (
    "setup",
    "on_fit_start",
    "teardown",
    "on_train_end",
    "on_exception",
    "state_dict",
    "load_state_dict",
)


class Refused(ValueError):
    """A monitor with ``on_unreadable="raise"`` refuses a model: what alone leaves its hooks."""


class GuardedHooks(ABC):
    """Base of callbacks none of whose hooks raises.

    Every hook that a subclass defines is wrapped. An exception out of it is handed to :meth:`hook_failed`;
    :class:`Refused`, and what is no ``Exception`` (KeyboardInterrupt, SystemExit), pass. A hook that calls that of
    its base class is one hook.
    """

    idle: bool = False
    """Whether there is nothing to watch: hooks other than those of start and end do nothing then."""
    _inside: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in HOOKS & vars(cls).keys():
            setattr(cls, name, _guarded(name, vars(cls)[name]))

    @abstractmethod
    def hook_failed(self, hook: str, error: Exception) -> None:
        """Deal with what a hook raised; nothing may come out of here."""


def _guarded(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def guarded(self: GuardedHooks, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return hook(self, *args, **kwargs)
        if self.idle and name not in _ALWAYS:
            return None
        self._inside = True
        try:
            return hook(self, *args, **kwargs)
        except Refused:
            raise
        except Exception as error:
            self.hook_failed(name, error)
            return {} if name == "state_dict" else None
        finally:
            self._inside = False

    return guarded
