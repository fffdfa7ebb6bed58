"""The two packages that hold PyTorch Lightning: ``lightning`` and ``pytorch_lightning``.

They are the same code under two names, and a job is written with one of them. Their classes are not each other's,
so that what asks for one by ``isinstance`` misses the other's; here it is asked for by name.
"""

import sys
from functools import cache
from typing import Any

_HOMES = ("lightning.pytorch.", "pytorch_lightning.")


@cache
def _names(kind: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in kind.__mro__ if f"{base.__module__}.".startswith(_HOMES))


def is_lightning(thing: object, *names: str) -> bool:
    """Whether an object is of one of Lightning's classes, of whichever package.

    Args:
        thing: a trainer, strategy, logger, callback or module.
        names: names of classes, such as ``"Trainer"`` or ``"DeepSpeedStrategy"``; one is enough.
    """
    kind: Any = type(thing)
    return not _names(kind).isdisjoint(names)


class _Either(type):
    names: tuple[str, ...]

    def __instancecheck__(cls, thing: object) -> bool:
        return is_lightning(thing, *cls.names)


def either(*names: str) -> type:
    """A class for ``isinstance`` that stands for the classes of some name in both packages.

    Args:
        names: names of classes; an instance of one is an instance.
    """
    return _Either(names[0], (), {"names": names})


def loaded_package(name: str) -> Any:
    """One of the two packages where this process has imported it, else None: nothing is imported for the question.

    Args:
        name: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.
    """
    package = sys.modules.get(name)
    return package if hasattr(package, "Callback") else None
