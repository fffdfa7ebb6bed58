"""Which tensors of a checkpoint a model's parameters come from, by their names.

Names differ by prefixes (a base model within a task's model, a LightningModule around it) and by what transformers
renames, splits, joins and transposes when it loads; its own rules for that are applied.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_qk.inspect.documents import BadInput

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


class Match(NamedTuple):
    """A model's names in a checkpoint.

    Attributes:
        origins: parameter name → where its values are.
        left_over: what the model would call a tensor that none of its parameters comes from → the tensor's name.
        collisions: tensors that are read, each with one that could be read in its place.
        prefix: below which the network is read that is; empty where its names stand alone.
        others: prefixes of networks of the same kind that are not read.
        names: all tensors below the prefix that was asked for.
    """

    origins: dict[str, Origin]
    left_over: dict[str, str]
    collisions: Sequence[tuple[str, str]] = ()
    prefix: str = ""
    others: Sequence[str] = ()
    names: Sequence[str] = ()


def match_names(
    stored: Sequence[str], model: nn.Module, where: str, *, within: bool = False, prefix: str | None = None
) -> Match:
    """Find a model's parameters among a checkpoint's tensors.

    Args:
        stored: the tensors' names.
        model: the skeleton.
        where: what to call the checkpoint in messages.
        within: the model is a part of the module that was saved, whose names it has in memory; else its names
            are those that ``from_pretrained`` knows, or, where they are not, such ones.
        prefix: only tensors whose names begin with it and a dot, without it.

    Raises:
        BadInput: nothing is below the prefix.
    """
    named = model.state_dict()
    below = _without_wrappers(
        dict.fromkeys(stored, "") if prefix is None else _below(stored, prefix, where), named
    )

    def whole(inner: str) -> str:
        return ".".join(filter(None, (prefix, inner)))

    own, others = prefix or "", []
    found = Match({}, {})
    if not within:
        found = _as_transformers_loads(model, list(below), named)
    if 2 * len(found.origins) < len(named):
        networks = _within(model, list(below), named)
        if networks and len(next(iter(networks.values())).origins) > len(found.origins):
            (inner, found), *rest = networks.items()
            own, others = whole(inner), [whole(other) for other in _equal_networks(rest, found)]
    elif 2 * len(found.left_over) >= len(found.origins):
        networks = _within(model, list(found.left_over.values()), named)
        others = [whole(other) for other in _equal_networks(networks.items(), found)]
    return Match(
        {
            name: origin._replace(sources=[(below[key], pattern) for key, pattern in origin.sources])
            for name, origin in found.origins.items()
        },
        {name: below[key] for name, key in found.left_over.items()},
        [(below[kept], below[other]) for kept, other in found.collisions],
        own,
        others,
        list(below.values()),
    )


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


def _below(keys: Sequence[str], prefix: str, where: str) -> dict[str, str]:
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


def _as_transformers_loads(model: nn.Module, keys: list[str], named: Mapping[str, Tensor]) -> Match:
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
    return Match(origins, left_over, collisions)


def _within(model: nn.Module, keys: list[str], named: Mapping[str, Tensor]) -> dict[str, Match]:
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
        networks[prefix] = Match(found[prefix], left_over)
    return networks


def _equal_networks(others: Iterable[tuple[str, Match]], read: Match) -> list[str]:
    """Prefixes of networks that have most of the names of the one that is read, and none of its tensors."""

    def tensors(found: Match) -> set[str]:
        return {source for origin in found.origins.values() for source, _ in origin.sources}

    taken = tensors(read)
    prefixes = []
    for prefix, found in others:
        own = tensors(found)
        if 2 * len(own) >= len(read.origins) and not own & taken:
            prefixes.append(prefix)
            taken |= own  # one below this prefix is the same network
    return prefixes
