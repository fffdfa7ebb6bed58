"""Which tensors of a checkpoint a model's parameters come from.

Names differ by prefixes (a base model within a task's model, a LightningModule around it) and by what transformers
renames, splits, joins and transposes when it loads; its own rules for that are applied, one parameter at a time.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.inspect.errors import BadInput, one_line
from lightning_qk.inspect.storage import Get

# What compiling and sharding put between the parts of a name.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_forward_module)\.")

_ALIGNMENT = 64
"""Bytes: torch's own tensors begin at a multiple of it."""


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


class Matching:
    """The parameters of a skeleton and the tensors of a checkpoint.

    Attributes:
        origins: parameter name → where its values are.
    """

    def __init__(self, model: nn.Module, keys: Iterable[str], where: str, *, within: bool = False) -> None:
        """Match names.

        Args:
            model: the skeleton.
            keys: names of the checkpoint's tensors.
            where: what to call the checkpoint in messages.
            within: the model is a part of the module that was saved, whose names it has in memory.

        Raises:
            BadInput: the checkpoint holds nothing of the model.
        """
        self._model = model
        self._where = where
        named = model.state_dict()
        keys = list(keys)
        self.origins = _within(model, keys, named) if within else _as_transformers_loads(model, keys, named)
        self._ties = _tied(model)
        if not self.origins:
            raise BadInput(
                f"expected the weights of a {type(model).__name__} in {where}, got none of its names among "
                f"{len(keys)} tensors (such as {', '.join(keys[:3]) or 'none'}): its configuration is "
                "that of another "
                "model"
            )

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the values of a parameter."""
        return self._origin([name]) is not None

    def load(self, names: list[str], get: Get, shape: torch.Size) -> Tensor:
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
                f"expected the weights {names[0]!r} in {self._where}, got no such tensor: the checkpoint "
                "is incomplete, "
                "or its configuration is that of another model"
            )
        value = self._converted(names, origin, get)
        if not value.is_floating_point() or value.element_size() < 2:
            raise BadInput(
                f"expected weights that are kept as numbers, got {names[0]!r} in {self._where} as "
                f"{str(value.dtype).removeprefix('torch.')}: quantized checkpoints are not read; "
                "dequantize it and save "
                "it again"
            )
        if value.shape != shape:
            raise BadInput(
                f"expected {names[0]!r} of shape {tuple(shape)}, got {tuple(value.shape)} in "
                f"{self._where}: its "
                "configuration is that of another model"
            )
        return _aligned(value if value.dtype == torch.float64 else value.float())

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
                f"({one_line(error)}): "
                "the checkpoint is incomplete, or its configuration is that of another model"
            ) from error
        for name in names:
            if name in made:
                value = made[name]
                return value[0] if isinstance(value, list) else value
        raise BadInput(
            f"expected {names[0]!r} among what transformers makes of {origin.sources[0][0]!r}, got "
            f"{', '.join(made)}: convert the checkpoint with from_pretrained and save_pretrained"
        )


def _aligned(value: Tensor) -> Tensor:
    """The same where memory that torch would give begins; a mapped file has tensors anywhere.

    Products of the same numbers differ in the last bit where they begin elsewhere, and two checkpoints with the
    same weights must not.
    """
    return value if value.data_ptr() % _ALIGNMENT == 0 else value.clone()


def _later(get: Get, key: str) -> Callable[[], Tensor]:
    return lambda: get(key)


def _as_transformers_loads(model: nn.Module, keys: list[str], named: dict[str, Tensor]) -> dict[str, Origin]:
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
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, named)
        if name not in named and key in named:
            name, pattern = rename_source_key(key, [], [], prefix, named)
        if pattern is None:
            if name in named:
                origins.setdefault(name, Origin(name, [(key, key)]))
            continue
        rule = by_pattern[pattern]
        made = [name, *(name.replace(rule.target_patterns[0], other) for other in rule.target_patterns[1:])]
        if not any(other in named for other in made):
            continue
        origin = origins.setdefault(name, Origin(name, [], rule))
        origin.sources.append((key, pattern))
        for other in made:
            origins.setdefault(other, origin)
    return origins


def _within(model: nn.Module, keys: list[str], named: dict[str, Tensor]) -> dict[str, Origin]:
    """A network in a module that was saved as it is in memory, below the prefix that most of its names "
    "have."""
    plain = {_WRAPPERS.sub("", key): key for key in keys}
    base = f"{getattr(model, 'base_model_prefix', '') or 'base'}."

    def own_name(rest: str) -> str | None:
        for name in (rest, base + rest, rest.removeprefix(base)):
            if name in named:
                return name
        return None

    found: dict[str, dict[str, Origin]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    for key, stored in plain.items():
        parts = key.split(".")
        for depth in range(min(len(parts), 6)):
            name = own_name(".".join(parts[depth:]))
            if name is not None:
                prefix = ".".join(parts[:depth])
                found[prefix].setdefault(name, Origin(name, [(stored, stored)]))
                counts[prefix] += 1
    if not counts:
        return {}
    return found[counts.most_common(1)[0][0]]


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
