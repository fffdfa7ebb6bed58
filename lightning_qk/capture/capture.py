"""Capture of attention calls, without changing what a model computes.

There are four places where calls are seen, patched where the watched modules need it: the look-up in transformers'
``AttentionInterface``, ``torch.nn.functional.scaled_dot_product_attention``, ``torch.nn.MultiheadAttention``, and
the softmax of layers that compute attention themselves. While nothing is captured, each costs a look at a boolean.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lightning_qk._deprecated import OldName
from lightning_qk.architecture.source_code import calls_sdpa, calls_softmax, uses_interface
from lightning_qk.capture import registry
from lightning_qk.capture.call import UnreadableFunctionError, UnsupportedCallError
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.capture.hooks import compiled, generate
from lightning_qk.capture.hooks.attention_interface import patch_interface
from lightning_qk.capture.hooks.multihead import patch_multihead
from lightning_qk.capture.hooks.sdpa import patch_sdpa

Listener = Callable[[str, CapturedCall], None]


class Capture(ABC):
    """What captures have in common: they are installed, enabled and removed, and keep what goes wrong.

    Attributes:
        problems: name → why it cannot be captured any more. Whatever goes wrong in reading or in the listener
            is kept here: the model's forward never fails for it.
        seen: names of what was handed on at least once.
    """

    _what: str
    heard = OldName("seen")

    def __init__(self, model: nn.Module | None, generated: Callable[[str], None] | None) -> None:
        self._model = model
        self._generated = generated
        self._enabled = False
        self._undo: list[Callable[[], None]] | None = None
        self.problems: dict[str, str] = {}
        self.seen: set[str] = set()

    @property
    def enabled(self) -> bool:
        """Whether anything is handed on."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        self._switched()

    @abstractmethod
    def _switched(self) -> None: ...

    @abstractmethod
    def _install(self, undo: list[Callable[[], None]]) -> None:
        """Patch and hook; what undoes it is added to ``undo`` step by step."""

    @abstractmethod
    def _discard(self) -> None:
        """Take this capture out of those that are handed anything."""

    def install(self) -> None:
        """Patch and hook the places where the model is seen."""
        with registry.lock:
            if self._undo is not None:
                return
            self._undo = []
            try:
                self._install(self._undo)
            except BaseException:
                self.remove()
                raise

    def remove(self) -> None:
        """Leave everything as it was before :meth:`install`."""
        with registry.lock:
            self.enabled = False
            self._discard()
            undo, self._undo = self._undo, None
            for one in reversed(undo or []):
                one()

    def _label(self, modules: Iterable[nn.Module], undo: list[Callable[[], None]]) -> None:
        for module in modules:
            compiled.label(module)
            undo.append(functools.partial(compiled.unlabel, module))

    def _is_generated(self, name: str) -> bool:
        """Whether a forward within ``generate`` is left out."""
        if self._generated is None or not generate.is_running():
            return False
        self._generated(name)
        return True

    @contextmanager
    def _keeping_problems(self, name: str) -> Iterator[None]:
        try:
            yield
        except UnsupportedCallError as error:
            self.problems[name] = str(error)
        except Exception as error:
            self.problems[name] = f"its {self._what} could not be read ({type(error).__name__}: {error})"


class AttentionCapture(Capture):
    """Hands the attention calls of some modules to a listener, while enabled.

    Use :meth:`install` once the network is built, :attr:`enabled` to switch, and :meth:`remove` when done.
    Several captures can be installed at once, in any order, also from several threads. Models of torch.compile
    are captured whenever they were compiled; one graph serves steps that are captured and those that are not,
    but with CUDA graphs, of which there are two.

    Args:
        names: the attention modules, and the name of each.
        listener: called with the name and the call, with autograd off, in the thread of the forward. It must
            not modify the tensors, nor keep them: a compiled graph uses their memory again.
        model: what the modules are part of. It is asked whether it was compiled before, and its files are
            searched for other names of scaled_dot_product_attention. None: whatever was compiled in this
            process is compiled again.
        eager: no graph runs while enabled (``torch.compiler.set_stance``), so that graphs are left as they are.
        operands: also keep, while enabled, the queries and keys of softmaxes that layers compute themselves. They
            stay in memory as long as their logits do.
        generated: called with the name, in place of the listener, for calls within transformers' ``generate``.
            None: they are handed on as all others.

    Attributes:
        problems: name → why its calls are not captured any more.
        seen: names of the modules with at least one call that was handed on.
    """

    _what = "attention call"

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
        super().__init__(model, generated)
        # By identity: modules compare so, and a wrapper such as FSDP changes a module's class, not the object.
        self._names = {id(module): name for module, name in names.items()}
        self._modules = list(names)  # keeps the ids valid
        self._listener = listener
        self.eager = eager
        self.operands = operands
        self._implementations: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}

    def _switched(self) -> None:
        if self._enabled:
            compiled.forget_entered()
        registry.refresh()

    def _discard(self) -> None:
        registry.discard(self)

    def _install(self, undo: list[Callable[[], None]]) -> None:
        if not self.eager:
            compiled.drop_graphs(self._model)
        multihead = [module for module in self._modules if isinstance(module, nn.MultiheadAttention)]
        others = [
            module
            for module in self._modules
            if not isinstance(module, nn.MultiheadAttention)
            and (calls_sdpa(module) or calls_softmax(module) or not uses_interface(module))
        ]
        undo.append(patch_interface())
        if self._generated is not None:
            undo.extend(generate.patch_generate(self._model))
        if multihead:
            undo.extend(patch_multihead(multihead))
        if others:
            undo.extend(patch_sdpa(others, self._model))
            registry.count_sdpa(1)
            undo.append(lambda: registry.count_sdpa(-1))
        self._label(self._modules, undo)
        registry.add(self)

    def wants(self, module: nn.Module) -> bool:
        """Whether a call of this module is handed on now."""
        return self._enabled and self._names.get(id(module), None) not in (None, *self.problems)

    def unreadable_reason(self, module: nn.Module) -> str | None:
        """Why the softmax of this module's attention function is to be observed; None where it is not."""
        return self._unreadable.get(self._names.get(id(module), ""))

    def receive(
        self, module: nn.Module, read: Callable[[], CapturedCall], *, may_observe: bool = False
    ) -> None:
        """Hand one call to the listener; arguments as for :func:`lightning_qk.capture.registry.deliver`."""
        name = self._names[id(module)]
        if self._is_generated(name) or (may_observe and name in self._unreadable):
            return
        with self._keeping_problems(name):
            try:
                call = read()
                before = self._implementations.setdefault(name, call.implementation)
                if call.implementation != before:
                    raise UnsupportedCallError(
                        f"its attention implementation changed from {before!r} to {call.implementation!r} during "
                        "training: keep one from the start to have it measured"
                    )
                self._listener(name, call)
                self.seen.add(name)
            except UnreadableFunctionError as error:
                if not may_observe:
                    raise
                self._unreadable[name] = str(error)
                self._implementations.pop(name)
