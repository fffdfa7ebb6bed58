"""Run an attention layer up to its call of a rotary function, with the angles that its model gives it.

The forward runs on a copy whose projections give zeros, with the angles that the model's own rotary module gives
for one position.
"""

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import Stop, Through, device_of, shadow
from lightning_qk.architecture.source_code import names_in
from lightning_qk.heads.sites import AttentionLayer

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
        """Results of unknown angles are unknown."""
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


def holds_angles(name: str, child: nn.Module) -> bool:
    """Whether a child is named as what holds the angles of positions."""
    if _NAMED_ATTENTION.search(type(child).__name__):
        return False
    return bool(_HOLDS_ANGLES.search(name) or _HOLDS_ANGLES.search(type(child).__name__))


def _run_holder(source: Source, position: int, tokens: int) -> Any:
    holder = source.holder
    device = device_of(holder)
    positions = torch.full((1, tokens), position, device=device)
    if isinstance(holder, nn.Embedding):
        return holder.weight[position].detach().expand(1, 1, tokens, -1)
    # Without the wrapper that changes frequencies with the length of the sequence.
    forward = inspect.unwrap(type(holder).forward)
    names = list(inspect.signature(forward).parameters)[1:]
    copy = shadow(holder)
    if "position_ids" in names:
        known: dict[str, Any] = {"position_ids": positions}
        if "layer_type" in names:
            known["layer_type"] = source.layer_type
        arguments = inspect.signature(forward).parameters
        rest = [
            own for own in names if own not in known and arguments[own].default is inspect.Parameter.empty
        ]
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
        copy.__dict__["cached_sequence_length"] = None
        rows = _COUNTED
        given = forward(copy, torch.zeros(1, rows, 1, device=device))
        (axis,) = (axis for axis, size in enumerate(given.shape) if size == rows)
        shape = list(given.shape)
        shape[axis] = tokens
        return given.select(axis, position).unsqueeze(axis).expand(shape)
    return None


_NAMED_ROTARY = re.compile(r"rotary|rope(?![a-z])|rotate_(quer|key)", re.IGNORECASE)
# Arguments by which layers take tokens other than the first.
_TAKES_TOKENS = frozenset(
    {"query", "key", "value", "hidden_states", "query_states", "key_states", "value_states"}
)
_TAKES_OTHERS = frozenset({"key_value_states", "encoder_hidden_states", "cross_attention_states", "context"})


def tokens_for(d_head: int) -> int:
    """How many tokens layers are run on.

    At least one for each coordinate of a head; more than an image has axes, and hardly a number of heads or a
    width, so that tokens are distinguished from other dimensions.
    """
    return max(d_head + 1 + d_head % 2, 5)


class _Called(Exception):
    """The forward called a rotary function."""

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(name)
        self.call = name, args, kwargs


class _ByType(tuple[Any, ...]):
    """Angles that a layer may ask for by its type, as where the model hands the angles of all types on."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, str) else super().__getitem__(index)


class _UntilDispatch:
    """A configuration that ends the run where attention is dispatched."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation":
            raise Stop
        return getattr(self._config, name)


class _ModuleStub(nn.Module):
    """Stands for a rotary module that turns queries and keys itself."""

    def __init__(self, name: str, position: int) -> None:
        super().__init__()
        self.name = name
        self.position = position

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Called(self.name, args, {**kwargs, "position": self.position})


class _AtPosition:
    """A module that turns queries and keys by counting tokens, as a function of one position for all."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Tensor, position: int) -> tuple[Tensor, ...]:
        turned = shadow(self.module)(*(_behind_others(x, position) for x in args))
        lasts = [
            part[..., -1, :].unflatten(0, (-1, x.shape[0])) for part, x in zip(turned, args, strict=True)
        ]
        return tuple(last.movedim(0, -2) for last in lasts)


def _behind_others(x: Tensor, count: int) -> Tensor:
    """Each token of (batch, ..., n, d) as the last of a sequence of its own, (n * batch, ..., count + 1, d)."""
    alone = x.movedim(-2, 0).flatten(0, 1).unsqueeze(-2)
    return torch.cat([torch.zeros_like(alone)] * count + [alone], dim=-2)


def _turns_itself(child: nn.Module) -> bool:
    """Whether a rotary module takes a query and a key, and no positions."""
    names = list(inspect.signature(type(child).forward).parameters)[1:]
    return len(names) == 2 and re.match("q", names[0]) is not None and re.match("k", names[1]) is not None


class _Zeros(nn.Module):
    """Stands for a projection."""

    def __init__(self, width: int, ran: list[bool]) -> None:
        super().__init__()
        self.width = width
        self.ran = ran

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(x, Angles):
            # A projection of positions, as in relative products: nothing is turned by them.
            raise Stop
        self.ran.append(True)
        return x.new_zeros(*x.shape[:-1], self.width)


class Call(NamedTuple):
    """A call of a rotary function.

    Attributes:
        name: of the function.
        args: its arguments.
        kwargs: its arguments by name.
        turned: where among both those stand that it turns, the query first.
        before_projections: it turns the layer's input.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    turned: tuple[int | str, ...]
    before_projections: bool

    @property
    def query(self) -> Tensor:
        """The first tensor that is turned."""
        return self.get(self.turned[0])

    @property
    def width(self) -> int:
        """How many coordinates the function is given."""
        return self.query.shape[-1]

    @property
    def place(self) -> int:
        """Where the part that is turned begins in what the projection gave."""
        return int(self.query.storage_offset())

    def get(self, where: int | str) -> Tensor:
        """An argument by its place or name."""
        return self.args[where] if isinstance(where, int) else self.kwargs[where]


class RotaryRun:
    """Runs an attention layer up to where it rotates.

    Args:
        layer: in its model.
        tokens: on how many it is run.

    Attributes:
        parameters: arguments of its forward.
        functions: rotary functions that it calls, by name.
    """

    def __init__(self, layer: AttentionLayer, tokens: int) -> None:
        self.module, self.ancestors, self.config = layer.module, layer.ancestors, layer.config
        self.is_cross = layer.is_cross or getattr(layer.module, "is_cross_attention", None) is True
        self.tokens = tokens
        module = layer.module
        forward = inspect.unwrap(type(module).forward)
        self.parameters = inspect.signature(forward).parameters
        self.functions: dict[str, Callable[..., Any]] = {
            name: _AtPosition(child)
            for name, child in module.named_children()
            if holds_angles(name, child) and _turns_itself(child)
        }
        self._methods: dict[str, types.FunctionType] = {}
        self._forward = forward
        if isinstance(forward, types.FunctionType):
            self._collect(forward, depth=2)

    def _collect(self, function: types.FunctionType, depth: int) -> None:
        """Find the rotary functions that a function calls, or that methods which it calls do."""
        for name in names_in(function.__code__):
            found = function.__globals__.get(name)
            if isinstance(found, types.FunctionType) and _is_rotary(name, found, 0):
                self.functions.setdefault(name, found)
                continue
            attribute = inspect.getattr_static(type(self.module), name, None)
            is_static = isinstance(attribute, staticmethod)
            method = attribute.__func__ if is_static else attribute
            if not isinstance(method, types.FunctionType) or hasattr(nn.Module, name):
                continue
            if _is_rotary(name, method, 0 if is_static else 1):
                self.functions.setdefault(name, getattr(self.module, name))
            elif depth and name not in self._methods:
                self._methods[name] = method
                self._collect(method, depth - 1)

    def angle_sources(self) -> Iterator[Source]:
        """What may give the layer its angles, the likeliest first."""
        module = self.module
        if not any(TAKES_ANGLES.search(name) for name in self.parameters):
            children = module.named_children()
            yield Source(
                next((own for name, own in children if holds_angles(name, own)), module), None, own=True
            )
        layer_types = self._layer_types()
        for owner in (module, *self.ancestors):
            for name, child in owner.named_children():
                if child is module or not holds_angles(name, child):
                    continue
                kinds = [
                    name.removesuffix("_inv_freq") for name in child._buffers if name.endswith("_inv_freq")
                ]
                kinds = [kind for kind in kinds if not kind.endswith("original")]
                own = [kind for kind in layer_types if kind in kinds]
                if kinds and not own:
                    served = getattr(self.config, "layer_types", None) or ()
                    if layer_types and not set(kinds).isdisjoint(served):
                        # It serves layers of other types.
                        continue
                    own = kinds
                given: list[str | None] = [*(own or layer_types[:1])] or [None]
                yield from (Source(child, kind) for kind in given)

    def _layer_types(self) -> list[str]:
        """What the layer's own kind may be called, the likeliest first."""
        found = []
        for owner in (self.module, *self.ancestors[:1]):
            for name in ("rope_layer_type", "rope_type", "layer_type", "attention_type"):
                value = getattr(owner, name, None)
                if isinstance(value, str):
                    found.append(value)
        index, types_ = getattr(self.module, "layer_idx", None), getattr(self.config, "layer_types", None)
        if isinstance(index, int) and types_ is not None and index < len(types_):
            found.append(types_[index])
        return found

    def call(self, position: int, angles: Any) -> Call | None:
        """Run to the first call of a rotary function; None where the forward does without.

        Args:
            position: of all tokens.
            angles: what the model gives the layer for it.

        Raises:
            Exception: whatever the forward raises before.
        """
        stubs = {name: _stub(name) for name in self.functions if name not in self.module._modules}
        ran: list[bool] = []
        stand_ins, width, device = self._stand_ins(ran, position)
        copy = shadow(self.module, stand_ins=stand_ins)
        space: dict[str, Any] = dict(stubs)
        for name, method in self._methods.items():
            is_static = isinstance(inspect.getattr_static(type(self.module), name), staticmethod)
            patched = _patched(method, stubs)
            space[name] = patched if is_static else types.MethodType(patched, copy)
        if getattr(self.module, "config", None) is not None:
            space["config"] = _UntilDispatch(self.config)
        copy.__dict__.update(space)
        given = torch.zeros(1, self.tokens, width, device=device)
        known: dict[str, Any] = {}
        for argument in list(self.parameters.values())[2:]:
            if argument.kind not in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY):
                continue
            if TAKES_ANGLES.search(argument.name) and angles is not None:
                known[argument.name] = _ByType(angles) if isinstance(angles, tuple) else angles
            elif argument.name in ("position_ids", "cache_position"):
                known[argument.name] = torch.full((1, self.tokens), position, device=device)
            elif self.is_cross and argument.name in _TAKES_OTHERS:
                known[argument.name] = given
            elif argument.default is argument.empty:
                known[argument.name] = given if argument.name in _TAKES_TOKENS | _TAKES_OTHERS else None
        try:
            with torch.no_grad():
                _patched(self._forward, stubs)(copy, given, **known)
        except Stop:
            return None
        except _Called as called:
            name, args, kwargs = called.call
        else:
            return None
        given_all: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        turned = tuple(key for key, value in given_all if _is_blank(value))
        return Call(name, args, kwargs, turned, before_projections=not ran)

    def is_left_out(self) -> bool:
        """Whether the model gives angles to some of its layers only, and not to this one.

        The layer then does without angles, and its configuration has a list by layers, named for them, that
        is zero, false or None where a layer gets none.
        """
        index = getattr(self.module, "layer_idx", None)
        if not isinstance(index, int):
            return False
        lists = [
            value
            for name, value in getattr(self.config, "__dict__", {}).items()
            if "rope" in name and isinstance(value, list | tuple) and index < len(value)
        ]
        if all(value[index] for value in lists):
            return False
        try:
            return self.call(1, None) is None
        except Exception:
            return False

    def _stand_ins(
        self, ran: list[bool], position: int
    ) -> tuple[dict[nn.Module, nn.Module], int, torch.device]:
        """What replaces the children, the width of the layer's input, and its device."""
        stand_ins: dict[nn.Module, nn.Module] = {}
        width = 0
        for name, child in self.module.named_children():
            sizes = _projection_sizes(child)
            if name in self.functions:
                stand_ins[child] = _ModuleStub(name, position)
            elif holds_angles(name, child):
                continue
            elif sizes is not None:
                stand_ins[child] = _Zeros(sizes[1], ran)
                width = width or sizes[0]
            else:
                stand_ins[child] = Through()
        return stand_ins, width, device_of(self.module)


def _projection_sizes(child: nn.Module) -> tuple[int, int] | None:
    """Widths of what a projection takes and gives; also of one that wraps or chains others."""
    sizes = getattr(child, "in_features", None), getattr(child, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    width, weight = getattr(child, "nf", None), getattr(child, "weight", None)
    if isinstance(width, int) and isinstance(weight, Tensor):
        return weight.shape[0], width  # Conv1D
    inner = [found for part in child.children() if (found := _projection_sizes(part)) is not None]
    return (inner[0][0], inner[-1][1]) if inner else None


def _is_blank(value: Any) -> bool:
    """Whether it comes from a projection that gave zeros: norms may have divided by them."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= 3
        and value.numel() > 0
        and not bool(value.nan_to_num().any())
    )


def _stub(name: str) -> Callable[..., Any]:
    def stub(*args: Any, **kwargs: Any) -> Any:
        raise _Called(name, args, kwargs)

    return stub


def _patched(function: Callable[..., Any], stubs: Mapping[str, Callable[..., Any]]) -> types.FunctionType:
    """A function that finds others under some global names."""
    assert isinstance(function, types.FunctionType)
    patched = types.FunctionType(
        function.__code__,
        {**function.__globals__, **stubs},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    patched.__kwdefaults__ = function.__kwdefaults__
    return patched


def _is_rotary(name: str, function: types.FunctionType, first: int) -> bool:
    """Whether a function is named for rotary positions and takes angles beside what it turns."""
    return (
        _NAMED_ROTARY.search(name) is not None
        and len(inspect.signature(function).parameters) - first >= 2
        and re.match(r"_?(get|compute|create|build|make|precompute|init|forward)", name) is None
    )
