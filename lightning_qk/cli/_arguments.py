"""A parser of command lines that says in one sentence what is wrong."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_qk._printable import did_you_mean
from lightning_qk.inspect.documents import BadInput


class OneLineParser(argparse.ArgumentParser):
    """argparse's, which raises one sentence instead of printing the usage and ending the program.

    Texts keep their line breaks where they have any.
    """

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter if "\n" in epilog else argparse.HelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise :class:`~lightning_qk.inspect.documents.BadInput`."""
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"expected {missing}, got none"
        raise BadInput(f"{message}; see {self.prog} --help")

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse a command line.

        Raises:
            BadInput: it is wrong.
        """
        # A misspelt option is reported before missing ones, since what follows it is often meant as its value.
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


class Failure(BadInput):
    """What cannot be done although the command line is right: no network, a full disk."""

    status = 1


def flag(group: argparse._ActionsContainer, name: str, text: str) -> None:
    """Add an option without a value."""
    group.add_argument(name, action="store_true", help=text)


def add_opening(group: argparse._ActionsContainer) -> None:
    """Add the options that say how a checkpoint is opened."""
    for name, metavar, text in (
        ("--base", "CHECKPOINT", "base of an adapter; default: the one that it names"),
        ("--config", "NAME", "folder or name on the hub with the configuration, where a file holds none"),
        ("--prefix", "NAME", "of the tensors' names, where a file holds several networks, such as teacher"),
        ("--revision", None, "of a model on the hub"),
    ):
        group.add_argument(name, metavar=metavar, help=text)
    flag(group, "--trust", "run code that a checkpoint brings: only for files whose origin you know")


# How jsonargparse says that a key does not exist: on the command line, in a config, in a class's init_args.
_UNKNOWN_KEY = re.compile(
    r"(?:unrecognized arguments: (?P<dashes>-*)|does not accept option '|Option '|Key ')(?P<key>[\w.-]+)",
    re.IGNORECASE,
)
_CLASS_PATH = re.compile(r"Problem with given class_path '(?P<path>[\w.]+)'")
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")
_MISSING = re.compile(r"the following arguments are required: \w+\.(?P<key>[\w.]+)")
_PARSER_KEY = re.compile(r'Parser key "(?P<key>[\w.]+)":')
# What a value should have been, and what it was.
_EXPECTED = re.compile(r"Expected an? (?P<type><class '[\w.]+'>|typing\.Literal\[[^\]]*\])")
_GIVEN = re.compile(r"(?:Got value|Given value): (?P<value>.*)")


def explain(error: Exception, command: str, prog: str) -> str:
    """One sentence."""
    text = str(getattr(error, "message", None) or error)
    path, key, attribute = (pattern.search(text) for pattern in (_CLASS_PATH, _UNKNOWN_KEY, _NO_ATTRIBUTE))
    see = f"; see {prog} {command} --help"
    if attribute:
        module = sys.modules.get(attribute["module"])
        hint = did_you_mean(attribute["name"], dir(module))
        name = f"{attribute['module']}.{attribute['name']}"
        return f"expected a class_path that exists, got {name}{hint or '; correct it'}"
    if key and path:
        options = init_args(path["path"])
        hint = did_you_mean(key["key"], options)
        return f"expected init_args of {path['path']} ({', '.join(options)}), got {key['key']!r}{hint}"
    if key and key["dashes"] == "":
        return f"expected options alone, got {key['key']!r}; a config is given with --config{see}"
    if key:
        from lightning_qk.cli._lightning_cli import option_names

        hint = did_you_mean(key["key"], option_names(command))
        return f"expected an option that exists, got {key['key']!r}{hint or see}"
    missing = _MISSING.search(text)
    if missing:
        return f"expected {missing['key']}, got none: give a config that has it, such as --config quickstart{see}"
    if text.startswith("Unexpected config"):
        return f"expected a config with keys such as model, data and trainer, got none of them{see}"
    # A list of callbacks is a union of types, and each type gives its reason: the one of the class is meant.
    start = path.start() if path else 0
    reason = text[start:].split("\n    - ")[0] if path else text
    return _wrong_value(reason, path["path"] if path else None) or " ".join(
        reason.split("\n    - ")[0].split()
    )


def _wrong_value(text: str, class_path: str | None) -> str | None:
    """The sentence about a value of a wrong type, where that is what is wrong."""
    key, given = _PARSER_KEY.search(text), _GIVEN.search(text)
    types = _plain_types([found["type"] for found in _EXPECTED.finditer(text)])
    if not (key and given and types):
        return None
    name = f"{key['key']} of {class_path}" if class_path else key["key"]
    return f"expected {name} to be {' or '.join(types)}, got {given['value']!r}; correct it"


def _plain_types(types: list[str]) -> list[str]:
    """What may be given, in words; words that may be given go into one list."""
    words, others = [], []
    for text in types:
        if text.startswith("typing.Literal"):
            words += [part.strip(" '") for part in text[len("typing.Literal[") : -1].split(",")]
        else:
            name = text[len("<class '") : -2]
            plain = {"NoneType": "null", "bool": "true or false", "str": "text"}
            others.append(plain.get(name, name.rpartition(".")[2]))
    listed = ["one of " + ", ".join(dict.fromkeys(words))] if words else []
    return [*listed, *dict.fromkeys(others)]


def init_args(class_path: str) -> list[str]:
    """Names of the arguments of a class."""
    from importlib import import_module

    from lightning_qk.callbacks.callback import arguments

    module, _, name = class_path.rpartition(".")
    return arguments(getattr(import_module(module), name))
