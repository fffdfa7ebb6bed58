"""Errors of user input, JSON files and patterns that come with a checkpoint, read within limits."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_qk._printable import one_line

_LARGEST = 2**26
"""Bytes of a JSON file; the index of a model of 10⁵ tensors has 10⁷."""
_DEEPEST = 64
# Fields that count modules or list entries of a model.
_COUNTED = re.compile(r"(?:^|_)(?:n_)?(?:layers?|depths?|blocks?|stages?|hidden_layers|experts|groups)$")
_FEWEST = 256
"""So many layers are allowed whatever the number of tensors: several layers can share one."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        what: it should be, for the message: ``"a configuration"``.

    Raises:
        BadInput: the file cannot be read, is larger than 64 MiB, no JSON in UTF-8, nested too deep, or no object.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise ValueError(f"{size} bytes are more than the {_LARGEST} that are read")
        return parse_json(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise BadInput(f"expected a file that may be read, got {path}: change its permissions") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise BadInput(f"expected {what}, got {path} ({why}): download or save it again") from error


def parse_json(text: str) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        ValueError: it is no JSON, nested too deep, or no object.
    """
    too_deep = ValueError(f"it is nested more than {_DEEPEST} levels deep")
    try:
        found = json.loads(text)
    except RecursionError:
        raise too_deep from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    if _depth_exceeds(found, _DEEPEST):
        raise too_deep
    return found


def _depth_exceeds(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper, found without recursion."""
    layer = [value]
    for _ in range(levels):
        layer = [part for one in layer for part in _parts(one)]
        if not layer:
            return False
    return True


def _parts(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [part for part in inner if isinstance(part, Mapping | list | tuple)]


def check_counts(fields: Mapping[str, Any], tensors: int, where: str) -> None:
    """Raises for a configuration that asks for more than a checkpoint can hold, before anything is built.

    Args:
        fields: the configuration as plain data.
        tensors: how many tensors the checkpoint has.
        where: what to call the configuration in messages.

    Raises:
        BadInput: a number of layers (or what else a model makes one module of each) is far beyond the number of
            tensors.
    """
    most = max(_FEWEST, 4 * tensors)
    for name, value in _numbers(fields):
        if _COUNTED.search(name) and value > most:
            raise BadInput(
                f"expected a configuration of the {tensors} tensors that are there, got {where} with "
                f"{name}={value}: correct it"
            )


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number with the name of the field that it is in, those of objects and lists within too."""
    waiting: list[tuple[str, Any]] = [(str(name), value) for name, value in fields.items()]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield name, value
        elif isinstance(value, Mapping):
            waiting += [(str(inner), part) for inner, part in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, part) for part in value if isinstance(part, int | list | tuple | Mapping)]


class BadInput(ValueError):
    """An error that the caller can correct: a checkpoint, option or target that is not what was expected.

    Attributes:
        status: the exit status of a command that is given it.
    """

    status = 2


_SECONDS = 5.0
_LONGEST = 1000
# Patterns without backtracking.
_PLAIN = re.compile(r"^\^?(?:[A-Za-z0-9_-]|\\?\.)+\$?$")
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([[bool(re.match(rf"(.*\\.)?({pattern})$", name)) for pattern in patterns] for name in names], sys.stdout)
"""


def first_matches(patterns: Iterable[str], names: Iterable[str], where: str) -> dict[str, str | None]:
    """Which of an adapter's patterns applies to each name, as PEFT decides: the first that matches its end.

    Patterns that are plain names are matched here. Others can run for years on one name: they are matched in a
    process of their own, which is ended after some seconds.

    Args:
        patterns: regular expressions.
        names: of modules.
        where: what to call the adapter in messages.

    Returns:
        Name → the pattern, or None.

    Raises:
        BadInput: a pattern is no regular expression, is longer than 1000 characters, or does not come to an end.
    """
    patterns, names = list(patterns), list(names)
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            raise BadInput(
                f"expected patterns of at most {_LONGEST} characters, got one of {len(pattern)} in {where}: "
                "merge the adapter and pass the merged model"
            )
    if all(_PLAIN.match(pattern) for pattern in patterns):
        found = [[bool(re.match(rf"(.*\.)?({pattern})$", name)) for pattern in patterns] for name in names]
    else:
        found = _elsewhere(patterns, names, where)
    return {
        name: next((pattern for pattern, holds in zip(patterns, row, strict=True) if holds), None)
        for name, row in zip(names, found, strict=True)
    }


def _elsewhere(patterns: list[str], names: list[str], where: str) -> list[list[bool]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
        return [[bool(holds) for holds in row] for row in json.loads(done.stdout)]
    except subprocess.TimeoutExpired as error:
        raise BadInput(
            f"expected patterns that can be matched within {_SECONDS:g} s, got {', '.join(patterns)[:100]!r} "
            f"in {where}: write them as names of modules, or merge the adapter and pass the merged model"
        ) from error
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        raise BadInput(
            f"expected regular expressions, got {', '.join(patterns)[:100]!r} in {where}: write them as "
            "names of modules, or merge the adapter and pass the merged model"
        ) from error
