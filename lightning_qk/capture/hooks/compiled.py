"""Attention calls inside graphs of torch.compile: operators that hand tensors out of the graph.

A graph calls operators that claim to change a small tensor, which keeps them, and their order, through
functionalization, dead-code elimination and checkpointing. They look at a flag, so that one graph serves steps
that are captured and those that are not. Only CUDA graphs, which are replayed without them, have two versions:
whether calls are captured is a guard there. A tensor in an attribute of the module, an input of the graph,
identifies the layer: layers that share one compiled graph keep sharing it.

In the graph, :func:`emit` flattens a call into a string, tensors and numbers; outside, it is put together again.
"""

import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_qk.capture import registry
from lightning_qk.capture.call import AttentionCall, UnsupportedCallError, is_recomputation, read_call
from lightning_qk.capture.captured import Arguments, FunctionCall
from lightning_qk.capture.hooks.modules import untraced

_HANDLE = "_lightning_qk_handle"

# On the CPU, whatever the model's device: reading a layer's number then never waits for a GPU, and a capturing
# graph is kept out of CUDA graphs, which could not call back into Python.
with torch.inference_mode(False):
    ORDER = torch.zeros(1, dtype=torch.int64, device="cpu")
    """What the operators claim to change."""

_library = torch.library.Library("lightning_qk", "DEF")
graph_tags = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
_library.define(
    "call(Tensor(a!) order, Tensor? module, str form, Tensor[] tensors, float[] floats, SymInt[] ints) -> ()",
    tags=graph_tags,
)
_library.define("enter(Tensor(a!) order, Tensor? module) -> ()", tags=graph_tags)
_library.define("leave(Tensor(a!) order) -> ()", tags=graph_tags)


class _Handle:
    """A module's number as a tensor.

    A copy of the module, such as an average of its weights, gets None, until the handle itself is taken away.
    """

    def __init__(self, number: int, module: nn.Module) -> None:
        with torch.inference_mode(False):
            self.identity = torch.tensor([number], dtype=torch.int64, device="cpu")
        self.users = 0
        self._module = weakref.ref(module)
        self._copies: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __deepcopy__(self, memo: Mapping[int, Any]) -> None:
        copy = memo.get(id(self._module()))
        if isinstance(copy, nn.Module):
            self._copies.add(copy)

    def leave_copies(self) -> None:
        """Take what copies have in place of the handle."""
        for copy in list(self._copies):
            if vars(copy).get(_HANDLE, self) is None:
                del vars(copy)[_HANDLE]

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()


_numbers = itertools.count(1)
_modules: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()
_lock = threading.RLock()


def label(module: nn.Module) -> None:
    """Identify this module in compiled graphs, until :func:`unlabel`."""
    with _lock:
        handle = vars(module).get(_HANDLE)
        if handle is None:
            number = next(_numbers)
            handle = vars(module)[_HANDLE] = _Handle(number, module)
            _modules[number] = module
        handle.users += 1


def unlabel(module: nn.Module) -> None:
    """Undo one :func:`label`."""
    with _lock:
        handle = vars(module).get(_HANDLE)
        if handle is None:
            return
        handle.users -= 1
        if handle.users == 0:
            _modules.pop(int(handle.identity), None)
            del vars(module)[_HANDLE]
            handle.leave_copies()


class Source(NamedTuple):
    """An attention function, which graphs name by a number that stays the same for the process.

    Attributes:
        function: as a capture gets it; None where the arguments mean what the implementation's name says.
        implementation: its name.
        read: makes the call of the module and the arguments; None where the function says what they mean.
    """

    function: Callable[..., Any] | None
    implementation: str
    read: Callable[..., FunctionCall] | None = None


_sources: list[Source] = []


def source_number(
    function: Callable[..., Any] | None,
    implementation: str,
    read: Callable[..., FunctionCall] | None = None,
) -> int:
    """The number of a :class:`Source` in graphs."""
    source = Source(function, implementation, read)
    with _lock:
        if source not in _sources:
            _sources.append(source)
        return _sources.index(source)


class Captures(Protocol):
    """What the hooks read: whether a capture is enabled, and whether one is installed that reads graphs."""

    capturing: bool
    traced: bool


def is_read(state: Captures) -> bool:
    """Whether a graph that is traced now gets operators. Traced, and guarded by what it looks at."""
    return state.capturing if _is_replayed() else state.traced


@torch.compiler.assume_constant_result
def _is_replayed() -> bool:
    """Whether the graph that is traced now becomes a CUDA graph, as far as its backend can be asked."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._inductor import config

        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
        while not hasattr(backend, "config"):
            if getattr(backend, "__name__", "").startswith("cudagraphs"):
                return True
            # In what torch.compile and dynamo wrap it into, and in DDP's splitting.
            backend = (
                getattr(backend, "_torchdynamo_orig_backend", None)
                or getattr(backend, "compiler_fn", None)
                or getattr(getattr(backend, "__self__", None), "backend_compile_fn", None)
            )
            if backend is None:
                return bool(config.triton.cudagraphs)
        return bool(backend.config.get("triton.cudagraphs", config.triton.cudagraphs))
    except Exception:
        return True  # unknown in this version of torch


def identity(module: nn.Module) -> Tensor | None:
    """The tensor that identifies the module in a graph; None where it is not captured. Traced."""
    handle = getattr(module, _HANDLE, None)
    return None if handle is None else handle.identity


def emit(module: Tensor | None, number: int, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Hand a call out of the graph. Traced: only what torch.compile turns into constants and operators.

    Args:
        module: from :func:`identity`; None for the module that was entered last.
        number: from :func:`source_number`.
        args: query, key, value, mask and so on, by position, the module left out.
        kwargs: the rest.
    """
    form = str(number)
    tensors: list[Tensor] = []
    floats: list[float] = []
    ints: list[int] = []
    for name, value in [("", value) for value in args] + list(kwargs.items()):
        if value is None:
            form += f";{name}=N"
        elif isinstance(value, Tensor):
            form += f";{name}=t"
            tensors.append(value)
        elif value is True:
            form += f";{name}=T"
        elif value is False:
            form += f";{name}=F"
        elif isinstance(value, torch.SymBool):
            form += f";{name}=T" if value else f";{name}=F"
        elif isinstance(value, float):
            form += f";{name}=f"
            floats.append(value)
        elif isinstance(value, int):
            form += f";{name}=i"
            ints.append(value)
        elif name == "" or name == "attention_mask":
            form += f";{name}=x"
    if tensors and torch.is_autocast_enabled(tensors[0].device.type):
        # The operators run without it.
        device = tensors[0].device.type
        form = f"{device} {str(torch.get_autocast_dtype(device)).removeprefix('torch.')} {form}"
    torch.ops.lightning_qk.call(ORDER, module, form, tensors, floats, ints)


def emit_arguments(module: Tensor | None, number: int, found: Arguments | str) -> None:
    """Hand arguments out of the graph, or the reason why they cannot be read. Traced."""
    if isinstance(found, str):
        emit_problem(module, found)
    else:
        emit(module, number, found[0], found[1])


def emit_problem(module: Tensor | None, reason: str) -> None:
    """Hand the reason out of the graph why a call cannot be read. Traced."""
    torch.ops.lightning_qk.call(ORDER, module, "!" + reason, [], [], [])


def enter(module: Tensor | None) -> None:
    """Calls without a module belong to this one until :func:`leave`; None: to none. Traced."""
    torch.ops.lightning_qk.enter(ORDER, module)


def leave() -> None:
    """Undo the last :func:`enter`. Traced."""
    torch.ops.lightning_qk.leave(ORDER)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.numbers: list[int | None] = []


_stack = _Stack()


def entered() -> tuple[bool, nn.Module | None]:
    """Whether a graph is running an entered module, and which; None where calls belong to none."""
    if not _stack.numbers:
        return False, None
    number = _stack.numbers[-1]
    return True, None if number is None else _modules.get(number)


def forget_entered() -> None:
    """Start over: a graph that raised may have left modules entered."""
    _stack.numbers.clear()


@torch.compiler.disable
def _enter(order: Tensor, module: Tensor | None) -> None:
    if not is_recomputation():
        _stack.numbers.append(None if module is None else int(module))


@torch.compiler.disable
def _leave(order: Tensor) -> None:
    if _stack.numbers and not is_recomputation():
        _stack.numbers.pop()


@torch.compiler.disable
def _call(
    order: Tensor,
    module: Tensor | None,
    form: str,
    tensors: list[Tensor],
    floats: list[float],
    ints: list[int],
) -> None:
    if is_recomputation():
        return
    layer = entered()[1] if module is None else _modules.get(int(module))
    if layer is not None:
        # The tensors may be buffers that the graph writes to next: a listener must copy what it keeps.
        registry.deliver(layer, lambda: _read(layer, form, tensors, floats, ints))


def _read(
    module: nn.Module, form: str, tensors: list[Tensor], floats: list[float], ints: list[int]
) -> FunctionCall:
    if form.startswith("!"):
        raise UnsupportedCallError(form[1:])
    head, *words = form.split(";")
    *precision, number = head.split()
    source = _sources[int(number)]
    values = {"t": iter(tensors), "f": iter(floats), "i": iter(ints)}
    constants = {"N": None, "T": True, "F": False}
    args: list[Any] = [module]
    kwargs: dict[str, Any] = {}
    for word in words:
        name, _, code = word.rpartition("=")
        if code == "x":
            raise UnsupportedCallError(
                f"its {source.implementation!r} attention gets a mask that is no tensor, which cannot leave a "
                'graph of torch.compile: use attn_implementation="sdpa", or train without torch.compile'
            )
        value = next(values[code]) if code in values else constants[code]
        if name:
            kwargs[name] = value
        else:
            args.append(value)
    if source.read is not None:
        with torch.autocast(precision[0], getattr(torch, precision[1])) if precision else nullcontext():
            return source.read(*args, **kwargs)
    if source.function is None:
        _, query, key, value, mask = args
        return FunctionCall(AttentionCall(module, query, key, value, mask, source.implementation, kwargs))
    return FunctionCall(read_call(source.function, source.implementation, tuple(args), kwargs))


def module_of(identity: Tensor) -> nn.Module | None:
    """The module of a tensor from :func:`identity`; None where it is gone or not captured any more."""
    return _modules.get(int(identity))


def _nothing(*args: Any) -> None:
    """What the operators do to tensors that have no data."""


def implement(
    library: torch.library.Library, name: str, function: Callable[..., None], state: Captures
) -> None:
    """Implement an operator that hands tensors out of a graph; its first argument is :data:`ORDER`.

    Args:
        library: where it is defined.
        name: its name.
        function: what it does while a capture is enabled.
        state: says whether one is.
    """

    def check(*args: Any) -> None:
        if state.capturing:
            function(*args)

    untraced(check)
    library.impl(name, check, "CompositeExplicitAutograd")
    # No gradient passes through them, and the version of the tensor is not counted, which a checkpoint would see.
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"lightning_qk::{name}", _nothing, lib=library)


for _name, _function in (("call", _call), ("enter", _enter), ("leave", _leave)):
    implement(_library, _name, _function, registry.STATE)


def drop_graphs(model: nn.Module | None) -> None:
    """Drop graphs that were made before a capture was installed: they do not notice that a function was patched.

    Every graph of the process is dropped (`torch.compiler.reset`), since there is no public way to drop those of
    one model; it is compiled again at its next call.

    Args:
        model: what is going to be captured; None: whatever was compiled in this process.
    """
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    if dynamo is None:
        return
    seen = getattr(getattr(dynamo, "input_codes", None), "seen", None)
    anything = True if seen is None else bool(seen)
    if anything and (model is None or is_compiled(model)):
        torch.compiler.reset()


def is_compiled(model: nn.Module) -> bool:
    """Whether some part of a model was compiled by torch.compile."""
    from torch._dynamo.eval_frame import OptimizedModule

    if getattr(model, "_compiler_ctx", None) is not None:  # Lightning unpacks a compiled LightningModule
        return True
    modules = list(model.modules())
    if any(
        isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
        for module in modules
    ):
        return True
    # A method or a function that was compiled on its own leaves its graphs with its code.
    functions = [
        value
        for kind in {type(module) for module in modules}
        for base in kind.__mro__
        if base is not nn.Module and base is not object
        for value in vars(base).values()
    ]
    # What is no part of the model is often kept in a list or a dictionary.
    held = [value for module in modules for value in vars(module).values()]
    held += [one for value in held if isinstance(value, list | tuple) for one in value]
    held += [one for value in held if type(value) is dict for one in value.values()]
    functions += [value for value in held if callable(value)]
    if any(
        isinstance(function, OptimizedModule) or hasattr(function, "_torchdynamo_orig_callable")
        for function in functions
    ):
        return True
    codes = {code for function in functions for code in _codes(function)}
    try:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        return any(_debug_get_cache_entry_list(code) for code in codes)
    except Exception:
        return True  # unknown in this version of torch


def _codes(function: Any) -> Iterator[types.CodeType]:
    """Code of a function and of those that it wraps."""
    seen = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        code = getattr(function, "__code__", None)
        if isinstance(code, types.CodeType):
            yield code
        function = getattr(function, "__wrapped__", None)
