"""Observe the softmax inside the forward of layers that compute attention themselves.

Such a layer multiplies queries by keys, changes the products in ways of its own (scale, bias, mask) and calls a
softmax. While the forward of a watched layer runs and somebody listens, a mode of torch sees each of its calls
of torch's functions, from Python, before they are carried out; it changes none of them. It follows the products
of two computed tensors through what keeps rows and keys apart, up to a softmax over the keys: this gets the
logits, so that the statistics are those of the model's own softmax. A router's or a pooling's softmax is over no
such product, and a product whose rows were cut up or put together anew is followed no further: what comes of
it is no whole row of attention any more.

Attention functions of the interface are observed in the same way where their arguments do not tell what they
compute.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils.weak import WeakIdKeyDictionary

from lightning_qk.capture import listeners
from lightning_qk.capture.call import is_recomputation
from lightning_qk.capture.callers import uses_interface
from lightning_qk.capture.multihead import read_functional
from lightning_qk.capture.record import AttentionCall, SoftmaxCall, UnsupportedCallError
from lightning_qk.functional._logits import MASKED_BELOW
from lightning_qk.heads.classes import is_named
from lightning_qk.heads.sizes import head_count

# Layers that cut the attention of the same heads into several softmaxes: streams of tokens, or global and local
# ones. Each row is a whole one, and all are pooled.
_SEVERAL = ("ProphetNetNgramSelfAttention", "PegasusXGlobalLocalAttention", "XLNetRelativeAttention")
# Layers whose rows are no attention of whole rows, though they look so.
_REFUSED = {
    "LSHSelfAttention": "it sorts tokens into buckets by hashing, and no row sees its keys in one softmax",
}

_SOFTMAX = {"softmax", "special_softmax"}
_FUNCTIONAL = "multi_head_attention_forward"
_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "baddbmm_", "einsum"}
# What gives each product a new value in its place. In-place forms have an underscore more.
_ELEMENTWISE = {
    *("add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "neg", "addcmul"),
    *(
        "masked_fill",
        "masked_scatter",
        "where",
        "clamp",
        "clip",
        "clamp_min",
        "clamp_max",
        "minimum",
        "maximum",
    ),
    *("tanh", "nan_to_num", "dropout", "clone", "contiguous", "detach", "to", "float", "double", "half"),
    *("bfloat16", "type", "type_as", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"),
    *("__truediv__", "__rtruediv__", "__neg__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "copy"),
    *("expand", "expand_as", "fill_diagonal", "alias", "requires_grad"),
}
# What keeps the elements in their order, whatever the axes become.
_REORDERING_FREE = {
    *("view", "reshape", "reshape_as", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
}
_MOVING = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "transpose_"}
_MAXIMA = {"max", "amax"}
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_JOINING = {"cat", "concat", "concatenate"}
# Masks of some models are no further down than this, which biases do not come near.
_SMALL_MASK = -50.0
# Below a row's largest logit by this much, a probability is as good as 0.
_NOTHING = 16.0


class _Trace(NamedTuple):
    """What is known of a tensor that came of products.

    Attributes:
        n: queries.
        m: keys.
        d_head: width of what was multiplied.
        relative: something was subtracted that depends on the products themselves.
        sinks: how many columns behind the keys are none.
        hidden: where a mask was added that is not far enough down to be told from the sum, of the tensor's shape.
    """

    n: int
    m: int
    d_head: int
    relative: bool = False
    sinks: int = 0
    hidden: Tensor | None = None

    @property
    def whole(self) -> tuple[int, int]:
        """The last two axes."""
        return self.n, self.m + self.sinks


class _Maximum(NamedTuple):
    """A tensor that was reduced from products."""


class _Frame:
    """A watched layer whose forward, or whose attention function, runs.

    Attributes:
        module: the layer.
        reason: why its function is observed; None for a forward.
        before: how many calls had been delivered when it began.
        print: shape and some elements of the last softmax's logits.
        untraced: what is said of the first softmax that is not over the keys of whole rows.
        waiting: what is delivered at the end, if nothing was until then, and the version of its logits.
        failed: it is not looked at any more.
    """

    def __init__(self, module: nn.Module, reason: str | None) -> None:
        self.module = module
        self.reason = reason
        self.before = listeners.delivered()
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
        reason: that of an attention function which is observed since its arguments do not tell what it computes;
            the layer's problem if nothing is seen in it. None for the layer's forward.

    Nothing is observed where an outer call was heard already, where nobody wants the layer, and in layers with
    parts that would notice: fused ones of torch, and compiled ones.
    """
    frames = _thread.frames
    if (
        not listeners.is_free()
        or is_recomputation()
        or not listeners.is_watched(module)
        or (reason is None and frames and frames[-1].module is module)
        or any(_would_notice(part) for part in module.modules())
    ):
        yield
        if reason is not None:
            _deliver_problem(module, reason)
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
    if listeners.delivered() > frame.before:
        return
    if frame.waiting is not None:
        _deliver_late(module, *frame.waiting)
    elif reason is not None:
        _deliver_problem(module, reason)
    elif frame.untraced is not None and not frame.waits:
        _deliver_problem(module, f"its forward takes a softmax {frame.untraced}: it has no statistics")


@contextmanager
def suspended() -> Iterator[None]:
    """Observe nothing in here, not even in vain: what torch compiles must not see a mode."""
    if _thread.frames and isinstance(_get_current_function_mode(), _Observer):
        with _pop_mode_temporarily():
            yield
    else:
        yield


def _would_notice(part: nn.Module) -> bool:
    return (
        isinstance(part, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerEncoder)
        or getattr(part, "_compiled_call_impl", None) is not None
        or hasattr(part, "_orig_mod")
    )


def _deliver_late(module: nn.Module, call: SoftmaxCall, version: int) -> None:
    def read() -> SoftmaxCall:
        if call.logits._version != version:
            raise UnsupportedCallError(
                "its forward overwrites the logits of its softmax, and may call an attention function: it has no "
                "statistics"
            )
        return call

    listeners.deliver(module, read)


def _deliver_problem(module: nn.Module, reason: str) -> None:
    def read() -> SoftmaxCall:
        raise UnsupportedCallError(reason)

    listeners.deliver(module, read)


class _Observer(TorchFunctionMode):
    """Sees each call of a torch function, and changes none."""

    def __init__(self) -> None:
        super().__init__()
        # Weakly, lest a measured step take more memory than another.
        self._traces = WeakIdKeyDictionary()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frames = _thread.frames
        if not frames or frames[-1].failed or not listeners.is_free():
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        trace = self._safely(frames[-1], self._look, frames[-1], name, args, kwargs)
        if name == _FUNCTIONAL:
            with listeners.silence():  # it may call scaled_dot_product_attention
                return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if trace is not None:
            self._safely(frames[-1], self._after, name, trace, args, kwargs, result)
        return result

    def _safely(self, frame: _Frame, look: Callable[..., Any], *args: Any) -> Any:
        """What goes wrong in looking on is the layer's problem, and none of the model's."""
        try:
            return look(*args)
        except Exception as error:
            frame.failed = True
            said = (
                f"its forward could not be observed ({type(error).__name__}: {error}): it has no statistics"
            )
            _deliver_problem(frame.module, said)
            return None

    def _look(self, frame: _Frame, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in _SOFTMAX:
            self._softmax(frame, args, kwargs)
            return None
        if name == "logsumexp":
            self._softmax(frame, args, kwargs)  # probabilities are exp(logits - logsumexp)
        if name == _FUNCTIONAL:
            _hear_functional(frame.module, args, kwargs)
            return None
        return self._before(name, args, kwargs)

    def _before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is known of the arguments; None where nothing needs to be followed."""
        if name in _PRODUCTS:
            return _product(name, args, kwargs)
        if name in _JOINING:
            return self._joined(args, kwargs)
        return self._first_trace(args, kwargs)

    def _known(self, value: Any) -> _Trace | _Maximum | None:
        return self._traces.get(value) if isinstance(value, Tensor) else None

    def _joined(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Trace | None:
        """Keys beside keys, and at most one column behind them that is no key."""
        tensors = list(args[0] if args else kwargs.get("tensors", ()))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        traces = [self._known(tensor) for tensor in tensors]
        sinks = 1 if len(tensors) > 1 and traces[-1] is None and tensors[-1].shape[-1] == 1 else 0
        parts = [one for one in (traces[:-1] if sinks else traces) if isinstance(one, _Trace)]
        if len(parts) + sinks != len(tensors) or not parts or dim not in (-1, tensors[0].dim() - 1):
            return None
        first = parts[0]
        for tensor, part in zip(tensors, parts, strict=False):
            if part.sinks or part.hidden is not None or tuple(tensor.shape[-2:]) != part.whole:
                return None
            if (part.n, part.d_head, part.relative) != (first.n, first.d_head, first.relative):
                return None
        return first._replace(m=sum(part.m for part in parts), sinks=sinks)

    def _first_trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._traces:
            return None
        known = [self._known(value) for value in (*args, *kwargs.values())]
        traces = [one for one in known if isinstance(one, _Trace)]
        if traces:
            trace = traces[0]
            return trace._replace(relative=True) if any(isinstance(one, _Maximum) for one in known) else trace
        return next((one for one in known if one is not None), None)

    def _after(
        self, name: str, trace: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        if isinstance(trace, _Maximum):
            if isinstance(result, Tensor) and (name in _ELEMENTWISE or name in _REORDERING_FREE):
                self._traces[result] = trace
            return
        if name in _PRODUCTS or name in _JOINING:
            if isinstance(result, Tensor) and tuple(result.shape[-2:]) == trace.whole:
                self._traces[result] = trace
            return
        given = (*args, *kwargs.values())
        source = next(value for value in given if isinstance(self._known(value), _Trace))
        if name in _MAXIMA and not (isinstance(result, Tensor) and result.shape == source.shape):
            self._traces[result if isinstance(result, Tensor) else result[0]] = _Maximum()
            return
        if not isinstance(result, Tensor):
            return
        kept = _kept(name, trace, source, args, kwargs, result)
        if kept is not None and name in _SUMS and len(given) > 1:
            kept = _masked(kept, given[1] if given[0] is source else given[0], result)
        if kept is not None:
            self._traces[result] = kept
        elif result is source:
            del self._traces[result]

    def _softmax(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        logits = args[0] if args else kwargs.get("input")
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            return
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        trace = self._known(logits)
        is_last = isinstance(dim, int) and dim in (-1, logits.dim() - 1)
        if isinstance(dim, tuple | list) and len(dim) == 1:
            is_last = dim[0] in (-1, logits.dim() - 1)
        if not isinstance(trace, _Trace) or not is_last or tuple(logits.shape[-2:]) != trace.whole:
            if frame.untraced is None and logits.dim() > 2 and (is_last or isinstance(trace, _Trace)):
                frame.untraced = _untraced(tuple(logits.shape), None if is_last else dim)
            return
        _hear(frame, logits, trace)


def _untraced(shape: tuple[int, ...], axis: Any) -> str:
    if axis is not None:
        return f"over axis {axis} of products of shape {shape}, which is not that of the keys"
    return (
        f"of a tensor of shape {shape} that does not hold whole rows of products of queries and keys (linear, "
        "sparse or chunked attention, or a pooling)"
    )


def _hear(frame: _Frame, logits: Tensor, trace: _Trace) -> None:
    logits = logits.detach()
    before = frame.print
    frame.print = tuple(logits.shape), _sample(logits)
    if before is not None and before[0] == frame.print[0] and torch.equal(before[1], frame.print[1]):
        return  # some layers take the softmax of one and the same logits twice
    with torch.no_grad():
        given = logits if trace.hidden is None else _far_down(logits, trace.hidden)
    call = SoftmaxCall(frame.module, given, trace.d_head, trace.relative, trace.sinks)
    if frame.waits:
        frame.waiting = call, given._version
        return

    def read() -> SoftmaxCall:
        for name, reason in _REFUSED.items():
            if is_named(frame.module, name):
                raise UnsupportedCallError(f"{reason}: it has no statistics")
        if before is not None and not any(is_named(frame.module, name) for name in _SEVERAL):
            raise UnsupportedCallError(
                f"its forward takes several softmaxes over products, of shapes {before[0]} and "
                f"{tuple(logits.shape)} among others, which are not one attention: it has no statistics"
            )
        return call

    listeners.deliver(frame.module, read)


def _sample(logits: Tensor) -> Tensor:
    """A few elements, to tell tensors apart."""
    with torch.no_grad():
        rows = logits.reshape(-1) if logits.is_contiguous() else logits[(0,) * (logits.dim() - 1)]
        return rows[:: max(1, rows.numel() // 64)].clone()


def _masked(trace: _Trace, added: Any, result: Tensor) -> _Trace:
    """After a sum: remember where a mask of two values hid keys, unless the sum itself tells."""
    if (
        not isinstance(added, Tensor)
        or not added.is_floating_point()
        or added.dim() < 2
        or added.requires_grad
    ):
        return trace
    with torch.no_grad():
        low = added.amin()
        hidden = added == low
        if not bool((low <= _SMALL_MASK) & (low > MASKED_BELOW) & (hidden | (added == 0)).all()):
            return trace
        hidden = hidden.expand(result.shape)
        if trace.hidden is not None:
            hidden = hidden | trace.hidden.expand(result.shape)
    return trace._replace(hidden=hidden)


def _far_down(logits: Tensor, hidden: Tensor) -> Tensor:
    """The logits with −inf where a small mask hides a key and its probability is as good as 0."""
    top = logits.masked_fill(hidden, -math.inf).amax(-1, keepdim=True)
    return logits.masked_fill(hidden & (logits < top - _NOTHING), -math.inf)


def _hear_functional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def read() -> AttentionCall:
        found = read_functional(*args, **kwargs)
        if isinstance(found, str):
            raise UnsupportedCallError(found)
        return AttentionCall(module, *found[0], "sdpa", found[1])

    listeners.deliver(module, read)


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Trace | None:
    """What a product of two computed tensors is, if it may be queries by keys."""
    if name == "einsum":
        return _einsum(args)
    if name.startswith("baddbmm"):
        given = [*args[1:3], kwargs.get("batch1"), kwargs.get("batch2")]
        operands = [one for one in given if isinstance(one, Tensor)]
    else:
        named = (kwargs.get(key) for key in ("input", "other", "mat2"))
        operands = [one for one in (*args[:2], *named) if isinstance(one, Tensor)]
    if len(operands) != 2 or not all(_is_computed(one) for one in operands):
        return None
    left, right = operands
    return _Trace(left.shape[-2], right.shape[-1], left.shape[-1])


def _is_computed(operand: Tensor) -> bool:
    return operand.dim() > 2 and not isinstance(operand, nn.Parameter) and operand.is_floating_point()


def _einsum(args: tuple[Any, ...]) -> _Trace | None:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(_is_computed(one) for one in operands):
        return None
    inputs, arrow, output = equation.replace(" ", "").replace("...", "").partition("->")
    left, right = inputs.split(",")
    if not arrow or len(output) < 2:
        return None
    row, key = output[-2], output[-1]
    if row in right:
        left, right, operands = right, left, operands[::-1]
    if row not in left or row in right or key not in right or key in left:
        return None
    sizes = dict(zip(reversed(left), reversed(operands[0].shape), strict=False))
    sizes.update(zip(reversed(right), reversed(operands[1].shape), strict=False))
    summed = [sizes[letter] for letter in sizes if letter not in output]
    return _Trace(sizes[row], sizes[key], math.prod(summed)) if summed else None


def _kept(
    name: str, trace: _Trace, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> _Trace | None:
    """What is still known after a function; None where rows and keys may have been mixed."""
    both_whole = tuple(source.shape[-2:]) == trace.whole and tuple(result.shape[-2:]) == trace.whole
    if name in _ELEMENTWISE or name.removesuffix("_") in _ELEMENTWISE or name in _MAXIMA:
        # Leading axes may be broadcast, queries and keys may not.
        if result.shape != source.shape and not both_whole:
            return None
        hidden = trace.hidden
        return trace if hidden is None else trace._replace(hidden=hidden.expand(result.shape))
    if name in _REORDERING_FREE:
        if result.numel() != source.numel():
            return None
        hidden = trace.hidden
        return trace if hidden is None else trace._replace(hidden=hidden.reshape(result.shape))
    if trace.hidden is not None:
        return None
    if name == "__getitem__" and both_whole:
        return trace
    if name in _MOVING and tuple(source.shape[-2:]) == trace.whole:
        return _moved(name, trace, source, args, kwargs)
    return None


def _moved(
    name: str, trace: _Trace, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Trace | None:
    """After axes were moved: rows and keys stand last, in this order or in the other."""
    axes = torch.empty(tuple(range(2, source.dim() + 2)), device="meta")
    with torch._C.DisableTorchFunction():
        moved = getattr(torch.Tensor, name)(axes, *args[1:], **kwargs)
    order = [size - 2 for size in moved.shape]
    last = source.dim() - 1
    if order[-2:] == [last - 1, last]:
        return trace
    if order[-2:] == [last, last - 1]:
        return None if trace.sinks else trace._replace(n=trace.m, m=trace.n)
    return None


def by_head(call: SoftmaxCall, heads: int | None) -> Tensor:
    """The logits as ``(batch, heads, n, m)``: axes before the heads, and windows and blocks, are the batch.

    Columns of sinks stay behind those of the keys.

    Args:
        call: one softmax.
        heads: how many heads the layer has; None where the weights do not say: the layer's attributes are asked.

    Raises:
        UnsupportedCallError: the axes cannot be told apart.
    """
    logits = call.logits
    if hasattr(logits, "to_local"):
        logits = logits.to_local()
    leading = tuple(logits.shape[:-2])
    n, m = logits.shape[-2:]
    if heads is None:
        heads = head_count(call.module)
    if heads is None and len(leading) == 2:
        return logits
    if heads is not None:
        if heads == 1 or (len(leading) == 1 and leading[0] % heads == 0):
            return logits.reshape(-1, heads, n, m)
        if len(leading) == 2 and leading[1] == heads:
            return logits
        # The batch comes first.
        places = [place for place, size in enumerate(leading) if place and size == heads]
        if len(leading) > 2 and len(places) == 1:
            return logits.movedim(places[0], -3).reshape(-1, heads, n, m)
        if len(leading) > 2 and not places and math.prod(leading[1:]) == heads:
            return logits.reshape(-1, heads, n, m)  # key heads, and the query heads of each
    known = "of unknown number" if heads is None else f"of which there are {heads}"
    raise UnsupportedCallError(
        f"its softmax gets logits of shape {tuple(logits.shape)}, whose heads, {known}, cannot be told from the "
        "batch: it has no statistics"
    )


def query_offset(logits: Tensor, self_attention: bool | None) -> int | None:
    """Place of the first query among the keys; None where queries have none.

    Args:
        logits: ``(batch, heads, n, m)``.
        self_attention: whether queries and keys are the same tokens; None where unknown.
    """
    n, m = logits.shape[2:]
    if self_attention is False:
        return None
    if n == m:
        return 0
    if not self_attention or n > m:
        return None
    # With a cache the queries are the newest tokens: each row sees one key more than the one before, its own.
    visible = ~(logits[:, 0] <= MASKED_BELOW)
    last = (visible * torch.arange(1, m + 1, device=logits.device)).amax(-1) - 1
    offset = last - torch.arange(n, device=logits.device)
    is_row = last >= 0
    if not bool(is_row.any()):
        return None
    first = offset[is_row][0]
    pairs = is_row[:, 1:] & is_row[:, :-1]
    more = (visible[:, 1:] ^ visible[:, :-1]).sum(-1)
    if bool(((offset != first) & is_row).any() | ((more != 1) & pairs).any()):
        return None
    return int(first)
