"""Interception of attention calls: change them, or add to their output."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from lightning_qk.architecture.source_code import uses_interface
from lightning_qk.capture import registry
from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.hooks import compiled
from lightning_qk.capture.hooks.attention_interface import patch_interface
from lightning_qk.capture.registry import Run

# By which torch ends the recomputation of a checkpoint early: no error.
_STOP: tuple[type[BaseException], ...] = tuple(
    own for own in (getattr(torch.utils.checkpoint, "_StopRecomputationError", None),) if own is not None
)

Wrap = Callable[[str, AttentionCall, Run], Any]
"""``wrap(name, call, run) -> output``: makes the call, or one changed by ``call._replace``, with ``run``."""


class AttentionInterceptor:
    """Lets a wrapper make the attention calls of some modules.

    For modules that look their attention function up in transformers' AttentionInterface. What is installed
    last comes last, next to the function, but one that replaces the function comes before all that do not,
    so that those see what is computed in the end; so do monitors. A graph of torch.compile is interrupted at
    each intercepted call.

    Args:
        names: the attention modules, and the name of each.
        wrap: makes a call: see :data:`Wrap`. It returns what the attention function would, the output
            ``(batch, n, heads, d_value)`` first.
        replaces: whether the wrapper exchanges the function. Only one may for each module.
        model: what the modules are part of; compiled again if it was compiled before.
        idle: makes the calls of a module that is left alone; None: as they are.

    Attributes:
        spare: called once with the name of a module whose call could not be intercepted, and why, as a clause
            about it: its calls are left as they are then, this one and all that follow. None: an error is raised.
        left: names of these modules.
        reached: names of the modules with a call that was intercepted.
        modules: module → name.

    Raises:
        ValueError: a module that does not look its function up there, or one that is replaced already; during
            a forward, a call that cannot be read. All name the layer.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        wrap: Wrap,
        *,
        replaces: bool = False,
        model: nn.Module | None = None,
        idle: Wrap | None = None,
    ) -> None:
        check_interface(names)
        self._idle = idle
        self.spare: Callable[[str, str], None] | None = None
        self.left: set[str] = set()
        self.modules = dict(names)
        self._names = {id(module): name for module, name in names.items()}
        self._wrap = wrap
        self._model = model
        self._undo: Callable[[], None] | None = None
        self.replaces = replaces
        self.reached: set[str] = set()

    def install(self) -> None:
        """Start to intercept."""
        if self._undo is not None:
            return
        registry.add_interceptor(self, self.modules)
        compiled.drop_graphs(self._model)
        self._undo = patch_interface()

    def remove(self) -> None:
        """Leave everything as it was before :meth:`install`."""
        registry.discard_interceptor(self)
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
            compiled.drop_graphs(self._model)

    def __enter__(self) -> "AttentionInterceptor":
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def wants(self, module: nn.Module) -> bool:
        """Whether calls of this module are intercepted."""
        return id(module) in self._names

    def intercept(self, call: AttentionCall, run: Run) -> Any:
        """Let the wrapper make one call."""
        name = self._names[id(call.module)]
        self.reached.add(name)
        if name not in self.left:
            try:
                return self._wrap(name, call, run)
            except UnsupportedCallError as error:
                self.refuse(call.module, str(error))
            except Exception as error:
                if not self.tolerates(name, error):
                    raise
        return run(call) if self._idle is None else self._idle(name, call, run)

    def refuse(self, module: nn.Module, reason: str) -> None:
        """A call of this module cannot be intercepted: leave the module alone, or raise without :attr:`spare`."""
        name = self._names[id(module)]
        if self.spare is None:
            raise ValueError(f"{name} cannot be intercepted: {reason}")
        self._leave(name, reason)

    def tolerates(self, name: str, error: Exception) -> bool:
        """Leave a module alone whose call raised; False where the error is to be raised instead."""
        if self.spare is None or isinstance(error, _STOP):
            return False
        self._leave(name, f"its attention call failed ({type(error).__name__}: {error})")
        return True

    def _leave(self, name: str, reason: str) -> None:
        if name not in self.left and self.spare is not None:
            self.left.add(name)
            self.spare(name, reason)


def check_interface(names: Mapping[nn.Module, str]) -> None:
    """Refuse layers whose calls cannot be intercepted.

    Raises:
        ValueError: naming them.
    """
    has_interface = "transformers.modeling_utils" in sys.modules
    outside = {
        name: type(module).__name__
        for module, name in names.items()
        if not (has_interface and uses_interface(module))
    }
    if outside:
        kinds = ", ".join(sorted(set(outside.values())))
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        raise ValueError(
            "expected attention layers that call their function through transformers' AttentionInterface, got "
            f"{', '.join(list(outside)[:3])}{more} ({kinds}), which compute attention themselves: leave them out "
            "with modules="
        )
