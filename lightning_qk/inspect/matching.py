"""Which tensors of a checkpoint a model's parameters come from.

Names differ by prefixes (a base model within a task's model, a LightningModule around it) and by what transformers
renames, splits, joins and transposes when it loads; its own rules for that are applied, one parameter at a time.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_qk.inspect.documents import BadInput, one_line
from lightning_qk.inspect.storage import Get, Storage

# Parts that compiling, sharding, checkpointing and data parallelism insert into names, anywhere.
_WRAPPER_PARTS = frozenset(
    [
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_forward_module",
        "_checkpoint_wrapped_module",
        "module",
    ]
)
# Parts of a prefix that are tried.
_DEEPEST = 8

# Prefixes that are tried: those of one network differ by what its class puts before its names.
_MOST_NETWORKS = 64
# Names of networks that are copies of another one.
_COPY = re.compile(
    r"(?:^|[._])(?:ema|teacher|target|averaged?|shadow|momentum|swa|ref|reference|frozen)(?:$|[._])"
)
# Names of adapters' tensors: those of PEFT, loralib, torchtune and LyCORIS.
_ADAPTERS = re.compile(
    r"(?:^|[._])(?:lora|dora|hada|lokr|ia3|b?oft|vera|vblora|fourierft|hra|randlora)_|\.base_layer\."
)
_NUMBER = re.compile(r"\d+")
# Constants of attention, not weights, that older versions of transformers also saved.
_CONSTANTS = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|position_ids|relative_position_index)$")
_NAMED = 4
"""Names that a message lists; others are counted."""

_ALIGNMENT = 64
"""Bytes: torch's own tensors begin at a multiple of it."""


Load = Callable[[list[str], torch.Size], Tensor]
"""The values of a parameter, given all its names and its shape; float32 at least."""


class Weights(Protocol):
    """Weights that are read one parameter at a time."""

    def reading(self) -> AbstractContextManager[Load]:
        """Within this block weights can be read; files are closed at its end."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a parameter."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the checkpoint has of a parameter, without reading it; None where unknown."""

    def check_depth(self, layers: Collection[str]) -> None:
        """Raises BadInput for a checkpoint that has some of these attention layers and nothing of others."""

    def notes(self, layers: Collection[str]) -> list[str]:
        """Notes on tensors that were not read, given the attention layers' names; call it after reading them."""


class Origin(NamedTuple):
    """Where a parameter's values are.

    Attributes:
        target: the name that transformers' rule gives first; the parameter's own where there is none.
        sources: tensors of the checkpoint, and the pattern of the rule that each matches.
        converter: the rule, or None for a tensor that is taken as it is.
    """

    target: str
    sources: list[tuple[str, str]]
    converter: Any = None


class StoredWeights:
    """The weights of a skeleton in the tensors of a checkpoint; a :class:`Weights`.

    Attributes:
        origins: parameter name → where its values are.
        left_over: what the model would call a tensor that none of its parameters comes from → the tensor's name.
        others: prefixes of networks of the same kind in the checkpoint that are not read.
        prefix: below which the network is read that is; empty where its names stand alone.
    """

    def __init__(
        self,
        storage: Storage,
        model: nn.Module,
        *,
        within: bool = False,
        prefix: str | None = None,
    ) -> None:
        """Match names.

        Args:
            storage: the checkpoint's tensors.
            model: the skeleton.
            within: the model is a part of the module that was saved, whose names it has in memory; else its names
                are those that ``from_pretrained`` knows, or, where they are not, such ones.
            prefix: only tensors whose names begin with it and a dot, without it.

        Raises:
            BadInput: the checkpoint holds nothing of the model, or nothing below the prefix.
        """
        self._storage = storage
        self._model = model
        self._where = where = storage.where
        named = model.state_dict()
        stored = list(storage.files)
        below = _without_wrappers(
            dict.fromkeys(stored, "") if prefix is None else _below(stored, prefix, where), named
        )
        self.prefix = prefix or ""
        self.others: list[str] = []
        found = _Found({}, {})
        if not within:
            found = _as_transformers_loads(model, list(below), named)
        if 2 * len(found.origins) < len(named):
            networks = _within(model, list(below), named)
            if networks and len(next(iter(networks.values())).origins) > len(found.origins):
                (own, found), *rest = networks.items()
                self.prefix = ".".join(filter(None, (prefix, own)))
                self.others = [
                    ".".join(filter(None, (prefix, other))) for other in _equal_networks(rest, found)
                ]
        elif 2 * len(found.left_over) >= len(found.origins):
            rest = list(_within(model, list(found.left_over.values()), named).items())
            self.others = [".".join(filter(None, (prefix, other))) for other in _equal_networks(rest, found)]
        self.origins = {
            name: origin._replace(sources=[(below[key], pattern) for key, pattern in origin.sources])
            for name, origin in found.origins.items()
        }
        self.left_over = {name: below[key] for name, key in found.left_over.items()}
        self.collisions = [(below[kept], below[other]) for kept, other in found.collisions]
        self._ties = _tied(model)
        self._check_adapters(below.values())
        if not self.origins and any("flat_param" in name for name in stored):
            raise BadInput(
                f"expected tensors by name, got {where}, which holds those that FSDP makes of them: save it with "
                "FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT) instead"
            )
        if not self.origins:
            raise BadInput(
                f"expected the weights of a {type(model).__name__} in {where}, got none of its names among "
                f"{len(stored)} tensors (such as {', '.join(stored[:3]) or 'none'}): its configuration is "
                "that of another model"
            )

    def _check_adapters(self, keys: Iterable[str]) -> None:
        """Raises BadInput for adapters beside the weights that they change."""
        used = {key for origin in self.origins.values() for key, _ in origin.sources}
        found = [key for key in keys if key not in used and _ADAPTERS.search(key)]
        if found:
            raise BadInput(
                f"expected a checkpoint without adapters, got {self._where} with {len(found)} tensors of adapters "
                f"that are not merged into its weights ({listed(found)}): save what PEFT's "
                "model.merge_and_unload() gives, or the adapter with save_pretrained and pass its folder"
            )

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the values of a parameter."""
        return self._origin([name]) is not None

    @contextmanager
    def reading(self) -> Iterator[Load]:
        """Within this block weights can be read; files are closed at its end."""
        with self._storage.reading() as get:
            yield lambda names, shape: self._load(names, get, shape)

    def _load(self, names: list[str], get: Get, shape: torch.Size) -> Tensor:
        """The values of a parameter as a model would load them, in float32 at least.

        Args:
            names: all that the parameter is called.
            get: reads a tensor of the checkpoint.
            shape: what the model expects.

        Raises:
            BadInput: they are not there, of another shape, or not numbers as they are.
        """
        origin = self._origin(names)
        if origin is None:
            raise BadInput(
                f"expected the weights {names[0]!r} in {self._where}, got no such tensor: the checkpoint is "
                "incomplete, or its configuration is that of another model"
            )
        value = self._converted(names, origin, get)
        if not value.is_floating_point() or value.element_size() < 2:
            raise BadInput(
                f"expected weights that are kept as numbers, got {names[0]!r} in {self._where} as "
                f"{str(value.dtype).removeprefix('torch.')} without scales: pass the model that it was made from"
            )
        if value.shape != shape:
            raise BadInput(
                f"expected {names[0]!r} of shape {tuple(shape)}, got {tuple(value.shape)} in {self._where}: "
                "its configuration is that of another model"
            )
        return _aligned(value if value.dtype == torch.float64 else value.float())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the checkpoint has of a parameter; None where unknown, or the tensor is converted."""
        origin = self._origin([name])
        return (
            None
            if origin is None or origin.converter is not None
            else self._storage.shape(origin.sources[0][0])
        )

    def check_depth(self, layers: Collection[str]) -> None:
        """Raises BadInput for a checkpoint that has some of these attention layers and nothing of others."""
        absent, present = [], 0
        for layer in layers:
            start = f"{layer}." if layer else ""
            names = [name for name, _ in self._model.get_submodule(layer).named_parameters()]
            if any(self.has(start + name) for name in names):
                present += 1
            elif names:
                absent.append(layer)
        if absent and present:
            raise BadInput(
                f"expected {present + len(absent)} attention layers, as the configuration says, in "
                f"{self._where}, got {present} (no tensor of {listed(absent)}): copy the rest, or correct "
                "the number of layers in the configuration"
            )

    def notes(self, layers: Collection[str]) -> list[str]:
        """Notes on tensors that are not read, given the names of the attention layers."""
        notes = []
        if self.others:
            choose = " or ".join(f"--prefix {prefix}" for prefix in self.others[:_NAMED])
            notes.append(
                f"{self._where} holds {len(self.others) + 1} networks of this kind: read is the one "
                + (f"below {self.prefix!r}" if self.prefix else "whose names have no prefix")
                + f", not {listed(self.others)} (pass {choose} to read that)"
            )
        if self.collisions:
            notes.append(
                f"{len(self.collisions)} parameters have two tensors in {self._where}: read is the first, "
                f"such as {self.collisions[0][0]}, not {self.collisions[0][1]}"
            )
        if self._storage.decoded:
            notes.append(f"{self._where} is quantized: the numbers are those that its codes stand for")
        deeper, unknown = self._of_attention(layers)
        if deeper:
            notes.append(
                f"{self._where} is deeper than its configuration: {len(deeper)} attention "
                f"layer{'s' * (len(deeper) > 1)} that it holds ({listed(deeper)}) "
                f"{'are' if len(deeper) > 1 else 'is'} not read, only the {len(layers)} of the configuration"
                + ("" if self._expects(deeper) else "; correct its number of layers to read all")
            )
        if unknown:
            notes.append(
                f"{len(unknown)} tensor{'s' * (len(unknown) > 1)} of attention in {self._where} "
                f"{'belong' if len(unknown) > 1 else 'belongs'} to no parameter of a "
                f"{type(self._model).__name__} and {'are' if len(unknown) > 1 else 'is'} not in these "
                f"numbers ({listed(unknown)})"
            )
        return notes

    def _of_attention(self, layers: Collection[str]) -> tuple[list[str], list[str]]:
        """Attention layers that are left over, and tensors that are in a layer that is read."""
        base = f"{getattr(self._model, 'base_model_prefix', '') or 'base'}."
        known = {layer: layer for layer in layers if layer}
        for layer in list(known):
            known.setdefault(layer.removeprefix(base), layer)
            known.setdefault(base + layer, layer)
        kinds = sorted({_NUMBER.sub("*", layer) for layer in known}, key=len, reverse=True)
        buffers = {name for name, _ in self._model.named_buffers()}
        deeper: dict[str, str] = {}
        unknown = []
        for name, key in self.left_over.items():
            if name in buffers or base + name in buffers or name.removeprefix(base) in buffers:
                continue
            if _CONSTANTS.search(name):
                continue
            kind = _NUMBER.sub("*", name)
            inside = next((own for own in kinds if kind.startswith(f"{own}.")), None)
            if inside is None:
                continue
            layer = ".".join(name.split(".")[: inside.count(".") + 1])
            if layer in known:
                if not self._is_expected(key):
                    unknown.append(key)
            else:
                deeper.setdefault(layer, key)
        return list(deeper), unknown

    def _is_expected(self, name: str) -> bool:
        """Whether the model's class says that tensors of that name may be left over."""
        patterns = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def _expects(self, layers: Iterable[str]) -> bool:
        return all(self._is_expected(f"{layer}.weight") for layer in layers)

    def _origin(self, names: Iterable[str]) -> Origin | None:
        for name in names:
            for own in (name, *self._ties.get(name, ())):
                if own in self.origins:
                    return self.origins[own]
        return None

    def _converted(self, names: list[str], origin: Origin, get: Get) -> Tensor:
        if origin.converter is None:
            return get(origin.sources[0][0])
        rule = deepcopy(origin.converter)
        for key, pattern in origin.sources:
            rule.add_tensor(origin.target, key, pattern, _later(get, key))
        try:
            made = rule.convert(origin.target, model=self._model, config=getattr(self._model, "config", None))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(
                f"expected tensors that transformers can make {names[0]!r} of, got {self._where} "
                f"({one_line(error)}): the checkpoint is incomplete, or its configuration is that of another "
                "model"
            ) from error
        for name in names:
            if name in made:
                value = made[name]
                return value[0] if isinstance(value, list) else value
        raise BadInput(
            f"expected {names[0]!r} among what transformers makes of {origin.sources[0][0]!r}, got "
            f"{', '.join(made)}: convert the checkpoint with from_pretrained and save_pretrained"
        )


def listed(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    first = list(names)[:_NAMED]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _aligned(value: Tensor) -> Tensor:
    """The same tensor at an aligned address, as torch allocates it; a mapped file has tensors anywhere.

    Products of the same numbers differ in the last bit where they begin elsewhere, and two checkpoints with the
    same weights must not.
    """
    return value if value.data_ptr() % _ALIGNMENT == 0 else value.clone()


def _later(get: Get, key: str) -> Callable[[], Tensor]:
    return lambda: get(key)


class _Found(NamedTuple):
    """What was matched of a checkpoint's names.

    Attributes:
        origins: parameter name → where its values are.
        left_over: what the model would call a tensor that it has no parameter for → the tensor.
        collisions: tensors that are read, each with one that could be read in its place.
    """

    origins: dict[str, Origin]
    left_over: dict[str, str]
    collisions: Collection[tuple[str, str]] = ()


def _unwrapped(name: str, kept: Collection[str] = ()) -> str:
    """A name without what wrappers put into it, less those that are parts of the model's own names."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in _WRAPPER_PARTS or part in kept)


def _without_wrappers(keys: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers put into them → whole names.

    Args:
        keys: whole names, each with a prefix that is not part of its own name.
        named: names of the model's parameters.
    """
    kept = _WRAPPER_PARTS & {part for name in named for part in name.split(".")}
    found: dict[str, str] = {}
    for key, start in keys.items():
        name = key.removeprefix(start)
        plain = _unwrapped(name, kept)
        # A second network that differs by a wrapper alone keeps its names.
        found[name if plain in found else plain] = key
    return found


def _below(keys: list[str], prefix: str, where: str) -> dict[str, str]:
    """Whole names that begin with a prefix → what of them is the prefix; wrappers do not matter."""
    start = f"{prefix.rstrip('.')}."
    found = {key: start for key in keys if key.startswith(start)}
    plain = _unwrapped(start.rstrip("."))
    if not found and plain:
        for key in keys:
            parts = key.split(".")
            ends = (".".join(parts[:count]) for count in range(1, len(parts)))
            end = next((one for one in ends if _unwrapped(one) == plain), None)
            if end is not None:
                found[key] = f"{end}."
    if found:
        return found
    tops = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    raise BadInput(
        f"expected tensors below the prefix {prefix!r} in {where}, got none: give one that is there, such as "
        f"{', '.join(tops[:5])}"
    )


def _as_transformers_loads(model: nn.Module, keys: list[str], named: Mapping[str, Tensor]) -> _Found:
    """By the rules of ``from_pretrained``."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    own: Any = model
    rules = get_model_conversion_mapping(own)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = own.base_model_prefix
    origins: dict[str, Origin] = {}
    left_over: dict[str, str] = {}
    collisions = []
    given = dict(named)
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, given)
        if name not in named and key in named:
            name, pattern = rename_source_key(key, [], [], prefix, given)
        if pattern is None:
            if name not in named:
                left_over[name] = key
            elif name in origins and origins[name].converter is None:
                collisions.append((origins[name].sources[0][0], key))
            else:
                origins.setdefault(name, Origin(name, [(key, key)]))
            continue
        rule = by_pattern[pattern]
        made = [name, *(name.replace(rule.target_patterns[0], other) for other in rule.target_patterns[1:])]
        if not any(other in named for other in made):
            left_over[name] = key
            continue
        origin = origins.setdefault(name, Origin(name, [], rule))
        origin.sources.append((key, pattern))
        for other in made:
            origins.setdefault(other, origin)
    return _Found(origins, left_over, collisions)


def _within(model: nn.Module, keys: list[str], named: Mapping[str, Tensor]) -> dict[str, _Found]:
    """Networks in a module that was saved as it is in memory.

    Returns:
        Prefix → what was found below it, the prefix that most of the network's names have first; of equal ones the
        one that is not called a copy of another, then the one that was registered first.
    """
    base = f"{getattr(model, 'base_model_prefix', '') or 'base'}."

    def own_name(rest: str) -> str | None:
        for name in (rest, base + rest, rest.removeprefix(base)):
            if name in named:
                return name
        return None

    found: dict[str, dict[str, Origin]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        for depth in range(min(len(parts), _DEEPEST)):
            name = own_name(".".join(parts[depth:]))
            if name is not None:
                prefix = ".".join(parts[:depth])
                found[prefix].setdefault(name, Origin(name, [(key, key)]))
                counts[prefix] += 1
    networks = {}
    order = sorted(counts, key=lambda prefix: (-counts[prefix], bool(_COPY.search(prefix))))
    for prefix in order[:_MOST_NETWORKS]:
        used = {source for origin in found[prefix].values() for source, _ in origin.sources}
        start = f"{prefix}." if prefix else ""
        left_over = {
            key.removeprefix(start): key for key in keys if key.startswith(start) and key not in used
        }
        networks[prefix] = _Found(found[prefix], left_over)
    return networks


def _equal_networks(others: Iterable[tuple[str, _Found]], read: _Found) -> list[str]:
    """Prefixes of networks that have most of the names of the one that is read, and none of its tensors."""

    def tensors(found: _Found) -> set[str]:
        return {source for origin in found.origins.values() for source, _ in origin.sources}

    taken = tensors(read)
    prefixes = []
    for prefix, found in others:
        own = tensors(found)
        if 2 * len(own) >= len(read.origins) and not own & taken:
            prefixes.append(prefix)
            taken |= own  # one below this prefix is the same network
    return prefixes


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name → others that hold the same values, one of which a checkpoint has."""
    ties: dict[str, list[str]] = defaultdict(list)
    known = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in known.items():
        ties[target].append(source)
        ties[source].append(target)
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    for names in same.values():
        for name in names:
            ties[name] += [other for other in names if other != name]
    return ties
