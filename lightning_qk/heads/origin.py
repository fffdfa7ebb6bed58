"""Whose classes modules are: names tell only where the code that gave them their meaning is known."""

import inspect
from typing import Any

from torch import nn

# Packages whose layers keep what the table of layouts says of their names.
_KNOWN = frozenset({"transformers", "torch", "timm"})
# What wraps an instance's forward without changing what it computes.
_WRAPS = frozenset({*_KNOWN, "accelerate", "lightning", "lightning_qk", "functools"})
# What a class may define without having a say in what its forward computes.
_HARMLESS = frozenset(
    {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__dict__", "__weakref__", "__slots__"}
    | {"__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__", "__annotate_func__"}
    | {"extra_repr", "reset_parameters", "_reset_parameters"}
)


def is_known(module: nn.Module) -> bool:
    """Whether all code that a module's forward consists of is transformers', torch's or timm's.

    A class of one's own counts where it derives from such a class and defines no more than how it is built.
    Neither does a class count whose forward was replaced, nor a module with a forward of its own.
    """
    kind: Any = type(module)
    known = False
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        if _package(base) in _KNOWN:
            known = True
        elif not _HARMLESS.issuperset(vars(base)):
            return False
    return known and _is_of(kind.forward, _KNOWN) and _is_own_forward(module)


def _is_own_forward(module: nn.Module) -> bool:
    space = module.__dict__
    if "_old_forward" in space:  # offloading keeps the forward that it wraps
        return _is_of(space["_old_forward"], _KNOWN)
    return "forward" not in space or _is_of(space["forward"], _WRAPS)


def _is_of(function: Any, packages: frozenset[str]) -> bool:
    function = inspect.unwrap(function)
    return _package(getattr(function, "func", function)) in packages


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", None) or "").split(".")[0]
