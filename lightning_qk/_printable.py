"""Text for messages and tables: short, on one line, and safe for a terminal and a spreadsheet."""

import difflib
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Categories of characters that a terminal may obey, or that change the order or the lines of a text.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# A spreadsheet takes a cell that begins with one of these for a formula; the last two are leading white
# space of one.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
_LONGEST = 300
"""Characters of an error of others that are quoted."""


def one_line(error: BaseException) -> str:
    """The first line that an error says, or its class."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # what a library's error holds may have no text
        lines = []
    line = lines[0].rstrip(".:") if lines else type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    shown = list(names)
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'this'?"``, or an empty string where nothing is near."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def print_lines(console: "Console", lines: Iterable[str], **options: Any) -> None:
    """Print texts letter by letter, whatever they hold."""
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, **options)


def printable(text: object) -> str:
    """The text on one line, with what a terminal would obey written out.

    Control characters (escape sequences among them), invisible ones that change a text's direction, line breaks
    and halves of surrogate pairs become ``\\x1b``, ``\\u202e`` and the like. Other characters stay.

    Args:
        text: anything; its ``str`` is taken.
    """
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(_written_out(char) if unicodedata.category(char) in _UNSAFE else char for char in plain)


def _written_out(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def cell(text: object) -> str:
    """The text as a cell of a CSV file that no spreadsheet takes for a formula.

    Args:
        text: anything; its ``str`` is taken. Numbers are for the caller to write.

    Returns:
        The printable text, with an apostrophe before it where it begins as a formula does.
    """
    plain = str(text)
    guard = "'" if plain.lstrip(" ").startswith(FORMULA) else ""
    return guard + printable(plain)
