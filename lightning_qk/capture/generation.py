"""Tell the forwards of transformers' ``generate``, and calls with a cache of keys, from others."""

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_qk.capture.captured import CapturedCall
from lightning_qk.capture.patches import Stand, stand_in
from lightning_qk.capture.softmax import takes_several


class _Thread(threading.local):
    def __init__(self) -> None:
        self.depth = 0


_thread = _Thread()


def is_running() -> bool:
    """Whether this thread is inside a ``generate`` at which somebody stands."""
    return _thread.depth > 0


def stand_at_generate(model: nn.Module | None) -> Iterator[Callable[[], None]]:
    """Stand before ``generate`` of transformers' models.

    A method of this name in any other class is none of them: it may well be what a loss is made of.

    Args:
        model: its modules' own methods are known too, which some models have in the place of transformers'; None:
            transformers' alone.

    Yields:
        What puts back one of the replaced methods.
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
        yield stand_in(kind, "generate", _tap)


def _tap(function: Callable[..., Any], stand: Stand) -> Callable[..., Any]:
    @functools.wraps(function)
    def tapped_generate(*args: Any, **kwargs: Any) -> Any:
        if not stand.active or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        _thread.depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            _thread.depth -= 1

    return tapped_generate


class CachedCalls:
    """Tells the calls of self-attention that have keys of tokens before their queries, from a cache.

    Learnt keys and prefixes, of which every call of a layer has as many, are none.
    """

    def __init__(self) -> None:
        # The least number of keys beyond the queries that calls of a layer had.
        self._least: dict[str, int] = {}

    def has(self, name: str, call: CapturedCall) -> bool:
        """Whether this call is one; to be asked of every call of a layer of self-attention."""
        if takes_several(call):
            return False
        n, m = call.lengths
        more = max(m - n, 0)
        least = self._least[name] = min(more, self._least.get(name, more))
        return more > least
