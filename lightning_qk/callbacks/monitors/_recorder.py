"""Remember what a module's transformers models were called with."""

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn

from lightning_qk.capture.hooks.modules import Handle, hook_before

# How an output is to be returned, which a probe decides itself.
_OF_OUTPUT = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep")


def models_and_doors(module: nn.Module) -> dict[nn.Module, nn.Module | None]:
    """The outermost transformers models, and where a hook can stand that sees their calls.

    That is the model, or the module of ``torch.compile`` around it: a hook inside a graph would be traced. None
    where the model is called from inside a graph only.

    Args:
        module: what to search, such as a LightningModule.
    """
    found: dict[nn.Module, nn.Module | None] = {}
    # Lightning keeps a compiled LightningModule's steps as graphs.
    _search(module, getattr(module, "_compiler_ctx", None) is None, None, found)
    return found


def _search(
    module: nn.Module, is_open: bool, around: nn.Module | None, found: dict[nn.Module, nn.Module | None]
) -> None:
    inner = getattr(module, "_orig_mod", None)
    if isinstance(inner, nn.Module):  # the module of torch.compile
        _search(inner, is_open, module, found)
        return
    is_open = is_open and getattr(module, "_compiled_call_impl", None) is None
    if isinstance(module, transformers.PreTrainedModel):
        # Not by truth: modules may have a length.
        door = None if not is_open else module if around is None else around
        if found.get(module) is None:
            found[module] = door
        return
    for child in module.children():
        _search(child, is_open and around is None, None, found)


class CallRecorder:
    """Keeps the arguments of the first call of each model in each of some batches.

    Args:
        doors: model → where its calls are seen, see :func:`models_and_doors`.
    """

    def __init__(self, doors: Mapping[nn.Module, nn.Module | None]) -> None:
        self.models = models = list(doors)
        self._doors = list(doors.values())
        self.calls: dict[int, list[dict[str, Any]]] = {index: [] for index in range(len(models))}
        self._waiting: set[int] = set()
        self._handles: list[Handle] = []

    def install(self) -> None:
        """Hook the models' forward."""
        for index, door in enumerate(self._doors):
            if door is None:
                continue

            def remember(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index
            ) -> None:
                self._remember(index, args, kwargs)

            self._handles.append(hook_before(door, remember))

    def listen(self, is_on: bool) -> None:
        """Keep the next call of each model, or none."""
        self._waiting = set(range(len(self.models))) if is_on else set()

    def remove(self) -> None:
        """Stand no more before the models' forward; the calls are kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._waiting = set()

    def clear(self) -> None:
        """Forget the calls."""
        for calls in self.calls.values():
            calls.clear()

    def _remember(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if index not in self._waiting:
            return
        cache = kwargs.get("past_key_values")
        if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length()):
            return  # a later step of generation, whose queries are few
        self._waiting.discard(index)
        named = dict(zip(inspect.signature(self.models[index].forward).parameters, args, strict=False))
        named.update(kwargs)
        self.calls[index].append(
            {
                # A copy: the batch is the user's, who may go on to change it.
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in named.items()
                if value is not None
                and name not in _OF_OUTPUT
                and name not in ("past_key_values", "cache_position")
            }
        )
