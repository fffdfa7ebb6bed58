"""Which attention layers a monitor watches, and why it watches no others."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_qk.heads.layer import layer_reader
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.heads.sites import attention_sites

Patterns = str | Sequence[str] | None


def kept_patterns(modules: Patterns) -> str | list[str] | None:
    """Patterns as a callback keeps them.

    Raises:
        ValueError: something else than strings.
    """
    if modules is None or isinstance(modules, str):
        return modules
    patterns = list(modules)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"expected modules to be a glob pattern or a list of them, got {modules!r}: pass such as "
            "'*.encoder.*', or None for all layers"
        )
    return patterns


def matches(name: str, modules: Patterns) -> bool:
    """Whether a qualified name matches one of the patterns; None is every name."""
    if modules is None:
        return True
    return any(fnmatchcase(name, pattern) for pattern in ([modules] if isinstance(modules, str) else modules))


def matching(names: Iterable[str], modules: Patterns) -> list[str]:
    """Those of some names that match one of the patterns."""
    return [name for name in names if matches(name, modules)]


class WatchedReader(ProjectionReader):
    """Reads the projections of the layers that patterns match, as many as can be read, and raises for none.

    Args:
        model: see :class:`~lightning_qk.heads.reader.ProjectionReader`.
        modules: glob pattern or patterns on qualified names; None for all layers.
        fold_norm: see there.
        root: see there.

    Attributes:
        found: qualified names of all attention layers, whether or not a pattern matches.
    """

    found: list[str]

    def __init__(
        self,
        model: nn.Module,
        modules: Patterns = None,
        *,
        fold_norm: bool = False,
        root: nn.Module | None = None,
    ) -> None:
        self._modules_watched = modules
        super().__init__(model, fold_norm=fold_norm, root=root)

    def _plan(self, model: nn.Module) -> None:
        self.found = [site.name for site in attention_sites(model)]
        self.layers, self.unread = {}, {}
        try:
            super()._plan(model)
        except Exception:
            if len(self.layers) + len(self.unread) < len(self.found):
                self._plan_each(model)  # one layer took the others with it
        self.layers = {name: layer for name, layer in self.layers.items() if self._is_watched(name)}
        self.unread = {name: reason for name, reason in self.unread.items() if self._is_watched(name)}

    def _is_watched(self, name: str) -> bool:
        return matches(name, self._modules_watched)

    def _plan_each(self, model: nn.Module) -> None:
        self.layers, self.unread = {}, {}
        wrappers = self._wrappers(model)
        for site in attention_sites(model):
            try:
                self.layers[site.name] = layer_reader(site, self.fold_norm, wrappers)
            except UnreadLayer as reason:  # noqa: PERF203
                self.unread[site.name] = str(reason)
            except Exception as error:
                self.unread[site.name] = f"its weights could not be read ({type(error).__name__}: {error})"
