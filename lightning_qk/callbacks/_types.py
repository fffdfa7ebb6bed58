"""Whether arguments are of the types that a class says; a wrong one is told where it is given, not at a step."""

import functools
import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, Union

import typing_extensions
from torch import Tensor

from lightning_qk.functional.checks import KindError, integer

_UNIONS = (Union, types.UnionType)
_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
}


def check_types(kind: type, given: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raises unless the arguments of a class fit its annotations, as far as these are simple.

    Args:
        kind: the class.
        given: positional arguments.
        named: the others. Unknown names are left to the call, which tells of them.

    Raises:
        KindError: one does not.
    """
    annotations = annotations_of(kind)
    own = inspect.signature(inspect.unwrap(kind.__init__)).parameters.values()  # type: ignore[misc]
    # Of one that takes its arguments by name alone, those of before in their old order are not known here.
    places = [one.name for one in own if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
    for name, value in {**dict(zip(places, given, strict=False)), **named}.items():
        annotation = annotations.get(name, Any)
        if not fits(value, annotation):
            raise KindError(
                f"expected {name} of {kind.__name__} to be {described(annotation)}, got {reprlib.repr(value)}: "
                "pass one"
            )


@functools.cache
def annotations_of(kind: type) -> dict[str, Any]:
    """Argument → annotation; behind a class's own, those of the bases that it passes ``**options`` to."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        init = inspect.unwrap(vars(base)["__init__"])
        try:
            hints = typing_extensions.get_type_hints(init)
        except Exception:  # names that are there for type checkers alone
            hints = {}
        _, *parameters = inspect.signature(init).parameters.values()
        for one in parameters:
            if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                found.setdefault(one.name, hints.get(one.name, Any))
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return found


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type; True for functions and other types of which a class itself knows more."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in _UNIONS:
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) for one in inner)  # a class names its choices itself
    if annotation is Any:
        return True
    if annotation in (None, types.NoneType):
        return value is None
    if annotation in _SIMPLE:
        return _SIMPLE[annotation](value)
    kind = origin or annotation
    if kind is Callable or not isinstance(kind, type) or typing_extensions.is_protocol(kind):
        return True
    if issubclass(kind, Collection) and not issubclass(kind, Mapping) and kind is not str:
        return _is_row(value) and (
            not inner or not isinstance(value, Collection) or all(fits(one, inner[0]) for one in value)
        )
    return isinstance(value, kind)


def described(annotation: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in _UNIONS:
        *first, last = dict.fromkeys(map(described, inner))
        return f"{', '.join(first)} or {last}" if first else last
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if annotation in _NAMES:
        return _NAMES[annotation]
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, Collection) and inner and inner[0] in _NAMES:
        return f"a list of {_NAMES[inner[0]].partition(' ')[2]}s"
    return f"a {getattr(kind, '__name__', kind)}"


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer()  # 1e3
    try:
        integer(value, "it")
    except KindError:
        return False
    return True


def _is_number(value: Any) -> bool:
    is_scalar = isinstance(value, Tensor) and not value.dim()
    return is_scalar or (isinstance(value, Real) and not isinstance(value, bool))


def _is_flag(value: Any) -> bool:
    return (
        isinstance(value, bool) or (_is_whole(value) and value in (0, 1)) or type(value).__name__ == "bool_"
    )


def _is_row(value: Any) -> bool:
    if isinstance(value, Tensor) and not value.dim():
        return False
    return hasattr(value, "__iter__") and not isinstance(value, str | bytes | Mapping)


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    int: _is_whole,
    float: _is_number,
    bool: _is_flag,
    str: lambda value: isinstance(value, str),
}
