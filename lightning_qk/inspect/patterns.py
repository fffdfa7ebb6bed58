"""Regular expressions out of a file, matched in bounded time."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable

from lightning_qk.inspect.errors import BadInput

_SECONDS = 5.0
_LONGEST = 1000
# What backtracks nowhere but over the dots before it.
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
                f"expected patterns of at most {_LONGEST} characters, got one of {len(pattern)} in "
                f"{where}: merge the "
                "adapter and pass the merged model"
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
            f"expected patterns that can be matched within {_SECONDS:g} s, got "
            f"{', '.join(patterns)[:100]!r} in {where}: "
            "write them as names of modules, or merge the adapter and pass the merged model"
        ) from error
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        raise BadInput(
            f"expected regular expressions, got {', '.join(patterns)[:100]!r} in {where}: write them as names of "
            "modules, or merge the adapter and pass the merged model"
        ) from error
