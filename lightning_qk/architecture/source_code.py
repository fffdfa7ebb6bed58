"""What the source code of a module's class says: nothing is run.

Which library it comes from (names tell a layout only where the code behind them is known), and whether it calls
attention functions.
"""

import functools
import inspect
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_SDPA = "scaled_dot_product_attention"
_LOOK_UP = "get_interface"
# How far to follow functions that functions call.
_DEPTH = 3
# Libraries whose functions are no part of a model.
_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "numpy", "lightning_qk", "torchmetrics")
_TRANSFORMERS_BASE = ("transformers.modeling_", "transformers.integrations", "transformers.utils")


def calls_sdpa(module: nn.Module) -> bool:
    """Whether the module's class calls torch.nn.functional.scaled_dot_product_attention itself.

    Its own methods count, and functions that they call by name, a few levels down; other modules do not.
    """
    kind: Any = type(module)  # mypy takes a module's class for unhashable
    return _class_calls_sdpa(kind)


def calls_softmax(module: nn.Module) -> bool:
    """Whether the module's class names a softmax in its own methods."""
    kind: Any = type(module)
    return any("softmax" in name.lower() for name in _class_names(kind))


def names_softmax(module: nn.Module) -> bool:
    """Whether the module's class names a softmax in its own methods, or in functions that they call by name."""
    kind: Any = type(module)
    if kind.__module__.split(".")[0] == "torch":
        return "softmax" in kind.__name__.lower()
    return _class_names_softmax(kind)


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's class looks its attention function up in transformers' AttentionInterface.

    Some name the interface's registry and get their own function out of it in other ways: they count as not.
    """
    kind: Any = type(module)
    return _LOOK_UP in _class_names(kind)


def own_classes(kind: type) -> Iterator[type]:
    """The class and its bases, as far as they are a model's own."""
    for base in kind.__mro__:
        name = base.__module__
        if base is not object and not _is_library(name):
            yield base


def functions_of(kind: type) -> list[types.FunctionType]:
    """Methods that a class defines and the functions that they call by name, a few levels down."""
    return list(_functions_of(kind))


@functools.lru_cache(maxsize=4096)
def _class_calls_sdpa(kind: type) -> bool:
    return any(_mentions(function) for base in own_classes(kind) for function in _functions_of(base))


@functools.lru_cache(maxsize=4096)
def _class_names_softmax(kind: type) -> bool:
    return any(
        "softmax" in name.lower()
        for base in own_classes(kind)
        for function in _functions_of(base)
        for name in names_in(function.__code__)
    )


@functools.lru_cache(maxsize=4096)
def _class_names(kind: type) -> frozenset[str]:
    """What the methods of a class and its own bases name."""
    methods = (function for base in own_classes(kind) for function in _methods(base))
    return frozenset(name for function in methods for name in names_in(function.__code__))


@functools.lru_cache(maxsize=4096)
def _functions_of(kind: type) -> tuple[types.FunctionType, ...]:
    found: dict[int, types.FunctionType] = {}
    level = list(_methods(kind))
    for _ in range(_DEPTH + 1):
        level = [function for function in level if id(function) not in found]
        found.update((id(function), function) for function in level)
        level = [called for function in level for called in _called(function)]
    return tuple(found.values())


def _methods(kind: type) -> Iterator[types.FunctionType]:
    for value in vars(kind).values():
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        value = inspect.unwrap(value) if callable(value) else value
        if isinstance(value, types.FunctionType):
            yield value


def _called(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """Functions that a function names: in its file, in its closure, or in a module that it names."""
    names = set(names_in(function.__code__))
    space = function.__globals__
    values = [space[name] for name in names if name in space]
    values += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    for value in list(values):
        if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
            values += [vars(value)[name] for name in names if name in vars(value)]
    for value in values:
        if isinstance(value, types.FunctionType) and not _is_library(value.__module__ or ""):
            yield inspect.unwrap(value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _mentions(function: types.FunctionType) -> bool:
    for name in names_in(function.__code__):
        if name == _SDPA or _is_sdpa(function.__globals__.get(name)):
            return True
    return any(_is_filled(cell) and _is_sdpa(cell.cell_contents) for cell in function.__closure__ or ())


def _is_sdpa(value: object) -> bool:
    return callable(value) and getattr(value, "__name__", None) == _SDPA


def names_in(code: types.CodeType) -> Iterator[str]:
    """Global names and attributes in a function's code and in that of the functions inside it, in their order."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def _is_library(name: str) -> bool:
    return name.split(".")[0] in _LIBRARIES or name.startswith(_TRANSFORMERS_BASE)


# Packages whose layers keep what the table of layouts says of their names.
_KNOWN = frozenset({"transformers", "torch", "timm"})
# What wraps an instance's forward without changing what it computes.
_WRAPS = frozenset({*_KNOWN, "accelerate", "lightning", "lightning_qk", "functools"})
# What a class may define without having a say in what its forward computes.
_HARMLESS = frozenset(
    {
        *("__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__dict__", "__weakref__"),
        *("__slots__", "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__"),
        *("__annotate_func__", "extra_repr", "reset_parameters", "_reset_parameters"),
    }
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
