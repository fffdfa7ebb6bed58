"""Observe the softmax inside the forward of layers that compute attention themselves.

Such a layer multiplies queries by keys, changes the products in ways of its own (scale, bias, mask) and calls a
softmax. While the forward of a watched layer runs during a capture, a mode of torch sees each of its calls
of torch's functions, from Python, before they are carried out; it changes none of them. It follows the products
of two computed tensors through what keeps rows and keys apart, up to a softmax over the keys: this gets the
logits, so that the statistics are those of the model's own softmax. A router's or a pooling's softmax is over no
such product, and a product whose rows were cut up or recombined is followed no further: the result
holds no whole rows of attention.

Attention functions of the interface are observed in the same way where their arguments do not determine what they
compute.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from lightning_qk.architecture.source_code import is_named, uses_interface
from lightning_qk.capture import registry
from lightning_qk.capture.call import UnsupportedCallError, is_recomputation
from lightning_qk.capture.captured import CapturedCall, SoftmaxCall, sdpa_call
from lightning_qk.capture.hooks.modules import would_notice
from lightning_qk.capture.hooks.multihead import read_functional
from lightning_qk.capture.hooks.traces import Trace, Traces, far_down

# Layers that cut the attention of the same heads into several softmaxes: streams of tokens, or global and local
# ones. Each row is a whole one, and all are pooled.
SEVERAL = ("ProphetNetNgramSelfAttention", "PegasusXGlobalLocalAttention", "XLNetRelativeAttention")


def takes_several(call: CapturedCall) -> bool:
    """Whether a call is one of several softmaxes of the same heads."""
    return call.implementation == SoftmaxCall.implementation and any(
        is_named(call.module, name) for name in SEVERAL
    )


# Layers whose rows are no attention of whole rows, though they look so.
_REFUSED = {
    "LSHSelfAttention": "it sorts tokens into buckets by hashing, and no row sees its keys in one softmax",
}

_SOFTMAX = {"softmax", "special_softmax"}
_FUNCTIONAL = "multi_head_attention_forward"


class _Frame:
    """A watched layer whose forward, or whose attention function, runs.

    Attributes:
        module: the layer.
        reason: why its function is observed; None for a forward.
        before: how many calls had been delivered when it began.
        print: shape and some elements of the last softmax's logits.
        untraced: description of the first softmax that is not over the keys of whole rows.
        waiting: what is delivered at the end, if nothing was until then, and the version of its logits.
        failed: it is not looked at any more.
    """

    def __init__(self, module: nn.Module, reason: str | None) -> None:
        self.module = module
        self.reason = reason
        self.before = registry.delivered()
        self.print: tuple[Any, ...] | None = None
        self.untraced: str | None = None
        self.waiting: tuple[SoftmaxCall, int] | None = None
        # A layer that calls the interface as well may take a softmax for another purpose.
        self.waits = reason is None and uses_interface(module)
        self.failed = False


class _Thread(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_thread = _Thread()


@contextmanager
def observed(module: nn.Module, reason: str | None = None) -> Iterator[None]:
    """Deliver the softmax calls of attention made in here, as those of this layer.

    Args:
        module: the layer.
        reason: why an attention function is observed: its arguments do not determine what it computes. It is the
            layer's problem if nothing is seen in it. None for the layer's forward.

    Nothing is observed where an outer call was captured already, where no capture wants the layer, and in layers
    with parts that would notice: fused ones of torch, and compiled ones.
    """
    frames = _thread.frames
    if (
        not registry.is_free()
        or is_recomputation()
        or not registry.is_watched(module)
        or (reason is None and frames and frames[-1].module is module)
        or any(would_notice(part) for part in module.modules())
    ):
        yield
        if reason is not None:
            registry.deliver_problem(module, reason)
        return
    frame = _Frame(module, reason)
    frames.append(frame)
    try:
        if len(frames) == 1:
            with _Observer():
                yield
        else:
            yield
    finally:
        frames.pop()
    if registry.delivered() > frame.before:
        return
    if frame.waiting is not None:
        _deliver_late(module, *frame.waiting)
    elif reason is not None:
        registry.deliver_problem(module, reason)
    elif frame.untraced is not None and not frame.waits:
        registry.deliver_problem(
            module, f"its forward takes a softmax {frame.untraced}: it has no statistics"
        )


@contextmanager
def suspended() -> Iterator[None]:
    """Observe nothing in here, not even in vain: what torch compiles must not see a mode."""
    if _thread.frames and isinstance(_get_current_function_mode(), _Observer):
        with _pop_mode_temporarily():
            yield
    else:
        yield


registry.aside = suspended


def _deliver_late(module: nn.Module, call: SoftmaxCall, version: int) -> None:
    def read() -> SoftmaxCall:
        if call.tensor._version != version:
            raise UnsupportedCallError(
                "its forward overwrites the logits of its softmax, and may call an attention function: it has no "
                "statistics"
            )
        return call

    registry.deliver(module, read)


class _Observer(TorchFunctionMode):
    """Sees each call of a torch function, and changes none."""

    def __init__(self) -> None:
        super().__init__()
        self._traces = Traces()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frames = _thread.frames
        if not frames or frames[-1].failed or not registry.is_free():
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        trace = self._safely(frames[-1], self._look, frames[-1], name, args, kwargs)
        if name == _FUNCTIONAL:
            with registry.mute():  # it may call scaled_dot_product_attention
                return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if trace is not None:
            self._safely(frames[-1], self._traces.after, name, trace, args, kwargs, result)
        return result

    def _safely(self, frame: _Frame, look: Callable[..., Any], *args: Any) -> Any:
        """An error in observing is the layer's problem, and not raised in the model."""
        try:
            return look(*args)
        except Exception as error:
            frame.failed = True
            reason = (
                f"its forward could not be observed ({type(error).__name__}: {error}): it has no statistics"
            )
            registry.deliver_problem(frame.module, reason)
            return None

    def _look(self, frame: _Frame, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in _SOFTMAX:
            self._softmax(frame, args, kwargs)
            return None
        if name == "logsumexp":
            self._softmax(frame, args, kwargs)  # probabilities are exp(logits - logsumexp)
        if name == _FUNCTIONAL:
            registry.deliver(frame.module, lambda: sdpa_call(frame.module, read_functional(*args, **kwargs)))
            return None
        return self._traces.before(name, args, kwargs)

    def _softmax(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        logits = args[0] if args else kwargs.get("input")
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            return
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        trace = self._traces.known(logits)
        is_last = isinstance(dim, int) and dim in (-1, logits.dim() - 1)
        if isinstance(dim, tuple | list) and len(dim) == 1:
            is_last = dim[0] in (-1, logits.dim() - 1)
        if not isinstance(trace, Trace) or not is_last or tuple(logits.shape[-2:]) != trace.whole:
            if frame.untraced is None and logits.dim() > 2 and (is_last or isinstance(trace, Trace)):
                frame.untraced = _untraced(tuple(logits.shape), None if is_last else dim)
            return
        _deliver(frame, logits, trace)


def _untraced(shape: tuple[int, ...], axis: Any) -> str:
    if axis is not None:
        return f"over axis {axis} of products of shape {shape}, which is not that of the keys"
    return (
        f"of a tensor of shape {shape} that does not hold whole rows of products of queries and keys (linear, "
        "sparse or chunked attention, or a pooling)"
    )


def _deliver(frame: _Frame, logits: Tensor, trace: Trace) -> None:
    logits = logits.detach()
    before = frame.print
    frame.print = tuple(logits.shape), _sample(logits)
    if before is not None and before[0] == frame.print[0] and torch.equal(before[1], frame.print[1]):
        return  # some layers take the softmax of one and the same logits twice
    with torch.no_grad():
        given = logits if trace.hidden is None else far_down(logits, trace.hidden)
    call = SoftmaxCall(
        frame.module, given, trace.d_head, trace.relative, trace.sinks, operands=trace.operands
    )
    if frame.waits:
        frame.waiting = call, given._version
        return

    def read() -> SoftmaxCall:
        for name, reason in _REFUSED.items():
            if is_named(frame.module, name):
                raise UnsupportedCallError(f"{reason}: it has no statistics")
        if before is not None and not any(is_named(frame.module, name) for name in SEVERAL):
            raise UnsupportedCallError(
                f"its forward takes several softmaxes over products, of shapes {before[0]} and "
                f"{tuple(logits.shape)} among others, which are not one attention: it has no statistics"
            )
        return call

    registry.deliver(frame.module, read)


def _sample(logits: Tensor) -> Tensor:
    """A few elements, by which tensors are compared."""
    with torch.no_grad():
        rows = logits.reshape(-1) if logits.is_contiguous() else logits[(0,) * (logits.dim() - 1)]
        return rows[:: max(1, rows.numel() // 64)].clone()
