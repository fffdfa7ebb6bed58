"""Hooks and wrappers on modules that copies of the modules do not take along.

A deep copy made during a capture, such as an average of the weights, gets what is attached to its original. Hooks
are copied as ones that do nothing and go away at the copy's first forward, or when the originals do. In a pickle,
a function of the standard library that does nothing takes their place, so that it loads without this package.
"""

import contextlib
import copy
import functools
import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

_BOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")

_copies: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Hook:
    """A forward hook of one module, that stays behind when the module is copied.

    Args:
        function: what it does; None for nothing, of a copy.
        module: the module with the hook.
    """

    def __init__(self, function: Callable[..., Any] | None, module: nn.Module | None) -> None:
        self.function = function
        self._module = None if module is None else weakref.ref(module)

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Call the function; of a copy: go away."""
        if self.function is not None:
            # Around a compiled module, and not in its graph, a hook would become a graph of its own.
            is_in_it = torch.compiler.is_dynamo_compiling()
            return self.function(module, *args) if is_in_it else _outside(self.function, module, *args)
        if not torch.compiler.is_compiling():
            _take_off(module)
        return None

    def __deepcopy__(self, memo: Mapping[int, Any]) -> "Hook":
        own = None if self._module is None else self._module()
        # The copy of a module is made before what hangs on it is copied.
        other = memo.get(id(own))
        if not isinstance(other, nn.Module):
            return Hook(None, None)
        _copies.add(other)
        return Hook(None, other)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


@torch.compiler.disable
def _outside(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def untraced(function: Callable[..., Any]) -> None:
    """Have no graph begin with a function, though graphs that call it may contain it."""
    with contextlib.suppress(ImportError):  # of other versions of torch
        from torch._dynamo.eval_frame import skip_code

        skip_code(function.__code__)


untraced(Hook.__call__)


class Handle:
    """Takes a hook away, and off the copies of its module.

    Args:
        handle: torch's own.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def remove(self) -> None:
        """Take it away; a second call does nothing."""
        self._handle.remove()
        for module in list(_copies):
            _take_off(module)
        _copies.clear()


def hook_after(module: nn.Module, function: Callable[..., Any]) -> Handle:
    """Call ``function(module, args, output)`` after each forward of a module."""
    return Handle(module.register_forward_hook(Hook(function, module)))


def hook_before(module: nn.Module, function: Callable[..., Any]) -> Handle:
    """Call ``function(module, args, kwargs)`` before each forward of a module."""
    return Handle(module.register_forward_pre_hook(Hook(function, module), with_kwargs=True))


def would_notice(part: nn.Module) -> bool:
    """Whether a part of torch takes another way through its forward where it is observed, or was compiled."""
    return (
        isinstance(part, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerEncoder)
        or getattr(part, "_compiled_call_impl", None) is not None
        or hasattr(part, "_orig_mod")
    )


def _take_off(module: nn.Module) -> None:
    """Take hooks off that a copy took along."""
    for book in _BOOKS:
        hooks = getattr(module, book, {})
        for key, hook in list(hooks.items()):
            if isinstance(hook, Hook) and hook.function is None:
                del hooks[key]
                for name in _FLAGS:
                    if name.startswith(book):
                        getattr(module, name, {}).pop(key, None)


class Wrapped:
    """A wrapper in an attribute of a module; copies and pickles of the module have the original in its place.

    Args:
        wrapper: what is called.
        original: what was there before.
    """

    def __init__(self, wrapper: Callable[..., Any], original: Any) -> None:
        functools.update_wrapper(self, wrapper)
        self._wrapper = wrapper
        self._stood_there = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapper."""
        return self._wrapper(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._stood_there, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return operator.getitem, ((self._stood_there,), 0)
