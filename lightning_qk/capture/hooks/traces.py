"""Follow products of queries and keys through what a layer does to them before its softmax.

By the names of torch's functions: elementwise ones keep rows and keys apart, and so do those that move or merge
the axes before them. Any other function ends the trace.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_qk.capture.registry import STATE
from lightning_qk.functional.chunks import MASKED_BELOW

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


class Trace(NamedTuple):
    """What is known of a tensor that came of products.

    Attributes:
        n: queries.
        m: keys.
        d_head: width of what was multiplied.
        relative: something was subtracted that depends on the products themselves.
        sinks: how many columns behind the keys are none.
        hidden: where a mask was added that is too small to show in the sum; of the tensor's shape.
        operands: queries ``(..., n, d)`` and keys ``(..., m, d)``, where a capture wants them.
    """

    n: int
    m: int
    d_head: int
    relative: bool = False
    sinks: int = 0
    hidden: Tensor | None = None
    operands: tuple[Tensor, Tensor] | None = None

    @property
    def whole(self) -> tuple[int, int]:
        """The last two axes."""
        return self.n, self.m + self.sinks


class _Maximum(NamedTuple):
    """A tensor that was reduced from products."""


class Traces:
    """What is known of the tensors that came of products, while they live.

    :meth:`before` gets each function before it is called, and :meth:`after` its result.
    """

    def __init__(self) -> None:
        # Weakly, lest a measured step take more memory than another.
        self._traces = WeakIdKeyDictionary()

    def before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is known of the arguments; None where nothing needs to be followed."""
        if name in _PRODUCTS:
            return _product(name, args, kwargs)
        if name in _JOINING:
            return self._joined(args, kwargs)
        return self._first_trace(args, kwargs)

    def known(self, value: Any) -> Trace | _Maximum | None:
        """What is known of a value; None where it is no tensor that came of products."""
        return self._traces.get(value) if isinstance(value, Tensor) else None

    def _joined(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace | None:
        """Keys beside keys, and at most one column behind them that is no key."""
        tensors = list(args[0] if args else kwargs.get("tensors", ()))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        traces = [self.known(tensor) for tensor in tensors]
        sinks = 1 if len(tensors) > 1 and traces[-1] is None and tensors[-1].shape[-1] == 1 else 0
        parts = [one for one in (traces[:-1] if sinks else traces) if isinstance(one, Trace)]
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
        known = [self.known(value) for value in (*args, *kwargs.values())]
        traces = [one for one in known if isinstance(one, Trace)]
        if traces:
            trace = traces[0]
            return trace._replace(relative=True) if any(isinstance(one, _Maximum) for one in known) else trace
        return next((one for one in known if one is not None), None)

    def after(
        self, name: str, trace: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Remember what is known of a function's result.

        Args:
            name: of the function.
            trace: from :meth:`before`.
            args: of the call.
            kwargs: of the call.
            result: what it returned.
        """
        if isinstance(trace, _Maximum):
            if isinstance(result, Tensor) and (name in _ELEMENTWISE or name in _REORDERING_FREE):
                self._traces[result] = trace
            return
        if name in _PRODUCTS or name in _JOINING:
            if isinstance(result, Tensor) and tuple(result.shape[-2:]) == trace.whole:
                self._traces[result] = trace
            return
        given = (*args, *kwargs.values())
        source = next(value for value in given if isinstance(self.known(value), Trace))
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


def _masked(trace: Trace, added: Any, result: Tensor) -> Trace:
    """After a sum: remember where a mask of two values hid keys, unless the sum itself shows it."""
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


def far_down(logits: Tensor, hidden: Tensor) -> Tensor:
    """The logits with −inf where a small mask hides a key and its probability is as good as 0."""
    top = logits.masked_fill(hidden, -math.inf).amax(-1, keepdim=True)
    return logits.masked_fill(hidden & (logits < top - _NOTHING), -math.inf)


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace | None:
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
    kept = (left, right.mT) if STATE.operands else None
    return Trace(left.shape[-2], right.shape[-1], left.shape[-1], operands=kept)


def _is_computed(operand: Tensor) -> bool:
    return operand.dim() > 2 and not isinstance(operand, nn.Parameter) and operand.is_floating_point()


def _einsum(args: tuple[Any, ...]) -> Trace | None:
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
    summed = [letter for letter in sizes if letter not in output]
    if not summed:
        return None
    kept = None
    if STATE.operands and all(letter in left and letter in right for letter in summed):
        kept = _last(left, operands[0], row, summed), _last(right, operands[1], key, summed)
    return Trace(sizes[row], sizes[key], math.prod(sizes[letter] for letter in summed), operands=kept)


def _last(letters: str, operand: Tensor, token: str, summed: list[str]) -> Tensor:
    """One side of an einsum as (..., tokens, features); axes of an ellipsis come first."""
    extra = operand.dim() - len(letters)
    batch = [letter for letter in letters if letter != token and letter not in summed]
    order = [*range(extra), *(extra + letters.index(letter) for letter in (*batch, token, *summed))]
    return operand.permute(order).flatten(-len(summed))


def _kept(
    name: str, trace: Trace, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> Trace | None:
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
    name: str, trace: Trace, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace | None:
    """After axes were moved: rows and keys come last, in this order or in the other."""
    axes = torch.empty(tuple(range(2, source.dim() + 2)), device="meta")
    with torch._C.DisableTorchFunction():
        moved = getattr(torch.Tensor, name)(axes, *args[1:], **kwargs)
    order = [size - 2 for size in moved.shape]
    last = source.dim() - 1
    if order[-2:] == [last - 1, last]:
        return trace
    if order[-2:] == [last, last - 1]:
        flipped = None if trace.operands is None else trace.operands[::-1]
        return None if trace.sinks else trace._replace(n=trace.m, m=trace.n, operands=flipped)
    return None
