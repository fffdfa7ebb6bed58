"""Taps the look-up of attention functions in transformers' ``AttentionInterface``.

Models look their function up at every call, by the name in their config. The tap is put before what they get; the
model keeps its implementation's name and its own function's result.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_qk.capture import registry
from lightning_qk.capture.call import read_call
from lightning_qk.capture.captured import FunctionCall
from lightning_qk.capture.hooks import compiled
from lightning_qk.capture.hooks.patch import Patch, patch
from lightning_qk.capture.hooks.softmax import observed, suspended
from lightning_qk.capture.registry import STATE


def patch_interface() -> Callable[[], None]:
    """Patch the look-up of attention functions in transformers' models; returns what undoes it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # there is no model of theirs
        return lambda: None
    interface = modeling.AttentionInterface
    undo = [patch(interface, name, _tap_look_up) for name in ("get_interface", "__getitem__")]

    def give_back() -> None:
        for one in reversed(undo):
            one()

    return give_back


def _tap_look_up(look_up: Callable[..., Any], own: Patch) -> Callable[..., Any]:
    """A look-up that gives functions with interceptors and captures before them."""

    @functools.wraps(look_up)
    def tapped_look_up(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        function = look_up(self, attn_implementation, *args, **kwargs)
        if not own.active:
            return function
        if STATE.intercepting:
            return registry.intercepted(function, attn_implementation, _tap)
        return _tap(function, attn_implementation)

    return tapped_look_up


_taps: dict[tuple[Any, str], Callable[..., Any]] = {}


def _tap(function: Any, implementation: str | None) -> Any:
    """The function, tapped while a capture is enabled; one object for one function."""
    name = implementation or "eager"  # transformers takes None for the model's own function
    if torch.compiler.is_dynamo_compiling():
        if not compiled.is_read(STATE):
            return function
        if isinstance(function, functools.partial) and function.func is _traced:
            return function  # one look-up uses the other
        return functools.partial(_traced, function, name)
    if not STATE.capturing or not callable(function) or getattr(function, "_lightning_qk_tap", False):
        return function
    known = _taps.get((function, name))
    if known is not None:
        return known

    @functools.wraps(function)
    def tap(*args: Any, **kwargs: Any) -> Any:
        if STATE.capturing and registry.is_free():
            module, reason = _deliver(function, name, args, kwargs)
            if module is not None and reason is not None:
                with observed(module, reason):
                    return function(*args, **kwargs)
            with registry.mute(), suspended():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    tap._lightning_qk_tap = True  # type: ignore[attr-defined]
    _taps[(function, name)] = tap
    return tap


def _traced(function: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """A call in a graph of torch.compile."""
    _emit(_number(function, name), _parameters(function), args, kwargs)
    if not STATE.sdpa:
        return function(*args, **kwargs)
    compiled.enter(None)
    output = function(*args, **kwargs)
    compiled.leave()
    return output


@torch.compiler.assume_constant_result
def _number(function: Callable[..., Any], name: str) -> int:
    return compiled.source_number(function, name)


@torch.compiler.assume_constant_result
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _emit(source: int, parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Traced by torch.compile."""
    module = args[0] if args else kwargs.get("module")
    if not isinstance(module, nn.Module):
        return
    identity = compiled.identity(module)
    if identity is None:
        return
    named = dict(zip(parameters[5:], args[5:], strict=False))
    named.update((name, value) for name, value in kwargs.items() if name != "module")
    compiled.emit(identity, source, args[1:5], named)


@torch.compiler.disable
def _deliver(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[nn.Module | None, str | None]:
    """Deliver a call; returns the module, and why its function's softmax has to be observed."""
    module = args[0] if args else kwargs.get("module")
    if not isinstance(module, nn.Module) or not registry.is_watched(module):
        return None, None
    registry.deliver(module, lambda: FunctionCall(read_call(function, name, args, kwargs)), may_observe=True)
    return module, registry.unreadable_reason(module)
