"""The ready configs: one folder, ``configs/`` in a clone and ``lightning_qk/configs`` where it is installed."""

from collections.abc import Sequence
from pathlib import Path

from lightning_qk.cli._arguments import did_you_mean


class NoSuchConfig(ValueError):
    """A config that is neither a file nor one of the package's.

    Attributes:
        status: the exit status of a command that is given it.
    """

    status = 2


def folder() -> Path:
    """Where the configs lie: in the package of a wheel (setup.py puts them there), else beside it."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Names of the configs, without ``.yaml``."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def describe(name: str) -> str:
    """What a config is for: the first sentence of the comment on top of it.

    Args:
        name: one of :func:`names`.
    """
    with (folder() / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").split(". ")[0].rstrip(".:\n")


def resolve(given: str) -> str:
    """The path of a config.

    Args:
        given: a file, or one of :func:`names`, with ``.yaml`` or without. A file goes first. YAML itself, which
            jsonargparse takes too, is passed on.

    Raises:
        NoSuchConfig: it is none of these.
    """
    path = Path(given)
    if path.is_file():
        _check_text(path)
        return given
    if any(mark in given for mark in ":{\n"):
        return given
    name = given.removesuffix(".yaml")
    if name in names():
        return str(folder() / f"{name}.yaml")
    if path.is_dir():
        raise NoSuchConfig(f"expected a config file, got the folder {given}: name a file in it")
    hint = did_you_mean(given, _near(path)) or "; correct it"
    raise NoSuchConfig(
        f"expected a config file or one of the package's ({', '.join(names())}), got no such file: {given}{hint}"
    )


def _check_text(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise NoSuchConfig(
            f"expected a config in UTF-8, got another kind of file: {path}; correct it"
        ) from None
    except OSError as error:
        raise NoSuchConfig(
            f"expected a config that may be read, got {path} ({error.strerror}); mend its permissions"
        ) from None


def _near(path: Path) -> list[str]:
    """What may have been meant: the package's names, and files of the same folder."""
    try:
        files = [str(other) for other in path.parent.glob("*.y*ml")]
    except OSError:
        files = []
    return [*names(), *files]


def resolve_arguments(args: Sequence[str]) -> list[str]:
    """The command line with the values of ``--config`` and ``-c`` as paths.

    Args:
        args: of one of the trainer's commands.

    Raises:
        NoSuchConfig: there is no such config.
    """
    out = list(args)
    for place, arg in enumerate(out):
        if arg in ("--config", "-c") and place + 1 < len(out) and not out[place + 1].startswith("-"):
            out[place + 1] = resolve(out[place + 1])
        elif arg.startswith("--config="):
            out[place] = "--config=" + resolve(arg.removeprefix("--config="))
    return out
