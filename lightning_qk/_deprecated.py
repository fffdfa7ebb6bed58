"""Old spellings of arguments and attributes: accepted for this version, with a DeprecationWarning."""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from typing_extensions import NotRequired

_F = TypeVar("_F", bound=Callable[..., Any])


def old_spellings(positional: Sequence[str] = (), /, **renamed: str) -> Callable[[_F], _F]:
    """Decorator of functions and ``__init__`` whose arguments have other names or another order than before.

    jsonargparse takes arguments from signatures: that of an ``__init__`` gets the old names too, without defaults,
    so that a LightningCLI reads configs of before and writes none of the old names into new ones.

    Args:
        positional: for arguments that can only be passed by name now, the order in which they were passed before.
        renamed: old name → new name.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        parameters = signature.parameters
        is_init = function.__name__ == "__init__"

        @functools.wraps(function)
        def accept(*args: Any, **kwargs: Any) -> Any:
            title = function.__qualname__.removesuffix(".__init__")
            own, given = args[:is_init], args[is_init:]
            if positional and given:
                if len(given) > len(positional):
                    raise TypeError(
                        f"expected at most {len(positional)} positional arguments of {title}, got {len(given)}: "
                        "pass them by name"
                    )
                in_order = dict(zip(positional, given, strict=False))
                if twice := in_order.keys() & kwargs.keys():
                    raise TypeError(f"expected {min(twice)} of {title} once, got it twice: pass it by name")
                _warn(f"{title} takes {', '.join(in_order)} by name now")
                kwargs, given = {**in_order, **kwargs}, ()
            for old, new in renamed.items():
                if old not in kwargs:
                    continue
                # A LightningCLI passes the default of the new name too.
                default = parameters[new].default
                if kwargs.get(new, default) is not default and kwargs[new] != default:
                    raise TypeError(
                        f"expected {new} of {title} once, got {old} too: drop {old}, its old name"
                    )
                _warn(f"{old} of {title} is {new} now")
                kwargs[new] = kwargs.pop(old)
            return function(*own, *given, **kwargs)

        if is_init and renamed:
            old_ones = [
                inspect.Parameter(
                    old, inspect.Parameter.KEYWORD_ONLY, annotation=NotRequired[parameters[new].annotation]
                )
                for old, new in renamed.items()
            ]
            accept.__signature__ = signature.replace(  # type: ignore[attr-defined]
                parameters=[*parameters.values(), *old_ones]
            )
        return accept  # type: ignore[return-value]

    return decorate


def _warn(sentence: str) -> None:
    warnings.warn(
        f"{sentence}: the old spelling goes with the next version", DeprecationWarning, stacklevel=3
    )


class OldName:
    """An attribute under its old name.

    Args:
        new: name of the attribute now.
    """

    def __init__(self, new: str) -> None:
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        _warn(f"{type(instance).__name__}.{self._old} is {self._new} now")
        return getattr(instance, self._new)
