"""Installed captures and interceptors of attention calls, and how a call reaches them.

Interceptors come first: what a capture gets is the call as it is made in the end.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError, is_recomputation, read_call
from lightning_qk.capture.captured import CapturedCall

aside: Callable[[], AbstractContextManager[Any]] = nullcontext
"""Within it nothing of ours looks at calls of torch's functions, even in vain; the module that looks sets it."""

Run = Callable[[AttentionCall], Any]
"""Makes a call and returns the attention function's output."""


class _Capture(Protocol):
    """An :class:`~lightning_qk.capture.AttentionCapture`."""

    enabled: bool
    eager: bool
    operands: bool

    def wants(self, module: nn.Module) -> bool: ...

    def receive(
        self, module: nn.Module, read: Callable[[], CapturedCall], *, may_observe: bool = False
    ) -> None: ...

    def unreadable_reason(self, module: nn.Module) -> str | None: ...


class _Interceptor(Protocol):
    """An :class:`~lightning_qk.capture.AttentionInterceptor`."""

    replaces: bool

    def wants(self, module: nn.Module) -> bool: ...

    def intercept(self, call: AttentionCall, run: Run) -> Any: ...

    def refuse(self, module: nn.Module, reason: str) -> None: ...


class _State:
    """Read by every hook, and all but ``capturing`` guarded by compiled graphs.

    Attributes:
        capturing: some installed capture is enabled.
        traced: some installed capture reads graphs, enabled or not.
        sdpa: some installed capture has patched scaled_dot_product_attention itself.
        operands: some enabled capture wants the queries and keys of softmaxes that layers compute themselves.
        intercepting: some interceptor is installed.
    """

    def __init__(self) -> None:
        self.capturing = False
        self.traced = False
        self.sdpa = False
        self.operands = False
        self.intercepting = False


STATE = _State()
lock = threading.RLock()
_captures: tuple[_Capture, ...] = ()
_interceptors: tuple[_Interceptor, ...] = ()
_sdpa = 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.muted = 0
        self.delivered = 0


_thread = _Thread()


def add(capture: _Capture) -> None:
    """Deliver calls to a capture."""
    global _captures
    with lock:
        if capture not in _captures:
            _captures = (*_captures, capture)
        refresh()


def discard(capture: _Capture) -> None:
    """Undo :func:`add`."""
    global _captures
    with lock:
        _captures = tuple(other for other in _captures if other is not capture)
        refresh()


def refresh() -> None:
    """Update the state after a capture was enabled or disabled."""
    with lock:
        enabled = [capture for capture in _captures if capture.enabled]
        STATE.capturing = bool(enabled)
        STATE.traced = not all(capture.eager for capture in _captures)
        STATE.operands = any(capture.operands for capture in enabled)


def count_sdpa(change: int) -> None:
    """Count the captures that have patched scaled_dot_product_attention."""
    global _sdpa
    with lock:
        _sdpa += change
        STATE.sdpa = _sdpa > 0


def is_watched(module: nn.Module) -> bool:
    """Whether a capture wants the calls of this module now."""
    return any(capture.wants(module) for capture in _captures)


# Never traced: inside a compiled model it is reached through an operator only.
@torch.compiler.disable
def deliver(module: nn.Module, read: Callable[[], CapturedCall], *, may_observe: bool = False) -> None:
    """Hand a call to all captures that want it, with autograd off; not in the recomputation of a checkpoint.

    Args:
        module: the attention layer.
        read: makes the call, or raises why it cannot be read, which the capture keeps as the layer's problem.
        may_observe: the function's softmax will be observed where its arguments do not determine what it computes.
    """
    if is_recomputation():
        return
    _thread.delivered += 1
    wanted = [capture for capture in _captures if capture.wants(module)]
    # Muted: a capture may call an attention function to find out what it computes.
    with torch.no_grad(), mute(), aside():
        for capture in wanted:
            capture.receive(module, read, may_observe=may_observe)


def deliver_problem(module: nn.Module, reason: str) -> None:
    """Let captures know why a call of this module cannot be read."""

    def read() -> CapturedCall:
        raise UnsupportedCallError(reason)

    deliver(module, read)


def unreadable_reason(module: nn.Module) -> str | None:
    """Why the attention function of a watched module has to be observed; None where it need not be."""
    reasons = (capture.unreadable_reason(module) for capture in _captures if capture.wants(module))
    return next((reason for reason in reasons if reason is not None), None)


def delivered() -> int:
    """How many calls this thread has delivered: shows whether something inside a call was captured."""
    return _thread.delivered


@contextmanager
def mute() -> Iterator[None]:
    """Capture nothing in here: the calls are part of one that was captured already."""
    _thread.muted += 1
    try:
        yield
    finally:
        _thread.muted -= 1


def is_free() -> bool:
    """Whether a call computes with data and is no part of one that was captured already.

    While a graph is made, what torch does not trace through is run on tensors without data.
    """
    return _thread.muted == 0 and not torch.compiler.is_compiling()


def add_interceptor(interceptor: _Interceptor, modules: Mapping[nn.Module, str]) -> None:
    """Install an interceptor; those that replace the function come before those that look at it.

    Raises:
        ValueError: two would replace the attention function of one layer.
    """
    global _interceptors
    with lock:
        if interceptor.replaces:
            taken = [
                name
                for module, name in modules.items()
                if any(other.replaces and other.wants(module) for other in _interceptors)
            ]
            if taken:
                raise ValueError(
                    f"expected one remedy that replaces the attention function of a layer, got two for "
                    f"{', '.join(taken[:3])}{' ...' if len(taken) > 3 else ''}: give each its own modules="
                )
        _interceptors = tuple(sorted((*_interceptors, interceptor), key=lambda one: not one.replaces))
        STATE.intercepting = True


def discard_interceptor(interceptor: _Interceptor) -> None:
    """Undo :func:`add_interceptor`."""
    global _interceptors
    with lock:
        _interceptors = tuple(other for other in _interceptors if other is not interceptor)
        STATE.intercepting = bool(_interceptors)


def intercepted(function: Any, implementation: str | None, tap: Callable[[Any, str | None], Any]) -> Any:
    """An attention function with the interceptors before it.

    Args:
        function: as the interface has it.
        implementation: its name.
        tap: puts the captures before a function.
    """
    if isinstance(function, functools.partial) and function.func is _intercept:
        return function  # one look-up uses the other
    return functools.partial(_intercept, function, implementation, tap)


def without_interceptors(function: Any) -> Any:
    """The function that :func:`intercepted` was given; any other as it is."""
    is_ours = isinstance(function, functools.partial) and function.func is _intercept
    return function.args[0] if is_ours else function


# A graph of torch.compile is interrupted here: an interceptor may call anything.
@torch.compiler.disable
def _intercept(
    function: Callable[..., Any],
    implementation: str | None,
    tap: Callable[[Any, str | None], Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    module = args[0] if args else kwargs.get("module")
    if not isinstance(module, nn.Module):
        return tap(function, implementation)(*args, **kwargs)
    wanted = [interceptor for interceptor in _interceptors if interceptor.wants(module)]
    if not wanted:
        return tap(function, implementation)(*args, **kwargs)
    try:
        call = read_call(function, implementation or "eager", args, kwargs)
    except UnsupportedCallError as error:
        for interceptor in wanted:
            interceptor.refuse(module, str(error))
        return tap(function, implementation)(*args, **kwargs)

    def run(call: AttentionCall) -> Any:
        tapped = tap(call.function, call.implementation)
        return tapped(call.module, call.query, call.key, call.value, call.attention_mask, **call.options)

    for interceptor in reversed(wanted):
        run = functools.partial(interceptor.intercept, run=run)
    return run(call)
