"""Watch a forward pass from below: every operation that torch runs, where it ran and what it was made from.

Nothing here knows how a model calls attention. An attention is found by what it computes: a softmax (or a fused
operator that contains one) whose logits are products of two tensors neither of which is a parameter.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qk.architecture.products import tensors_in
from lightning_qk.functional.chunks import MASKED_BELOW

PRODUCTS = frozenset({"bmm", "baddbmm", "mm", "addmm", "dot", "mv", "_scaled_mm"})
_SOFTMAX = frozenset({"_softmax", "_safe_softmax", "logsumexp", "_log_softmax"})
# Where the search from a softmax back to the products in its logits ends.
_BARRIERS = frozenset(
    {
        *_SOFTMAX,
        "convolution",
        "native_layer_norm",
        "native_group_norm",
        "embedding",
        "native_batch_norm",
        "topk",
    }
)
MOVES = frozenset(
    {
        "_conj", "_reshape_alias", "_reshape_copy", "_to_copy", "_unsafe_view", "alias", "as_strided",
        "cat", "chunk", "clone", "constant_pad_nd", "contiguous", "copy", "copy_", "detach", "empty_like",
        "expand", "expand_as", "flatten", "flip", "gather", "im2col", "index", "index_put", "index_put_",
        "index_select", "lift_fresh", "masked_select", "movedim", "narrow", "new_empty", "new_zeros",
        "permute", "repeat", "repeat_interleave", "reshape", "resolve_conj", "resolve_neg", "roll",
        "scatter", "select", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack",
        "t", "take_along_dim", "transpose", "unbind", "unflatten", "unfold", "unsafe_chunk",
        "unsafe_split", "unsqueeze", "view", "view_copy", "zeros_like",
    }
)  # fmt: skip
"""Operations that copy numbers from one place to another and compute nothing."""
SCALINGS = frozenset({"mul", "mul_", "div", "div_"})


@dataclass(eq=False, slots=True)
class Node:
    """One result of one operation.

    Attributes:
        name: of the operation, as ATen calls it.
        parents: what its tensor arguments were made by.
        args: of the call, positional.
        kwargs: of the call.
        tensor: the result. In-place operations may have changed it since.
    """

    name: str
    parents: list["Node"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensor: Tensor

    def factor(self) -> float | None:
        """The number that this operation multiplies one tensor by, or None where it does something else."""
        if self.name not in SCALINGS:
            return None
        number = _number(self.args[1]) if len(self.args) > 1 else None
        if number is None and self.name.startswith("mul"):
            number = _number(self.args[0])
        if number is None or number == 0:
            return None
        return number if self.name.startswith("mul") else 1 / number


@dataclass(eq=False, slots=True)
class Frame:
    """One call of one module: its name, and the tensors that went into it and its parts and came out of them."""

    name: str
    module: nn.Module
    tensors: list[Tensor] = field(default_factory=list)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Remember tensors that may be what the layer projects."""
        known = {id(tensor) for tensor in self.tensors}
        for tensor in tensors:
            if (
                len(self.tensors) < 64
                and tensor.is_floating_point()
                and tensor.dim() >= 2
                and id(tensor) not in known
            ):
                self.tensors.append(tensor)


@dataclass(eq=False, slots=True)
class Product:
    """Two operands whose product, scaled, is (part of) the logits.

    Attributes:
        query, key: ``(..., n, d)`` and ``(..., m, d)``; which is which follows from the softmax's axis.
        query_node, key_node: what they were made by, or None.
        scale: the factor on their product, or None where it is no single number.
    """

    query: Tensor
    key: Tensor
    query_node: Node | None
    key_node: Node | None
    scale: float | None


@dataclass(eq=False, slots=True)
class Event:
    """One softmax attention.

    Attributes:
        frames: the module calls around it, outermost first.
        products: the terms of its logits; more than one where terms of position are added.
        probabilities: after the softmax, before dropout; None for a fused operator, and where they are not seen.
        fused: it ran as one operator.
        empty: which rows of the probabilities have all of their keys hidden; None for a fused operator.
        mask: of a fused operator: the additive or boolean mask.
        is_causal: of a fused operator.
    """

    frames: tuple[Frame, ...]
    products: list[Product]
    probabilities: Tensor | None = None
    fused: bool = False
    empty: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False


class Trace(TorchDispatchMode):
    """Records a forward pass of a model while entered. Use it without gradients.

    Attributes:
        events: the softmax attentions that ran, in order.
        ran: names of the modules that ran.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {
            tensor.untyped_storage().data_ptr()
            for tensor in (*model.parameters(), *model.buffers())
            if tensor.device.type != "meta"
        }
        self._nodes: dict[int, Node] = {}
        self._owners: dict[int, Node] = {}
        self._unused: dict[int, Event] = {}
        self._keep: list[Tensor] = []
        self._stack: list[Frame] = []
        self._hooks: list[Any] = []
        self.events: list[Event] = []
        self.ran: set[str] = set()
        self._paused = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in here is no part of the forward."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __enter__(self) -> "Trace":
        for module in self._names:
            self._hooks.append(module.register_forward_pre_hook(self._enter_module, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave_module, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # A tensor that nothing was computed from is not part of the model.
        unused = {id(event) for event in self._unused.values()}
        self.events = [event for event in self.events if id(event) not in unused]
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stack.clear()

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        frame = Frame(self._names[module], module)
        self.ran.add(frame.name)
        self._stack.append(frame)
        tensors = list(tensors_in((args, kwargs)))
        for outer in self._stack[-5:]:
            outer.add(tensors)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        tensors = list(tensors_in(output))
        while self._stack:
            frame = self._stack.pop()
            if frame.module is module:
                break
        for outer in self._stack[-4:]:
            outer.add(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = list(tensors_in((args, kwargs)))
        parents = [self._nodes[id(tensor)] for tensor in given if id(tensor) in self._nodes]
        output = func(*args, **kwargs)
        for tensor in tensors_in(output):
            node = Node(name, list(parents), args, kwargs, tensor)
            self._nodes[id(tensor)] = node
            self._keep.append(tensor)  # an id is only good while its tensor lives
            place = tensor.untyped_storage().data_ptr()
            owner = self._owners.setdefault(place, node)
            if name.endswith("_") and owner is not node:
                # A part of a larger tensor was written, which then depends on it too.
                owner.parents.append(node)
        for tensor in given:
            self._unused.pop(id(tensor), None)
        if "scaled_dot_product" in name:
            self._fused(args, kwargs)
        elif name in _SOFTMAX:
            self._softmax(name, args, output)
        return output

    def _node(self, tensor: Any) -> Node | None:
        return self._nodes.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _fused(self, args: Any, kwargs: dict[str, Any]) -> None:
        named = dict(zip(("query", "key", "value", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        query, key = named["query"], named["key"]
        scale = named.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        product = Product(query, key, self._node(query), self._node(key), scale)
        mask = named.get("attn_mask", named.get("attn_bias"))
        self.events.append(
            Event(
                tuple(self._stack),
                [product],
                fused=True,
                mask=mask if isinstance(mask, Tensor) else None,
                is_causal=bool(named.get("is_causal", False)),
            )
        )

    def _softmax(self, name: str, args: Any, output: Tensor) -> None:
        logits: Tensor = args[0]
        if logits.dim() < 2:
            return
        axis = args[1]
        axis = (axis[0] if isinstance(axis, list | tuple) else axis) % logits.dim()
        products = list(self._products(logits, axis))
        if not products:
            return
        probabilities: Tensor | None = output
        if name == "logsumexp":
            total = output if output.dim() == logits.dim() else output.unsqueeze(axis)
            probabilities = (logits - total).exp()
        elif name == "_log_softmax":
            return
        elif axis != logits.dim() - 1:
            probabilities = output.transpose(axis, -1)
        empty = logits.amax(axis) <= MASKED_BELOW
        event = Event(tuple(self._stack), products, probabilities, empty=empty)
        self.events.append(event)
        self._unused[id(output)] = event

    def _products(self, logits: Tensor, axis: int) -> Iterator[Product]:
        """Products of two activations among the terms of the logits."""
        start = self._nodes.get(id(logits))
        if start is None:
            return
        keys = logits.shape[axis]
        seen: set[int] = set()
        todo: list[tuple[Node, float | None]] = [(start, 1.0)]
        found = 0
        while todo and len(seen) < 400 and found < 8:
            node, scale = todo.pop(0)
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.name in PRODUCTS:
                product = self._product(node, scale, keys, flipped=axis != logits.dim() - 1)
                if product is not None:
                    found += 1
                    yield product
                if node.name == "baddbmm":
                    added = self._nodes.get(id(node.args[0]))
                    if added is not None:
                        todo.append((added, None))
                continue
            if node.name in _BARRIERS:
                continue
            factor = node.factor()
            if node.name in ("mul", "mul_", "div", "div_", "tanh", "tanh_") and factor is None:
                scale = None
            elif factor is not None and scale is not None:
                scale *= factor
            todo.extend((parent, scale) for parent in node.parents)

    def _product(self, node: Node, scale: float | None, keys: int, *, flipped: bool) -> Product | None:
        first, second = node.args[-2:] if node.name in ("bmm", "mm") else node.args[1:3]
        if self._is_parameter(first) or self._is_parameter(second) or first.dim() < 2 or second.dim() < 2:
            return None
        alpha = float(node.kwargs.get("alpha", 1.0))
        scale = None if scale is None else scale * alpha
        query, key = first, second.transpose(-1, -2)
        query_node, key_node = self._node(first), self._node(second)
        if key.shape[-2] != keys and query.shape[-2] == keys:
            query, key, query_node, key_node = key, query, key_node, query_node
        return Product(query, key, query_node, key_node, scale)

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter, or a rearrangement of one."""
        for _ in range(12):
            if tensor.untyped_storage().data_ptr() in self._parameters:
                return True
            node = self._nodes.get(id(tensor))
            if node is None or node.name not in MOVES or len(node.parents) > 1:
                return False
            source = next(tensors_in(node.args), None)
            if source is None:
                return False
            tensor = source
        return False


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype.is_floating_point:
        return float(value)
    return None
