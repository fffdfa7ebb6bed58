"""Tells the forwards within transformers' ``generate``, and calls with a cache of keys, from others."""

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_qk.capture.captured import CapturedCall
from lightning_qk.capture.hooks.patch import Patch, patch
from lightning_qk.capture.hooks.softmax import takes_several


class _Thread(threading.local):
    def __init__(self) -> None:
        self.depth = 0


_thread = _Thread()


def is_running() -> bool:
    """Whether this thread is inside a patched ``generate``."""
    return _thread.depth > 0


def patch_generate(model: nn.Module | None) -> Iterator[Callable[[], None]]:
    """Patch ``generate`` of transformers' models; a method of this name in other classes may be part of a loss.

    Args:
        model: whose modules' own methods are patched too, which some models have in place of transformers';
            None: transformers' alone.

    Yields:
        Functions that undo one patch each.
    """
    generation = sys.modules.get("transformers.generation.utils")
    modeling = sys.modules.get("transformers.modeling_utils")
    if generation is None or modeling is None:  # there is no model of theirs
        return
    mixin = generation.GenerationMixin
    kinds: dict[type, None] = {mixin: None}
    for module in () if model is None else model.modules():
        if isinstance(module, mixin | modeling.PreTrainedModel):
            kinds.update(
                (base, None)
                for base in type(module).__mro__
                if isinstance(vars(base).get("generate"), types.FunctionType)
            )
    for kind in kinds:
        yield patch(kind, "generate", _tap)


def _tap(function: Callable[..., Any], own: Patch) -> Callable[..., Any]:
    @functools.wraps(function)
    def tapped_generate(*args: Any, **kwargs: Any) -> Any:
        if not own.active or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        _thread.depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            _thread.depth -= 1

    return tapped_generate


class CachedCalls:
    """Finds calls of self-attention that have keys of tokens before their queries, from a cache.

    Learnt keys and prefixes do not count: every call of a layer has as many of them.
    """

    def __init__(self) -> None:
        self._fewest: dict[str, int] = {}  # keys beyond the queries, over the calls of a layer

    def has(self, name: str, call: CapturedCall) -> bool:
        """Whether this call has a cache; needs to see every call of a layer of self-attention."""
        if takes_several(call):
            return False
        n, m = call.lengths
        extra = max(m - n, 0)
        fewest = self._fewest[name] = min(extra, self._fewest.get(name, extra))
        return extra > fewest
