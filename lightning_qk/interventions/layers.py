"""Which attention layers of a model an intervention is on."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_qk.heads.reader import ProjectionReader


def matching_layers(reader: ProjectionReader, modules: str | Sequence[str] | None) -> list[str]:
    """Names of the layers that patterns match, in the model's order.

    Args:
        reader: of the model.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.

    Raises:
        ValueError: the patterns match none.
    """
    patterns = [modules] if isinstance(modules, str) else modules
    names = [
        name for name in reader if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if not names:
        raise ValueError(
            f"expected modules={modules!r} to match at least one attention layer, but it matches none of "
            f"{len(reader)} ({', '.join(list(reader)[:3])}, ...): use * for any part of a name"
        )
    return names


def refuse_layers(names: Iterable[str], refused: Mapping[str, str] | None) -> None:
    """Refuse layers that may not be changed, such as those whose weights act in another way than read.

    Args:
        names: those that would be changed.
        refused: qualified name → why it may not be, as a clause about the layer; None for none.

    Raises:
        ValueError: one of them is refused.
    """
    found = [name for name in names if refused and name in refused]
    if refused and found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(
            f"expected query and key weights that are read as the model uses them, got {found[0]}{more}, "
            f"{refused[found[0]]}: leave such layers out with modules="
        )


def matching_unread(reader: ProjectionReader, modules: str | Sequence[str] | None) -> dict[str, str]:
    """The layers that patterns match and that cannot be read, each with the reason."""
    patterns = [modules] if isinstance(modules, str) else modules
    return {
        name: reason
        for name, reason in reader.unread.items()
        if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
