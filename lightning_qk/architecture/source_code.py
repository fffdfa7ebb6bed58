"""Which classes call attention functions, by a look at their code: nothing is run."""

import functools
import inspect
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
