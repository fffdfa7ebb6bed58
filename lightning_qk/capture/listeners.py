"""Who listens now, and how a call reaches them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from lightning_qk.capture.call import is_recomputation
from lightning_qk.capture.captured import CapturedCall


class Listening(Protocol):
    """What an :class:`~lightning_qk.capture.interface.AttentionCapture` is to the places that hear calls."""

    enabled: bool
    operands: bool

    def wants(self, module: nn.Module) -> bool:
        """Whether a call of this module is handed on now."""

    def hear(self, module: nn.Module, read: Callable[[], CapturedCall], *, may_observe: bool = False) -> None:
        """Take one call."""

    def unreadable_reason(self, module: nn.Module) -> str | None:
        """Why the module's attention function has to be observed."""


class _State:
    """Read by every wrapper, and guarded by compiled graphs: two plain booleans.

    Attributes:
        listening: some installed capture is enabled. A compiled graph has one version for each value.
        direct: some installed capture stands at scaled_dot_product_attention itself.
        operands: some enabled capture wants the queries and keys of softmaxes that layers take themselves.
    """

    def __init__(self) -> None:
        self.listening = False
        self.direct = False
        self.operands = False


STATE = _State()
lock = threading.RLock()
_captures: tuple[Listening, ...] = ()
_direct = 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.silent = 0
        self.delivered = 0


_thread = _Thread()


def add(capture: Listening) -> None:
    """Let a capture hear calls."""
    global _captures
    with lock:
        if capture not in _captures:
            _captures = (*_captures, capture)
        refresh()


def discard(capture: Listening) -> None:
    """Let a capture hear no more."""
    global _captures
    with lock:
        _captures = tuple(other for other in _captures if other is not capture)
        refresh()


def refresh() -> None:
    """Find anew whether somebody listens."""
    with lock:
        enabled = [capture for capture in _captures if capture.enabled]
        STATE.listening = bool(enabled)
        STATE.operands = any(capture.operands for capture in enabled)


def count_direct(change: int) -> None:
    """One more or less stands at scaled_dot_product_attention."""
    global _direct
    with lock:
        _direct += change
        STATE.direct = _direct > 0


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants the calls of this module now."""
    return any(capture.wants(module) for capture in _captures)


# Never traced: inside a compiled model it is reached through an operator only.
@torch.compiler.disable
def deliver(module: nn.Module, read: Callable[[], CapturedCall], *, may_observe: bool = False) -> None:
    """Hand a call to all who want it, with autograd off; the recomputation of a checkpoint counts as none.

    Args:
        module: the attention layer.
        read: names the call's arguments; may raise, which the capture keeps as the layer's problem.
        may_observe: whoever delivers will observe the function's softmax where its arguments do not tell.
    """
    if is_recomputation():
        return
    _thread.delivered += 1
    wanted = [capture for capture in _captures if capture.wants(module)]
    # Silent: a listener may call an attention function to find out what it computes.
    with torch.no_grad(), silence():
        for capture in wanted:
            capture.hear(module, read, may_observe=may_observe)


def unreadable_reason(module: nn.Module) -> str | None:
    """Why the attention function of a watched module has to be observed; None where it need not be."""
    reasons = (capture.unreadable_reason(module) for capture in _captures if capture.wants(module))
    return next((reason for reason in reasons if reason is not None), None)


def delivered() -> int:
    """How many calls this thread has handed on: tells whether something inside a call was heard."""
    return _thread.delivered


@contextmanager
def silence() -> Iterator[None]:
    """Calls made in here are part of one that was heard already."""
    _thread.silent += 1
    try:
        yield
    finally:
        _thread.silent -= 1


def is_free() -> bool:
    """Whether a call computes with data, and is no part of one that was heard already.

    While a graph is made, what torch does not trace through is run on tensors without data.
    """
    return _thread.silent == 0 and not torch.compiler.is_compiling()
