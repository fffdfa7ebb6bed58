"""Ways to call an attention layer alone: what its forward may want, guessed by names and shapes."""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Trial(NamedTuple):
    """One way to call a layer.

    Attributes:
        given: its inputs by argument name.
        arguments: the others by name.
        config: what the copy gets for a configuration; None for the module's own.
    """

    given: dict[str, Tensor]
    arguments: dict[str, Any]
    config: Any


_INPUTS = frozenset({"query", "key", "value", "q", "k", "v", "keys", "values", "queries"})
# Tokens that keys may be made of instead.
_CROSSED = frozenset({"encoder_hidden_states", "key_value_states", "encoder_states", "memory", "context"})
# Shapes of the input, with None for its width; a single token in the second stands at position 0, wherever
# positions are counted.
_SHAPES: tuple[tuple[int | None, ...], ...] = (
    (2, 3, None),
    (2, 1, None),
    (3, None),
    (1, 4, 4, None),
    (1, None, 4, 4),
)
_ANGLES = ("position_embeddings", "position_embedding", "rotary_pos_emb", "rotary_emb", "freqs_cis", "rope")
# Arguments that are given also where they have a default.
_KNOWN = frozenset(
    {*_ANGLES, "cos", "sin", "position_ids", "alibi", "cu_seqlens", "cache_position", "shared_kv_states"}
)


def trials(module: nn.Module, config: Any, widths: Sequence[int], device: torch.device) -> Iterator[Trial]:
    """Ways to call a layer, likeliest first: masks, widths, shapes, rotations, and tokens of an encoder.

    Args:
        module: the layer.
        config: the nearest configuration, or None.
        widths: that the input may have.
        device: of the weights.
    """
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    dtype = _dtype(module)
    inputs = _input_names(parameters)
    crossed = [own.name for own in parameters if own.name in _CROSSED and own.name not in inputs]
    forms = _rotations(device, dtype) if any(own.name in _ANGLES for own in parameters) else [None]
    others: list[int | None] = [None, *(widths if crossed else ())]
    masks = [False, True] if any(own.name == "attention_mask" for own in parameters) else [False]
    for masked, width, other, shape, form in itertools.product(masks, widths, others, _SHAPES, forms):
        if not inputs or (other is not None and len(shape) > 3):
            continue
        full = tuple(width if size is None else size for size in shape)
        generator = torch.Generator().manual_seed(0)
        given = {name: torch.randn(full, generator=generator).to(device, dtype) for name in inputs}
        if other is not None:
            outer = (*full[:-2], 4, other)
            given.update(
                (name, torch.randn(outer, generator=generator).to(device, dtype)) for name in crossed
            )
        tokens = full[1] if len(full) == 3 else full[0]
        arguments = {
            own.name: _argument(own.name, form, full, tokens, device)
            for own in parameters
            if own.name not in given and _is_wanted(own)
        }
        if masked:
            keys = tokens if other is None else 4
            arguments["attention_mask"] = torch.zeros(full[0], 1, tokens, keys, device=device, dtype=dtype)
        yield Trial(given, arguments, _plain_attention(config))


def _input_names(parameters: list[inspect.Parameter]) -> list[str]:
    if not parameters:
        return []
    first = parameters[0].name
    others = [
        own.name
        for own in parameters[1:]
        if own.name in _INPUTS and own.default is own.empty and own.kind is own.POSITIONAL_OR_KEYWORD
    ]
    return [first, *others]


def _is_wanted(parameter: inspect.Parameter) -> bool:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return False
    return parameter.name in _KNOWN or parameter.default is parameter.empty


def _argument(name: str, form: Any, shape: tuple[int, ...], tokens: int, device: torch.device) -> Any:
    """What is given for an argument: rotations by nothing, no mask, no cache."""
    if name in _ANGLES:
        return form
    if name in ("cos", "sin"):
        return torch.full((1, 1, 1), 1.0 if name == "cos" else 0.0, device=device)
    if name == "position_ids":
        return torch.zeros(shape[0], tokens, dtype=torch.long, device=device)
    if name == "cache_position":
        return torch.zeros(tokens, dtype=torch.long, device=device)
    if name == "alibi":
        return torch.zeros(1, 1, 1, device=device)
    if name == "cu_seqlens":
        return torch.tensor([0, tokens], dtype=torch.int32, device=device)
    if name == "shared_kv_states":
        return {}
    if name == "residual":
        return torch.zeros(shape, device=device)
    return None


def _rotations(device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Rotations by the angle zero, in the forms that models take: cos and sin, complex numbers, angles, none."""
    one, zero = (
        torch.ones(1, 1, 1, device=device, dtype=dtype),
        torch.zeros(1, 1, 1, device=device, dtype=dtype),
    )
    wide = tuple(part.expand(1, 1, 2).contiguous() for part in (one, zero))
    flat = tuple(part[0] for part in (one, zero))
    unit = torch.ones(1, 1, 1, device=device, dtype=torch.complex64)
    return [(one, zero), flat, wide, unit, None]


class _Eager:
    """A configuration whose attention is computed by functions that can be followed."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return "eager" if name == "_attn_implementation" else getattr(self._config, name)


def _plain_attention(config: Any) -> Any:
    implementation = getattr(config, "_attn_implementation", None)
    return None if implementation in (None, "eager", "sdpa") else _Eager(config)


def _dtype(module: nn.Module) -> torch.dtype:
    for tensor in module.parameters():
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor.dtype
    return torch.float32
