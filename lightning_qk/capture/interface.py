"""Listen to attention calls without changing what a model computes.

There are four places where a model's attention can be heard. Transformers' models look their attention
function up in ``AttentionInterface`` at every call, by the name in their config: the listener stands at that
look-up, and the model keeps its implementation's name and gets its own function's own result. Other models call
``torch.nn.functional.scaled_dot_product_attention`` or ``torch.nn.MultiheadAttention``, and the listener stands
there where the watched modules need it. What is left multiplies and takes a softmax itself, which is observed
while its forward runs (:mod:`lightning_qk.capture.softmax`). Who is not listened to pays one look at a boolean.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_qk.architecture.source_code import calls_sdpa, calls_softmax, uses_interface
from lightning_qk.capture import compiled, fronts, generation, listeners
from lightning_qk.capture.call import read_call
from lightning_qk.capture.captured import CapturedCall, FunctionCall
from lightning_qk.capture.compiled import Source
from lightning_qk.capture.direct import stand_at_sdpa
from lightning_qk.capture.listeners import STATE
from lightning_qk.capture.multihead import stand_at_multihead
from lightning_qk.capture.patches import Stand, stand_in
from lightning_qk.capture.record import UnreadableFunctionError, UnsupportedCallError
from lightning_qk.capture.softmax import observed, suspended

Listener = Callable[[str, CapturedCall], None]


class AttentionCapture:
    """Hands the attention calls of some modules to a listener, while enabled.

    Use :meth:`install` once the network is built, :attr:`enabled` to switch, and :meth:`remove` when done.
    Several captures can be installed at once, in any order, also from several threads. Models of torch.compile
    are heard whenever they were compiled; each of their graphs has two versions, one that listens.

    Args:
        names: the attention modules to listen to, and the name of each.
        listener: called with the name and the call, with autograd off, in the thread of the forward. It must
            not modify the tensors, nor keep them: a compiled graph uses their memory again.
        model: what the modules are part of. It is asked whether it was compiled before, and its files are
            searched for other names of scaled_dot_product_attention. None: whatever was compiled in this
            process is compiled again.
        eager: whoever enables it sees to it that no graph runs (``torch.compiler.set_stance``), so that graphs
            are left as they are.
        operands: also keep, while enabled, the queries and keys of softmaxes that layers take themselves. They
            stay in memory as long as their logits do.
        generated: called with the name, in place of the listener, for calls within transformers' ``generate``.
            None: they are handed on as all others.

    Attributes:
        problems: name → why its calls cannot be used. Whatever goes wrong in reading a call or in the listener
            is kept here and that module is not listened to any more: the model's forward never fails for it.
        heard: names of the modules that were handed on at least once.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        listener: Listener,
        *,
        model: nn.Module | None = None,
        eager: bool = False,
        operands: bool = False,
        generated: Callable[[str], None] | None = None,
    ) -> None:
        # By identity: modules compare so, and a wrapper such as FSDP changes a module's class, not the object.
        self._names = {id(module): name for module, name in names.items()}
        self._modules = list(names)  # keeps the ids valid
        self._listener = listener
        self._model = model
        self._eager = eager
        self._generated = generated
        self.operands = operands
        self._enabled = False
        self._give_back: list[Callable[[], None]] | None = None
        self._implementations: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.heard: set[str] = set()

    @property
    def enabled(self) -> bool:
        """Whether calls are handed on."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        if value:
            compiled.forget_entered()
        listeners.refresh()

    def install(self) -> None:
        """Start to stand where the modules call their attention."""
        with listeners.lock:
            if self._give_back is not None:
                return
            self._give_back = []
            try:
                self._install(self._give_back)
            except BaseException:
                self.remove()
                raise

    def _install(self, give_back: list[Callable[[], None]]) -> None:
        if not self._eager:
            compiled.drop_graphs(self._model)
        multihead = [module for module in self._modules if isinstance(module, nn.MultiheadAttention)]
        direct = [
            module
            for module in self._modules
            if not isinstance(module, nn.MultiheadAttention)
            and (calls_sdpa(module) or calls_softmax(module) or not uses_interface(module))
        ]
        give_back.append(stand_at_interface())
        if self._generated is not None:
            give_back.extend(generation.stand_at_generate(self._model))
        if multihead:
            give_back.extend(stand_at_multihead(multihead))
        if direct:
            give_back.extend(stand_at_sdpa(direct, self._model))
            listeners.count_direct(1)
            give_back.append(lambda: listeners.count_direct(-1))
        for module in self._modules:
            compiled.label(module)
            give_back.append(functools.partial(compiled.unlabel, module))
        listeners.add(self)

    def remove(self) -> None:
        """Leave everything as it was before :meth:`install`."""
        with listeners.lock:
            self.enabled = False
            listeners.discard(self)
            give_back, self._give_back = self._give_back, None
            for one in reversed(give_back or []):
                one()

    def wants(self, module: nn.Module) -> bool:
        """Whether a call of this module is handed on now."""
        return self._enabled and self._names.get(id(module), None) not in (None, *self.problems)

    def unreadable_reason(self, module: nn.Module) -> str | None:
        """Why the softmax of this module's attention function is to be observed; None where it is not."""
        return self._unreadable.get(self._names.get(id(module), ""))

    def hear(self, module: nn.Module, read: Callable[[], CapturedCall], *, may_observe: bool = False) -> None:
        """Hand one call to the listener.

        Args:
            module: one of the capture's.
            read: makes the call, or raises why it cannot.
            may_observe: the softmax inside the attention function can be had instead.
        """
        name = self._names[id(module)]
        if self._generated is not None and generation.is_running():
            self._generated(name)
            return
        if may_observe and name in self._unreadable:
            return
        try:
            call = read()
            before = self._implementations.setdefault(name, call.implementation)
            if call.implementation != before:
                raise UnsupportedCallError(
                    f"its attention implementation changed from {before!r} to {call.implementation!r} during "
                    "training: keep one from the start to have it measured"
                )
            self._listener(name, call)
        except UnsupportedCallError as error:
            if may_observe and isinstance(error, UnreadableFunctionError):
                self._unreadable[name] = str(error)
                self._implementations.pop(name)
            else:
                self.problems[name] = str(error)
        except Exception as error:
            self.problems[name] = f"its attention call could not be read ({type(error).__name__}: {error})"
        else:
            self.heard.add(name)


def stand_at_interface() -> Callable[[], None]:
    """Stand where transformers' models look their attention function up; what gives the place back."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # there is no model of theirs
        return lambda: None
    interface = modeling.AttentionInterface
    stands = [
        stand_in(interface, "get_interface", _tap_get_interface),
        stand_in(interface, "__getitem__", _tap_getitem),  # some models subscript it
    ]

    def give_back() -> None:
        for one in reversed(stands):
            one()

    return give_back


def _tap_get_interface(get_interface: Callable[..., Any], stand: Stand) -> Callable[..., Any]:
    @functools.wraps(get_interface)
    def tapped_get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
        function = get_interface(self, attn_implementation, default)
        return _taken(function, attn_implementation) if stand.active else function

    return tapped_get_interface


def _tap_getitem(getitem: Callable[..., Any], stand: Stand) -> Callable[..., Any]:
    @functools.wraps(getitem)
    def tapped_getitem(self: Any, name: str) -> Any:
        function = getitem(self, name)
        return _taken(function, name) if stand.active else function

    return tapped_getitem


def _taken(function: Any, implementation: str | None) -> Any:
    """The function with whoever steers and whoever listens before it."""
    if fronts.STATE.steering:
        return fronts.in_front(function, implementation, _tap)
    return _tap(function, implementation)


_taps: dict[tuple[Any, str], Callable[..., Any]] = {}


def _tap(function: Any, implementation: str | None) -> Any:
    """The function, with a listener in front while somebody listens; one object for one function."""
    if not STATE.listening:
        return function
    name = implementation or "eager"  # transformers takes None for the model's own function
    if torch.compiler.is_dynamo_compiling():
        if isinstance(function, functools.partial) and function.func is _traced:
            return function  # one look-up uses the other
        return functools.partial(_traced, function, name)
    if not callable(function) or getattr(function, "_lightning_qk_tap", False):
        return function
    known = _taps.get((function, name))
    if known is not None:
        return known

    @functools.wraps(function)
    def tap(*args: Any, **kwargs: Any) -> Any:
        if STATE.listening and listeners.is_free():
            module, reason = _hear(function, name, args, kwargs)
            if module is not None and reason is not None:
                with observed(module, reason):
                    return function(*args, **kwargs)
            with listeners.silence(), suspended():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    tap._lightning_qk_tap = True  # type: ignore[attr-defined]
    _taps[(function, name)] = tap
    return tap


def _traced(function: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """A call in a graph of torch.compile."""
    _emit(_number(function, name), _parameters(function), args, kwargs)
    if not STATE.direct:
        return function(*args, **kwargs)
    compiled.enter(None)
    output = function(*args, **kwargs)
    compiled.leave()
    return output


@torch.compiler.assume_constant_result
def _number(function: Callable[..., Any], name: str) -> int:
    return Source.of(function, name).number


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
def _hear(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[nn.Module | None, str | None]:
    """Deliver a call; the module, and why its function's softmax has to be observed."""
    module = args[0] if args else kwargs.get("module")
    if not isinstance(module, nn.Module) or not listeners.is_watched(module):
        return None, None
    listeners.deliver(module, lambda: FunctionCall(read_call(function, name, args, kwargs)), may_observe=True)
    return module, listeners.unreadable_reason(module)
