"""The rotation that an attention layer applies, found in the model's own rotary module."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.functional.rotary import Rotary
from lightning_qk.heads.probing import Stop, Through, run_copy


def read_rotary(module: nn.Module, ancestors: Sequence[nn.Module], config: Any, d_head: int) -> Rotary | None:
    """Find the frequencies and the pairing that a layer rotates with.

    A layer rotates if its forward calls a function named like ``apply_rotary_pos_emb`` and, run on a copy,
    comes to use the angles that it is given: some models rotate in some of their layers only. The pairing is
    found by calling that function on one coordinate. The frequencies are the live buffer of the nearest
    rotary module among the layer's ancestors, of the layer's own type where a model has several.

    Args:
        module: the attention layer.
        ancestors: the modules that contain it, nearest first.
        config: the nearest configuration, or None.
        d_head: width of a head.

    Returns:
        The rotation, or None where the layer does not rotate, or not by one position in a sequence (images).
    """
    apply = _rotary_function(module)
    if apply is None:
        return None
    inv_freq = _frequencies(module, ancestors, _layer_type(module, ancestors, config))
    if inv_freq is None or 2 * inv_freq.numel() not in _rotated_widths(module, config, d_head):
        return None
    pairing = _pairing(apply, d_head, 2 * inv_freq.numel())
    if pairing is None or not _uses_angles(module, config):
        return None
    return Rotary(-inv_freq if pairing.backward else inv_freq, pairing.interleaved)


class _Pairing(NamedTuple):
    """Which coordinates turn together, and whether by the angle or by its opposite."""

    interleaved: bool
    backward: bool


class _AnglesUsed(Exception):
    """The forward touched the angles."""


class _Angles(tuple[Any, ...]):
    """Stands for (cos, sin), or for one tensor of angles; whatever is done with it but unpacking raises."""

    def __getattr__(self, name: str) -> Any:
        raise _AnglesUsed

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _AnglesUsed


class _UntilDispatch:
    """A configuration that ends the run where attention is dispatched."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation":
            raise Stop
        return getattr(self._config, name)


class _Zeros(nn.Module):
    """Stands for a projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


def _uses_angles(module: nn.Module, config: Any) -> bool:
    """Whether the forward uses its ``position_embeddings``; True where a run does not tell."""
    if "position_embeddings" not in inspect.signature(type(module).forward).parameters:
        return True
    stand_ins: dict[str, nn.Module | None] = dict(module._modules)
    width = 0
    for name, child in module.named_children():
        stand_ins[name] = Through()
        if isinstance(child, nn.Linear):
            stand_ins[name] = _Zeros(child.out_features)
            width = width or child.in_features
    # Nested, since cos and sin are unpacked and used apart.
    angles = _Angles((_Angles(), _Angles()))
    try:
        given = torch.zeros(1, 2, width)
        run_copy(module, stand_ins, given, config=_UntilDispatch(config), position_embeddings=angles)
    except Stop:
        return False
    except Exception:
        return True
    return True


def _rotary_function(module: nn.Module) -> Callable[..., Any] | None:
    forward = type(module).forward
    # Decorators hide the function that names what it calls.
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    for name in code.co_names if code is not None else ():
        if name.startswith("apply_") and "rotary" in name and "vision" not in name:
            found = forward.__globals__.get(name)
            if callable(found):
                return found
    return None


def _layer_type(module: nn.Module, ancestors: Sequence[nn.Module], config: Any) -> str | None:
    for owner in (module, *ancestors[:1]):
        for name in ("layer_type", "attention_type"):
            value = getattr(owner, name, None)
            if isinstance(value, str):
                return value
    index, types = getattr(module, "layer_idx", None), getattr(config, "layer_types", None)
    if isinstance(index, int) and types is not None and index < len(types):
        return types[index]
    return None


def _frequencies(module: nn.Module, ancestors: Sequence[nn.Module], layer_type: str | None) -> Tensor | None:
    """The 1-D ``inv_freq`` buffer that is nearest to the layer and of its type."""
    for owner in (module, *ancestors):
        holders = [child for name, child in owner.named_children() if "rotary" in name or "rope" in name]
        for holder in holders:
            buffers = dict(holder.named_buffers(recurse=False))
            found = buffers.get(f"{layer_type}_inv_freq", buffers.get("inv_freq"))
            if found is not None and found.dim() == 1:
                return found
    return None


def _rotated_widths(module: nn.Module, config: Any, d_head: int) -> set[int]:
    """The widths that a rotation of sequence positions can have in this layer."""
    widths = {d_head}
    for name in ("rotary_ndims", "rotary_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            widths.add(value)
    parameters = getattr(config, "rope_parameters", None) or {}
    for holder in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        share = holder.get("partial_rotary_factor")
        if share is not None:
            # An odd width still takes a last pair.
            widths.add(2 * math.ceil(int(d_head * share) / 2))
    return widths


@lru_cache(maxsize=256)
def _pairing(apply: Callable[..., Any], d_head: int, rotated: int) -> _Pairing | None:
    """Turn the first coordinate by a quarter and see where it goes; None where that does not tell."""
    probe = torch.zeros(1, 1, 1, d_head)
    probe[..., 0] = 1
    # Some functions rotate the first coordinates of a head, others take just the part to rotate.
    for part in (probe, probe[..., :rotated]):
        try:
            with torch.no_grad():
                turned = apply(**_quarter_turn(apply, part, rotated))
        except Exception:
            continue
        turned = (turned if isinstance(turned, Tensor) else turned[0]).flatten()
        for interleaved, partner in ((False, rotated // 2), (True, 1)):
            if abs(turned[partner]) == 1:
                return _Pairing(interleaved, backward=bool(turned[partner] < 0))
    return None


def _quarter_turn(apply: Callable[..., Any], part: Tensor, rotated: int) -> dict[str, Any]:
    """Arguments that turn q, and k where there is one, by a quarter: cos and sin, or complex angles."""
    names = list(inspect.signature(apply).parameters)
    if "sin" not in names:
        return {**dict.fromkeys(names[:2], part), names[2]: torch.full((1, 1, rotated // 2), 1j)}
    angles = {"cos": torch.zeros(1, 1, rotated), "sin": torch.ones(1, 1, rotated)}
    return {name: angles.get(name, part) for name in names[: names.index("sin") + 1]}
