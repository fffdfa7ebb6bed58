"""Labels of attention layers from the qualified names of their modules, and patterns on these names."""

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations

_INTEGER = re.compile(r"[0-9]+")
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.-]+")
# Longer combinations of words are no shorter than the name itself.
_MAX_WORDS = 3


def layer_labels(names: Sequence[str], cross: Collection[str] = ()) -> dict[str, str]:
    """Label attention layers for log keys, figures and tables.

    Names that differ only in their integer components form one family. A model with one family gets
    ``layer_00``, ``layer_01``, …; the index is the integer that varies (several are joined by ``_``, and the
    first one counts where none varies). Families are distinguished by the fewest words of their names:
    ``encoder_layer_00`` and ``decoder_layer_00``, or ``student_layer_00`` and ``teacher_layer_00``.
    Cross-attention has ``cross`` in front of ``layer``: ``decoder_cross_layer_00``.

    Labels depend on all the names together, so monitors that are to be compared must pass the same list.

    Args:
        names: qualified module names, in the model's order.
        cross: those of them that are cross-attention.

    Returns:
        One label a name, in the same order. Labels are unique and hold only letters, digits, ``_``, ``.``
        and ``-``.
    """
    names = list(dict.fromkeys(names))
    families: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        families.setdefault(_template(name), []).append(name)
    crossing = {family: all(name in cross for name in members) for family, members in families.items()}
    # A family may hold layers of both kinds; then the kind is no property of the family.
    prefixes = _prefixes(crossing)

    labels: dict[str, str] = {}
    for family, members in families.items():
        words = list(prefixes[family])
        if crossing[family]:
            words.append("cross")
        indices = _indices(members)
        if "*" in family:
            words.append("layer")
        elif not prefixes[family]:
            words.append(family[-1])
        for name, index in zip(members, indices, strict=True):
            labels[name] = _FORBIDDEN.sub("_", "_".join([*words, *index])) or "attention"
    return _unique({name: labels[name] for name in names})


def _template(name: str) -> tuple[str, ...]:
    return tuple("*" if _INTEGER.fullmatch(part) else part for part in name.split("."))


def _indices(members: Sequence[str]) -> list[list[str]]:
    """The integers of each name that tell it from the others of its family, at least two digits each."""
    numbers = [[int(part) for part in name.split(".") if _INTEGER.fullmatch(part)] for name in members]
    columns = list(zip(*numbers, strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1] or list(range(len(columns)))[:1]
    width = [max(2, len(str(max(column)))) for column in columns]
    return [[f"{row[i]:0{width[i]}d}" for i in varying] for row in numbers]


def _prefixes(crossing: dict[tuple[str, ...], bool]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The words in front of ``layer``, chosen among families of the same kind."""
    own = [family for family, is_cross in crossing.items() if not is_cross]
    prefixes = {family: _distinguishing(family, own) for family in own}
    # A decoder's cross-attention shares the word that its self-attention was given.
    shared = {word for words in prefixes.values() for word in words}
    others = [family for family, is_cross in crossing.items() if is_cross]
    for family in others:
        words = tuple(word for word in _words(family) if word in shared)
        prefixes[family] = (
            words
            if words and not any(set(words) <= set(other) for other in others if other != family)
            else _distinguishing(family, others)
        )
    return prefixes


def _distinguishing(family: tuple[str, ...], families: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The fewest words, earliest first, that no other family has all of."""
    others = [set(other) for other in families if other != family]
    words = _words(family)
    for count in range(_MAX_WORDS + 1):
        for chosen in combinations(words, count):
            if not any(set(chosen) <= other for other in others):
                return chosen
    # Every word is also another family's: the one with the fewest words may go without.
    return () if all(len(words) < len(other - {"*"}) for other in others) else tuple(words)


def _words(family: tuple[str, ...]) -> list[str]:
    return [part for part in dict.fromkeys(family) if part not in ("*", "")]


def _unique(labels: dict[str, str]) -> dict[str, str]:
    """Number the labels that would come twice."""
    wanted = list(labels.values())
    taken: set[str] = {label for label in wanted if wanted.count(label) == 1}
    out: dict[str, str] = {}
    for name, label in labels.items():
        candidate, number = label, 1
        if wanted.count(label) > 1:
            while candidate in taken:
                number += 1
                candidate = f"{label}_{number}"
            taken.add(candidate)
        out[name] = candidate
    return out


def shorten(names: Sequence[str]) -> str:
    """The first three of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def matches(name: str, patterns: str | Sequence[str] | None) -> bool:
    """Whether a layer's name matches one of some glob patterns; None matches all."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def no_match(
    names: Collection[str], unread: Mapping[str, str], patterns: str | Sequence[str] | None
) -> ValueError:
    """The error of ``modules=`` patterns that match no layer, or none that can be read.

    Args:
        names: the layers that can be read.
        unread: the matching layers that cannot be read, each with the reason.
        patterns: as given.
    """
    if unread:
        first = next(iter(unread))
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        return ValueError(
            f"expected query and key weights that can be read in the layers of modules={patterns!r}, got "
            f"{first}{more}, of which they cannot: {unread[first]}; choose other layers with modules="
        )
    return ValueError(
        f"expected modules={patterns!r} to match at least one attention layer, but it matches none of "
        f"{len(names)} ({', '.join(list(names)[:3])}, ...): use * for any part of a name"
    )
