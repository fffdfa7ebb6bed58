"""Listen at transformers' attention interface without changing what a model computes.

Models look their attention function up in ``AttentionInterface`` at every call, by the name in their config.
That look-up is where the listener stands: the model keeps its implementation's name, gets its own function's
own result, and modules that nobody listens to pay one dictionary look-up.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError, is_recomputation, read_call

Listener = Callable[[str, AttentionCall], None]


class AttentionCapture:
    """Hands the attention calls of some modules to a listener, while enabled.

    Use :meth:`install` before the first forward (a compiled model does not see later changes), :attr:`enabled`
    to switch, and :meth:`remove` when done. Several captures can be installed at once.

    Args:
        names: the attention modules to listen to, and the name of each.
        listener: called with the name and the call, before the attention function runs, with autograd off.
            It must not modify the tensors.

    Attributes:
        enabled: whether calls are handed on.
        problems: name → why its calls cannot be used. Whatever goes wrong in reading a call or in the listener
            is kept here and that module is not listened to any more: the model's forward never fails for it.
        heard: names of the modules that were handed on at least once.
    """

    def __init__(self, names: Mapping[nn.Module, str], listener: Listener) -> None:
        # By identity: modules compare so, and a wrapper such as FSDP changes a module's class, not the object.
        self._names = {id(module): name for module, name in names.items()}
        self._modules = list(names)  # keeps the ids valid
        self._listener = listener
        self.enabled = False
        self.problems: dict[str, str] = {}
        self.heard: set[str] = set()

    def install(self) -> None:
        """Start to stand at the interface."""
        if self not in _installed:
            if not _installed:
                _patch()
            _installed.append(self)

    def remove(self) -> None:
        """Leave the interface as it was before :meth:`install`."""
        self.enabled = False
        if self in _installed:
            _installed.remove(self)
            if not _installed:
                _unpatch()

    def wants(self, module: nn.Module) -> bool:
        """Whether a call of this module is handed on now."""
        return self.enabled and self._names.get(id(module), None) not in (None, *self.problems)

    def hear(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        implementation: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Hand one call to the listener."""
        name = self._names[id(module)]
        try:
            self._listener(name, read_call(function, implementation, args, kwargs))
        except UnsupportedCallError as error:
            self.problems[name] = str(error)
        except Exception as error:
            self.problems[name] = f"its attention call could not be read ({type(error).__name__}: {error})"
        else:
            self.heard.add(name)


_installed: list[AttentionCapture] = []
_originals: dict[str, Callable[..., Any]] = {}


def _interface() -> Any:
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface


def _patch() -> None:
    interface = _interface()
    get_interface: Callable[..., Any] = interface.get_interface
    getitem: Callable[..., Any] = interface.__getitem__
    _originals["get_interface"] = get_interface
    if "__getitem__" in vars(interface):
        _originals["__getitem__"] = getitem

    @functools.wraps(get_interface)
    def tapped_get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
        return _tap(get_interface(self, attn_implementation, default), attn_implementation)

    # Some models subscript the mapping instead.
    @functools.wraps(getitem)
    def tapped_getitem(self: Any, name: str) -> Any:
        return _tap(getitem(self, name), name)

    interface.get_interface = tapped_get_interface
    interface.__getitem__ = tapped_getitem


def _unpatch() -> None:
    interface = _interface()
    interface.get_interface = _originals.pop("get_interface")
    if "__getitem__" in _originals:
        interface.__getitem__ = _originals.pop("__getitem__")
    else:
        del interface.__getitem__  # it was inherited
    _taps.clear()


_taps: dict[tuple[Any, str], Callable[..., Any]] = {}


def _tap(function: Any, implementation: str | None) -> Any:
    """The function with a listener in front; the same object for the same function every time."""
    if not callable(function) or getattr(function, "_lightning_qk_tap", False):
        return function
    name = implementation or "eager"  # transformers takes None for the model's own function
    known = _taps.get((function, name))
    if known is not None:
        return known

    @functools.wraps(function)
    def tap(*args: Any, **kwargs: Any) -> Any:
        if any(capture.enabled for capture in _installed):
            _hear(function, name, args, kwargs)
        return function(*args, **kwargs)

    tap._lightning_qk_tap = True  # type: ignore[attr-defined]
    _taps[(function, name)] = tap
    return tap


# Not traced: a compiled model breaks its graph here on the steps that listen and nowhere on the others.
@torch.compiler.disable
def _hear(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    module = args[0] if args else kwargs.get("module")
    if not isinstance(module, nn.Module) or is_recomputation():
        return
    wanted = [capture for capture in _installed if capture.wants(module)]
    with torch.no_grad():
        for capture in wanted:
            capture.hear(module, function, name, args, kwargs)
