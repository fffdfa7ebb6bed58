"""Patches of functions that others look up by name, taken back when the last user is done."""

import threading
from collections.abc import Callable, MutableMapping
from typing import Any


class Patch:
    """A wrapper in place of an attribute or dictionary entry.

    Args:
        owner: a class, a module, or a dictionary such as a function's globals.
        name: the attribute or key.
        make: the original and this object to the wrapper. The wrapper must do nothing but call the original
            while :attr:`active` is False.

    Attributes:
        active: whether the patch is in place. Other code may still call a wrapper of it afterwards.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any, "Patch"], Any]) -> None:
        self._owner = owner
        self._name = name
        self.active = True
        self.users = 0
        self._is_own = name in self._space
        self._original = self._space[name] if self._is_own else getattr(owner, name)
        self._wrapper = make(self._original if self._space is owner else getattr(owner, name), self)
        self._put(self._wrapper)

    @property
    def _space(self) -> Any:
        return self._owner if isinstance(self._owner, MutableMapping) else vars(self._owner)

    def _put(self, value: Any) -> None:
        if self._space is self._owner:
            self._owner[self._name] = value
        else:
            setattr(self._owner, self._name, value)

    def undo(self) -> None:
        """Put the original back, unless other code has put something there since."""
        self.active = False
        if self._space.get(self._name) is not self._wrapper:
            return
        if self._is_own:
            self._put(self._original)
        else:
            delattr(self._owner, self._name)


_patches: dict[tuple[int, str], Patch] = {}
_lock = threading.RLock()


def patch(owner: Any, name: str, make: Callable[[Any, Patch], Any]) -> Callable[[], None]:
    """Wrap ``owner.name``, or the entry of a dictionary, once for all users; arguments as for :class:`Patch`.

    An attribute that a class inherits is set on the class and removed later. ``make`` is that of the first user.

    Returns:
        A function that undoes this: the original returns once all users have called theirs. A second call does
        nothing.
    """
    key = (id(owner), name)
    with _lock:
        own = _patches.get(key)
        if own is None:
            own = _patches[key] = Patch(owner, name, make)
        own.users += 1
    used = True

    def undo() -> None:
        nonlocal used
        with _lock:
            if not used:
                return
            used = False
            own.users -= 1
            if own.users == 0:
                del _patches[key]
                own.undo()

    return undo
