"""Stand in for a function that others look up by name, and give it back."""

import threading
from collections.abc import Callable, MutableMapping
from typing import Any


class Stand:
    """A wrapper in the place of one attribute or dictionary entry.

    Args:
        make: the original and this object to the wrapper. The wrapper must do nothing but call the original
            while :attr:`active` is False.

    Attributes:
        active: whether the wrapper's place is taken. Somebody may have wrapped the wrapper and go on calling
            it after it was taken down.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any, "Stand"], Any]) -> None:
        self._owner = owner
        self._name = name
        self.active = True
        self._users = 0
        space = owner if isinstance(owner, MutableMapping) else vars(owner)
        self._is_own = name in space
        self._original = space[name] if self._is_own else getattr(owner, name)
        self._wrapper = make(getattr(owner, name) if space is not owner else self._original, self)
        self._put(self._wrapper)

    def _put(self, value: Any) -> None:
        if isinstance(self._owner, MutableMapping):
            self._owner[self._name] = value
        else:
            setattr(self._owner, self._name, value)

    def take_down(self) -> None:
        """Put back what stood there, unless somebody else has put something there since."""
        self.active = False
        space = self._owner if isinstance(self._owner, MutableMapping) else vars(self._owner)
        if space.get(self._name) is not self._wrapper:
            return
        if self._is_own:
            self._put(self._original)
        else:
            delattr(self._owner, self._name)


_stands: dict[tuple[int, str], Stand] = {}
_lock = threading.RLock()


def stand_in(owner: Any, name: str, make: Callable[[Any, Stand], Any]) -> Callable[[], None]:
    """Wrap ``owner.name``, or the entry of a dictionary, once for all who ask.

    Args:
        owner: a class, a module, or a dictionary such as a function's globals.
        name: the attribute or key. An attribute that a class inherits is set on the class and removed later.
        make: see :class:`Stand`; used by the first who asks.

    Returns:
        What gives the place back: the original returns when all who asked have called theirs. A second call
        does nothing.
    """
    key = (id(owner), name)
    with _lock:
        stand = _stands.get(key)
        if stand is None:
            stand = _stands[key] = Stand(owner, name, make)
        stand._users += 1
    used = True

    def give_back() -> None:
        nonlocal used
        with _lock:
            if not used:
                return
            used = False
            stand._users -= 1
            if stand._users == 0:
                del _stands[key]
                stand.take_down()

    return give_back
