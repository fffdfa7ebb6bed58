"""A parser of command lines that says in one sentence what is wrong."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn

from lightning_qk.inspect.errors import BadInput


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'this'?"``, or an empty string where nothing is near.

    Args:
        word: what was given.
        choices: what there is.
    """
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class OneLineParser(argparse.ArgumentParser):
    """argparse's, which raises one sentence instead of printing the usage and ending the program."""

    def error(self, message: str) -> NoReturn:
        """Raise :class:`~lightning_qk.inspect.errors.BadInput`.

        Args:
            message: argparse's.
        """
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"expected {missing}, got none"
        raise BadInput(f"{message}; see {self.prog} --help")

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse a command line.

        Args:
            args: what follows the command's name.

        Raises:
            BadInput: it is wrong.
        """
        # A misspelt option is told before what is missing, since what follows it is often meant as its value.
        known = self.option_names()
        for arg in args:
            word = arg.split("=")[0]
            if arg == "--":
                break
            if word.startswith("--") and word not in known:
                hint = did_you_mean(word, known) or f"; see {self.prog} --help"
                raise BadInput(f"expected an option that exists, got {word!r}{hint}")
        options, unknown = self.parse_known_args(args)
        if unknown:
            raise BadInput(f"expected nothing more, got {unknown[0]!r}; see {self.prog} --help")
        return options

    def option_names(self) -> list[str]:
        """The options that there are, such as ``--json``."""
        return [name for action in self._actions for name in action.option_strings]
