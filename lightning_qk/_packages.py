"""Packages: names of ours that are imported on first use, and the two that contain PyTorch Lightning.

``lightning`` and ``pytorch_lightning`` are the same code under two names, and a job is written with one of them.
Their classes differ, so that ``isinstance`` with a class of one misses those of the other; :func:`is_lightning`
compares names.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any


def lazy(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that imports its public names on first use (PEP 562).

    Args:
        package: its ``__name__``.
        homes: module of the package → names that it defines.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home})


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
