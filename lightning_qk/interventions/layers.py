"""Which attention layers of a model an intervention is on."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_qk.heads.reader import ProjectionReader


def matching_layers(reader: ProjectionReader, modules: str | Sequence[str] | None) -> list[str]:
    """Names of the layers that patterns match, in the model's order.

    Args:
        reader: of the model.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.

    Raises:
        ValueError: the patterns match none, or none that can be read.
    """
    patterns = [modules] if isinstance(modules, str) else modules
    names = [
        name for name in reader if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    unread = matching_unread(reader, modules)
    if not names and unread:
        first = next(iter(unread))
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise ValueError(
            f"expected query and key weights that can be read in the layers of modules={modules!r}, got "
            f"{first}{more}, of which they cannot: {unread[first]}; choose other layers with modules="
        )
    if not names:
        raise ValueError(
            f"expected modules={modules!r} to match at least one attention layer, but it matches none of "
            f"{len(reader)} ({', '.join(list(reader)[:3])}, ...): use * for any part of a name"
        )
    return names


def matching_unread(reader: ProjectionReader, modules: str | Sequence[str] | None) -> dict[str, str]:
    """The layers that patterns match and that cannot be read, each with the reason."""
    patterns = [modules] if isinstance(modules, str) else modules
    return {
        name: reason
        for name, reason in reader.unread.items()
        if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
