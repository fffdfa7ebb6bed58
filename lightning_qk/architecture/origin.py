"""Which library a module's class comes from: names tell a layout only where the code behind them is known."""

import functools
import os
import sys
from typing import Any

from torch import nn

# Packages whose layers keep what the table of layouts says of their names.
_KNOWN = frozenset({"transformers", "torch", "timm"})
# What wraps an instance's forward without changing what it computes.
_WRAPS = frozenset({*_KNOWN, "accelerate", "lightning", "lightning_qk", "functools"})
# What a class may define without having a say in what its forward computes.
_HARMLESS = frozenset(
    {
        "__init__",
        "__module__",
        "__qualname__",
        "__doc__",
        "__annotations__",
        "__dict__",
        "__weakref__",
        "__slots__",
    }
    | {"__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__", "__annotate_func__"}
    | {"extra_repr", "reset_parameters", "_reset_parameters"}
)


def is_named(module: nn.Module, name: str) -> bool:
    """Whether a module's class or one of its bases has a name: FSDP2 gives modules a class derived from theirs."""
    return any(base.__name__ == name for base in type(module).__mro__)


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
    """Whether a function, and all that it says it wraps, was written in one of some packages."""
    wrapped = getattr(function, "__wrapped__", None)
    inner = getattr(function, "func", function)
    code = getattr(inner, "__code__", None)
    home = _package(inner) if code is None else _home(code.co_filename)
    allowed = packages if wrapped is None else packages | _WRAPS
    return home in allowed and (wrapped is None or _is_of(wrapped, packages))


def _home(file: str) -> str:
    """The package whose folder a file lies in, of those that count here; "" for none.

    A function's own word for its module is copied by ``functools.wraps``, and anybody may set it.
    """
    for package in _WRAPS:
        module = sys.modules.get(package)
        for folder in getattr(module, "__path__", ()):
            if os.path.realpath(file).startswith(os.path.realpath(folder) + os.sep):
                return package
    origin = getattr(sys.modules.get("functools"), "__file__", None)
    return (
        "functools" if origin is not None and file in (origin, functools.wraps.__code__.co_filename) else ""
    )


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", None) or "").split(".")[0]
