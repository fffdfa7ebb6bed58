"""Who stands in front of attention functions and may change what they compute.

A front is outside of the listeners: what a monitor hears is the call as it is made in the end.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from lightning_qk.capture.call import read_call
from lightning_qk.capture.record import AttentionCall, UnsupportedCallError

Run = Callable[[AttentionCall], Any]
"""Makes a call and returns the attention function's output."""


class Front(Protocol):
    """What an :class:`~lightning_qk.capture.steering.AttentionSteering` is to the calls."""

    replaces: bool

    def wants(self, module: nn.Module) -> bool:
        """Whether calls of this module are to be steered."""

    def steer(self, call: AttentionCall, run: Run) -> Any:
        """Make the call, or another one."""

    def refuse(self, module: nn.Module, reason: str) -> None:
        """A call of this module cannot be read: raise, or leave it as it is."""


class _State:
    """Guarded by compiled graphs."""

    def __init__(self) -> None:
        self.steering = False


STATE = _State()
_lock = threading.RLock()
_fronts: tuple[Front, ...] = ()


def add(front: Front, modules: Mapping[nn.Module, str]) -> None:
    """Let a front steer calls. Those that replace the function come before those that look at it.

    Raises:
        ValueError: two would replace the attention function of one layer.
    """
    global _fronts
    with _lock:
        if front.replaces:
            taken = [
                name
                for module, name in modules.items()
                if any(other.replaces and other.wants(module) for other in _fronts)
            ]
            if taken:
                raise ValueError(
                    f"expected one remedy that replaces the attention function of a layer, got two for "
                    f"{', '.join(taken[:3])}{' ...' if len(taken) > 3 else ''}: give each its own modules="
                )
        _fronts = tuple(sorted((*_fronts, front), key=lambda one: not one.replaces))
        STATE.steering = True


def discard(front: Front) -> None:
    """Let a front steer no more."""
    global _fronts
    with _lock:
        _fronts = tuple(other for other in _fronts if other is not front)
        STATE.steering = bool(_fronts)


def in_front(function: Any, implementation: str | None, hear: Callable[[Any, str | None], Any]) -> Any:
    """The function with whoever steers before it.

    Args:
        function: an attention function, as the interface has it.
        implementation: its name.
        hear: puts a listener before a function.
    """
    if isinstance(function, functools.partial) and function.func is _steered:
        return function  # one look-up uses the other
    return functools.partial(_steered, function, implementation, hear)


def behind(function: Any) -> Any:
    """The function that :func:`in_front` was given; any other as it is."""
    is_ours = isinstance(function, functools.partial) and function.func is _steered
    return function.args[0] if is_ours else function


# A graph of torch.compile is interrupted here: what steers may call anything.
@torch.compiler.disable
def _steered(
    function: Callable[..., Any],
    implementation: str | None,
    hear: Callable[[Any, str | None], Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    module = args[0] if args else kwargs.get("module")
    wanted = [front for front in _fronts if isinstance(module, nn.Module) and front.wants(module)]
    if not wanted:
        return hear(function, implementation)(*args, **kwargs)
    assert isinstance(module, nn.Module)  # else nobody wants it
    try:
        call = read_call(function, implementation or "eager", args, kwargs)
    except UnsupportedCallError as error:
        for front in wanted:
            front.refuse(module, str(error))
        return hear(function, implementation)(*args, **kwargs)

    def run(call: AttentionCall) -> Any:
        heard = hear(call.function, call.implementation)
        return heard(call.module, call.query, call.key, call.value, call.attention_mask, **call.options)

    for front in reversed(wanted):
        run = functools.partial(front.steer, run=run)
    return run(call)
