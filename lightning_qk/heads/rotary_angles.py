"""What a model gives its attention layers for the angles of positions."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_qk.heads.probing import copy_with

_HOLDS_ANGLES = re.compile(r"rotary|rope(?![a-z])|sinusoidal|position(al)?_?encoder", re.IGNORECASE)
TAKES_ANGLES = re.compile(
    r"^(rotary|rope|freqs?|sinusoidal_pos)|(^|_)position_embeddings(_k)?$|^(cos|sin)$", re.IGNORECASE
)
_NAMED_ATTENTION = re.compile(r"attention$|attn$", re.IGNORECASE)
# Positions that are probed are below it, and no width is a multiple of it that is likely.
_COUNTED = 11


class Angles:
    """Stands for angles that are not known: may be handed on, unpacked and indexed."""

    def __iter__(self) -> Iterator["Angles"]:
        return iter((Angles(), Angles()))

    def __getitem__(self, index: Any) -> "Angles":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "Angles":
        """Whatever is made of unknown angles is not known."""
        return self


class Source(NamedTuple):
    """Where the angles of a layer come from: a module, or the layer itself (then ``own``)."""

    holder: nn.Module
    layer_type: str | None
    own: bool = False

    def at(self, position: int, tokens: int) -> Any:
        """What the layer is given for that many tokens at one position; None where positions are no numbers.

        Raises:
            Exception: whatever the holder raises.
        """
        if self.own:
            return Angles()
        with torch.no_grad():
            return _run_holder(self, position, tokens)

    @property
    def buffer(self) -> str | None:
        """The holder's 1-D buffer of frequencies for this layer."""
        buffers = dict(self.holder.named_buffers(recurse=False))
        for name in (f"{self.layer_type}_inv_freq", "inv_freq"):
            if name in buffers and buffers[name].dim() == 1:
                return name
        return None


def angle_sources(
    module: nn.Module, parameters: Iterable[str], ancestors: Sequence[nn.Module], config: Any
) -> Iterator[Source]:
    """What may give a layer its angles, the likeliest first.

    Args:
        module: the attention layer.
        parameters: names of its forward's arguments.
        ancestors: the modules that contain it, nearest first.
        config: the nearest configuration, or None.
    """
    takes_angles = any(TAKES_ANGLES.search(name) for name in parameters)
    if not takes_angles:
        held = next((child for name, child in module.named_children() if holds_angles(name, child)), module)
        yield Source(held, None, own=True)
    layer_types = _layer_types(module, ancestors, config)
    for owner in (module, *ancestors):
        for name, child in owner.named_children():
            if child is module or not holds_angles(name, child):
                continue
            kinds = [name.removesuffix("_inv_freq") for name in child._buffers if name.endswith("_inv_freq")]
            kinds = [kind for kind in kinds if not kind.endswith("original")]
            own = [kind for kind in layer_types if kind in kinds]
            if kinds and not own:
                served = getattr(config, "layer_types", None) or ()
                if layer_types and not set(kinds).isdisjoint(served):
                    # It serves layers of other types.
                    continue
                own = kinds
            given: list[str | None] = [*(own or layer_types[:1])] or [None]
            yield from (Source(child, kind) for kind in given)


def holds_angles(name: str, child: nn.Module) -> bool:
    """Whether a child is named as what holds the angles of positions."""
    if _NAMED_ATTENTION.search(type(child).__name__):
        return False
    return bool(_HOLDS_ANGLES.search(name) or _HOLDS_ANGLES.search(type(child).__name__))


def _layer_types(module: nn.Module, ancestors: Sequence[nn.Module], config: Any) -> list[str]:
    """What the layer's own kind may be called, the likeliest first."""
    found = []
    for owner in (module, *ancestors[:1]):
        for name in ("rope_layer_type", "rope_type", "layer_type", "attention_type"):
            value = getattr(owner, name, None)
            if isinstance(value, str):
                found.append(value)
    index, types_ = getattr(module, "layer_idx", None), getattr(config, "layer_types", None)
    if isinstance(index, int) and types_ is not None and index < len(types_):
        found.append(types_[index])
    return found


def _run_holder(source: Source, position: int, tokens: int) -> Any:
    holder = source.holder
    tensors = [*holder.buffers(recurse=False), *holder.parameters(recurse=False)]
    device = tensors[0].device if tensors else torch.device("cpu")
    positions = torch.full((1, tokens), position, device=device)
    if isinstance(holder, nn.Embedding):
        return holder.weight[position].detach().expand(1, 1, tokens, -1)
    # Without the wrapper that changes frequencies with the length of the sequence.
    forward = inspect.unwrap(type(holder).forward)
    names = list(inspect.signature(forward).parameters)[1:]
    copy = copy_with(holder, {})
    if "position_ids" in names:
        known: dict[str, Any] = {"position_ids": positions}
        if "layer_type" in names:
            known["layer_type"] = source.layer_type
        rest = [name for name in names if name not in known and _is_required(forward, name)]
        x = torch.zeros(1, 1, 1, device=device)
        try:
            given = forward(copy, *(x for _ in rest), **known)
        except Exception:
            # Text among images and videos has three equal coordinates, which the layer chooses from.
            given = forward(copy, *(x for _ in rest), **{**known, "position_ids": positions.expand(3, 1, -1)})
            if any(part.dim() != 4 or part.shape[0] != 3 for part in given):
                raise
        parts = given if isinstance(given, tuple) else (given,)
        # One row a token: not so where positions have several coordinates.
        return given if all(part.dim() >= 2 and part.shape[-2] == tokens for part in parts) else None
    if names[:1] == ["hidden_states"] and len(names) == 1:
        # It counts tokens itself.
        copy.__dict__.pop("cached_sequence_length", None)
        copy.__dict__["cached_sequence_length"] = None
        rows = _COUNTED
        given = forward(copy, torch.zeros(1, rows, 1, device=device))
        (axis,) = (axis for axis, size in enumerate(given.shape) if size == rows)
        shape = list(given.shape)
        shape[axis] = tokens
        return given.select(axis, position).unsqueeze(axis).expand(shape)
    return None


def _is_required(function: Callable[..., Any], name: str) -> bool:
    return inspect.signature(function).parameters[name].default is inspect.Parameter.empty
