"""Ways to call an attention layer alone: what its forward may want, guessed by names and shapes."""

import copy
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import device_of


class Trial(NamedTuple):
    """One way to call a layer.

    Attributes:
        given: its inputs by argument name.
        arguments: the others by name.
        config: what the copy gets for a configuration; None for the module's own.
        positional: names of those that are passed by position, in order.
        rest: what is passed by position behind them.
        wider: the same way to call it with another number of tokens.
        is_recorded: it was made from a call that the layer really got.
        tokens: how many tokens a sequence of the queries' input has, or None.
    """

    given: dict[str, Tensor]
    arguments: dict[str, Any]
    config: Any
    positional: tuple[str, ...] = ()
    rest: tuple[Any, ...] = ()
    wider: "Trial | None" = None
    is_recorded: bool = False
    tokens: int | None = None

    def call(self, module: nn.Module) -> Any:
        """Call a module in this way, on copies of its inputs: it may write into them."""
        named = {**self.arguments, **self.mapped(Tensor.clone).given}
        first = [named.pop(name) for name in self.positional]
        return module(*first, *self.rest, **named)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Trial":
        """The same call on changed inputs; what was one tensor stays one."""
        distinct = {id(own): own for own in self.given.values()}
        changed = {key: change(own) for key, own in distinct.items()}
        return self._replace(given={name: changed[id(own)] for name, own in self.given.items()})

    def drawn(self, seed: int) -> "Trial":
        """The same call on other inputs: random ones with a mean of either sign, which a forward may ask."""
        generator = torch.Generator().manual_seed(seed)
        shift = 0.5 if seed % 2 else -0.5
        return self.mapped(lambda own: (torch.randn(own.shape, generator=generator) + shift).to(own))

    def name_of(self, tensor: Tensor) -> str | None:
        """The argument whose tokens a tensor holds, as they are; None for none."""
        tokens = tensor.flatten(0, -2)
        for name, given in self.given.items():
            for known in (given, given.movedim(1, -1)):
                if known.shape[-1] != tokens.shape[-1]:
                    continue
                known = known.flatten(0, -2)
                if bool((tokens[:, None] == known[None]).all(-1).any(1).all()):
                    return name
        return None


_INPUTS = re.compile(
    r"query|key|value|queries|keys|values|[qkvQKV]|(query|key|value)(_states|_input|s_input)|(queries|keys)_in"
    r"|[qkv]_(in|input|states)|(x|input|inputs)_[qkv]"
)
# Tokens that keys may be computed from instead.
_CROSSED = frozenset({"encoder_hidden_states", "key_value_states", "encoder_states", "memory", "context"})
# Shapes of the input, with None for its width; a single token in the second has position 0, wherever
# positions are counted.
_SHAPES: tuple[tuple[int | None, ...], ...] = (
    (2, 3, None),
    (2, 1, None),
    (3, None),
    (1, 4, 4, None),
    (1, None, 4, 4),
)
# What a shape is changed to, to see what depends on the number of tokens.
_WIDER: dict[tuple[int | None, ...], tuple[int | None, ...]] = {
    (2, 3, None): (2, 5, None),
    (2, 1, None): (2, 3, None),
    (3, None): (5, None),
    (1, None, 4, 4): (1, None, 5, 5),
}
# Arguments that bring no tokens, and those that bring other ones.
_NO_TOKENS = re.compile(
    r"mask|pos|bias|rot|freq|cos|sin|cache|past|len|size|shape|idx|index|head|flag|scale|drop|causal|train|step|seq"
    r"|^(h|w|height|width|layer\w*|n|args|kwargs|return_\w*|output_\w*|need_\w*|use_\w*|is_\w*)$",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    r"(^|_)(context|memory|kv|encoder|enc|cross|source|src|other|cond|y|x2)(_|$)", re.IGNORECASE
)
_ANGLES = ("position_embeddings", "position_embedding", "rotary_pos_emb", "rotary_emb", "freqs_cis", "rope")
# Arguments that are given also where they have a default.
_KNOWN = frozenset(
    {*_ANGLES, "cos", "sin", "position_ids", "alibi", "cu_seqlens", "cache_position", "shared_kv_states"}
)


def trials(module: nn.Module, config: Any, widths: Sequence[int]) -> Iterator[Trial]:
    """Ways to call a layer, likeliest first: masks, widths, shapes, rotations, and tokens of an encoder.

    Args:
        module: the layer.
        config: the nearest configuration, or None.
        widths: that the input may have.
    """
    parameters = _parameters(module)
    for inputs in dict.fromkeys((_input_names(parameters), _required_names(parameters))):
        if inputs:
            yield from _trials(module, parameters, inputs, _plain_attention(config), widths)


def _trials(
    module: nn.Module,
    parameters: list[inspect.Parameter],
    inputs: tuple[str, ...],
    config: Any,
    widths: Sequence[int],
) -> Iterator[Trial]:
    types = (own.dtype for own in module.parameters() if own.is_floating_point() and own.element_size() > 1)
    device, dtype = device_of(module), next(types, torch.float32)
    crossed = [own.name for own in parameters if own.name in _CROSSED and own.name not in inputs]
    forms = _rotations(device, dtype) if any(own.name in _ANGLES for own in parameters) else [None]
    outer_names = [*inputs[1:], *crossed]
    others: list[int | None] = [None, *(widths if outer_names else ())]
    masks = [""]
    if any(own.name == "attention_mask" for own in parameters):
        masks.append("added")
    needed = [own.name for own in parameters if "mask" in own.name.lower() and own.default is own.empty]
    masks += ["ones", "zeros"] if needed else []
    shapes = (_SHAPES[0], *((2, count, None) for count in _token_counts(module)), *_SHAPES[1:])

    def trial(masked: str, width: int, other: int | None, shape: tuple[int | None, ...], form: Any) -> Trial:
        full = tuple(width if size is None else size for size in shape)
        generator = torch.Generator().manual_seed(0)
        given = {name: torch.randn(full, generator=generator).to(device, dtype) for name in inputs}
        if other is not None:
            outer = (*full[:-2], 4, other)
            given.update(
                (name, torch.randn(outer, generator=generator).to(device, dtype)) for name in outer_names
            )
        tokens = full[1] if len(full) == 3 else full[0]
        count = math.prod(full[1:]) // width if len(full) > 2 else full[0]
        arguments = {
            own.name: _argument(own.name, form, full, tokens, device)
            for own in parameters
            if own.name not in given and _is_wanted(own)
        }
        keys = tokens if other is None else 4
        if masked == "added":
            arguments["attention_mask"] = torch.zeros(full[0], 1, tokens, keys, device=device, dtype=dtype)
        elif masked:
            mask = torch.full((tokens, keys), masked == "ones", device=device)
            arguments.update((name, mask) for name in needed)
        more = _WIDER.get(shape)
        wider = None if more is None else trial(masked, width, other, more, form)
        return Trial(given, arguments, config, wider=wider, tokens=count)

    for masked, width, other, shape, form in itertools.product(masks, widths, others, shapes, forms):
        if other is None or len(shape) <= 3:
            yield trial(masked, width, other, shape, form)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """The arguments of a module's forward, behind the module itself."""
    own = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    parameters = list(inspect.signature(type(module).forward if own is None else own).parameters.values())
    return parameters[1:] if own is None else parameters


def _is_named(own: inspect.Parameter) -> bool:
    return own.kind in (own.POSITIONAL_ONLY, own.POSITIONAL_OR_KEYWORD, own.KEYWORD_ONLY)


def input_arguments(module: nn.Module) -> list[str]:
    """Names of the arguments of a layer's forward that may bring tokens, for all that their names say."""
    return [
        own.name
        for own in _parameters(module)
        if _is_named(own)
        and (
            own.name in _CROSSED
            or _INPUTS.fullmatch(own.name)
            or _OTHERS.search(own.name)
            or (own.default is own.empty and not _NO_TOKENS.search(own.name))
        )
    ]


def _token_counts(module: nn.Module) -> list[int]:
    """Numbers of tokens that tables of a layer may be made for, as those of windows are."""
    found = [
        size
        for owner in module.modules()
        for tensor in (*owner._buffers.values(), *owner._parameters.values())
        if tensor is not None and 2 <= tensor.dim() <= 4 and tensor.shape[-1] == tensor.shape[-2]
        for size in tensor.shape[-1:]
    ]
    for name in ("window_size", "win_size", "ws"):
        size = getattr(module, name, None)
        size = size[0] if isinstance(size, list | tuple) and size else size
        if isinstance(size, int) and not isinstance(size, bool):
            found.append(size**2)
    return [size for size in dict.fromkeys(found) if 3 < size <= 256][:4]


def _input_names(parameters: list[inspect.Parameter]) -> tuple[str, ...]:
    """The first argument, and those behind it that are named for queries, keys and values."""
    if not parameters or not _is_named(parameters[0]):
        return ()
    return parameters[0].name, *(
        own.name
        for own in parameters[1:]
        if _INPUTS.fullmatch(own.name) and own.default is own.empty and own.kind is own.POSITIONAL_OR_KEYWORD
    )


def _required_names(parameters: list[inspect.Parameter]) -> tuple[str, ...]:
    """All arguments that a forward cannot go without, but for what is named a mask or a position."""
    return tuple(
        own.name
        for place, own in enumerate(parameters)
        if _is_named(own) and (place == 0 or (own.default is own.empty and not _NO_TOKENS.search(own.name)))
    )


def _is_wanted(own: inspect.Parameter) -> bool:
    is_open = own.kind in (own.VAR_POSITIONAL, own.VAR_KEYWORD)
    return not is_open and (own.name in _KNOWN or own.default is own.empty)


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
    one = torch.ones(1, 1, 1, device=device, dtype=dtype)
    zero = torch.zeros_like(one)
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


def recorded_trials(
    module: nn.Module, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Trial]:
    """Ways to call a layer as it was really called, on tensors of the same shapes.

    What may bring tokens is given random ones, and what was one tensor stays one; rotations are given the angle
    zero; other tensors are copies, and what keeps a state (a cache) is left out.

    Args:
        module: the layer.
        config: the nearest configuration, or None.
        args: arguments that its forward got, by position.
        kwargs: arguments that it got by name.
    """
    parameters = _parameters(module)
    named = dict(kwargs)
    takes = [own for own in parameters if own.kind in (own.POSITIONAL_ONLY, own.POSITIONAL_OR_KEYWORD)]
    positional = tuple(own.name for own in takes[: len(args)])
    named.update(zip(positional, args, strict=False))
    rest = args[len(positional) :]
    only = tuple(own.name for own in takes if own.kind is own.POSITIONAL_ONLY)
    positional = positional if rest else tuple(name for name in positional if name in only)
    defaults = {own.name: own.default for own in parameters}
    for count in (2, None):
        given: dict[str, Tensor] = {}
        arguments: dict[str, Any] = {}
        drawn: dict[tuple[Any, ...], Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        batch = next(
            (own.shape[0] for own in named.values() if isinstance(own, Tensor) and own.dim() > 2), None
        )
        if count is not None and (batch is None or batch <= count):
            continue

        def cut(tensor: Tensor, count: int | None = count, batch: int | None = batch) -> Tensor:
            tensor = tensor.detach()
            is_batch = count is not None and tensor.dim() > 1 and tensor.shape[0] == batch
            return tensor[:count] if is_batch else tensor

        for name, value in named.items():
            if name in _ANGLES or name in ("cos", "sin"):
                arguments[name] = _unturned(name, value)
            elif isinstance(value, Tensor) and _brings_tokens(name, value):
                key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
                if key not in drawn:
                    like = cut(value)
                    drawn[key] = torch.randn(like.shape, generator=generator).to(like)
                given[name] = drawn[key]
            elif isinstance(value, Tensor):
                arguments[name] = cut(value).clone()
            elif _is_number(value):
                arguments[name] = value
            elif defaults.get(name, inspect.Parameter.empty) is inspect.Parameter.empty and name in defaults:
                arguments[name] = copy.deepcopy(value)
        trial = Trial(
            given,
            arguments,
            _plain_attention(config),
            positional=tuple(name for name in positional if name in given or name in arguments),
            rest=tuple(cut(part).clone() if isinstance(part, Tensor) else part for part in rest),
            is_recorded=True,
        )
        yield trial._replace(wider=_shorter(trial))


def _shorter(trial: Trial) -> Trial | None:
    """The same call with fewer tokens, where nothing but its inputs says how many there are."""
    others = [*trial.arguments.values(), *trial.rest]
    if any(isinstance(own, Tensor) for own in others) or any(own.dim() != 3 for own in trial.given.values()):
        return None
    if any(own.shape[1] <= 2 for own in trial.given.values()):
        return None
    return trial.mapped(lambda own: own[:, :-1])


def _brings_tokens(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2 and not _NO_TOKENS.search(name)


def _is_number(value: Any) -> bool:
    """Whether a value is None, a number or a name, or several numbers."""
    if isinstance(value, list | tuple):
        return all(isinstance(part, int | float) for part in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _unturned(name: str, value: Any) -> Any:
    """A rotation by the angle zero in the form of another rotation."""
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(own, Tensor) for own in value):
        turned = torch.ones_like(value[0]), torch.zeros_like(value[1])
        return turned if isinstance(value, tuple) else [*turned]
    if not isinstance(value, Tensor):
        return value
    return torch.ones_like(value) if value.is_complex() or name == "cos" else torch.zeros_like(value)
