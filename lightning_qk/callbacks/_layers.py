"""Which layers a callback works on: those that patterns match, that can be read, that train."""

import re
from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch import Trainer
from torch import nn

from lightning_qk.architecture.labels import matches, no_match
from lightning_qk.callbacks._trainer import describe_error, stepped_parameters
from lightning_qk.heads.layer import layer_reader
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.heads.sites import AttentionLayer, attention_sites

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


def matching(names: Iterable[str], modules: Patterns) -> list[str]:
    """The names that match one of the patterns."""
    return [name for name in names if matches(name, modules)]


def chosen_sites(model: nn.Module, modules: Patterns) -> list[AttentionLayer]:
    """Attention layers whose names match one of the patterns.

    Raises:
        ValueError: there are none.
    """
    sites = list(attention_sites(model))
    chosen = [site for site in sites if matches(site.name, modules)]
    if not chosen:
        raise no_match([site.name for site in sites], {}, modules)
    return chosen


def training_layers(trainer: Trainer, pl_module: nn.Module, layers: Iterable[str]) -> set[str]:
    """The layers that belong to networks that the optimizers change.

    A layer trains where one of its own parameters does (those of an adapter count), or one of its stack: the list
    of blocks that it is in. So a layer that is frozen among others that train counts, and a teacher, a copy of
    averaged weights or a frozen reference does not. Where nothing is known, or no layer trains, all do.

    Args:
        trainer: the trainer, from ``on_fit_start``.
        pl_module: its module.
        layers: qualified names of modules of ``pl_module``.

    Returns:
        Their names; never empty where ``layers`` is not.
    """
    names = list(layers)
    modules = dict(pl_module.named_modules())
    changed = {id(parameter) for parameter in stepped_parameters(trainer) if parameter.requires_grad}
    parts: dict[str, bool] = {}
    for ids in (changed, None):
        # An optimizer may have copies of its own of the parameters: then only requires_grad is known.
        parts = {}
        found = {name for name in names if _trains(name, modules, ids, parts)}
        if found:
            return found
    return set(names)


def _trains(
    name: str, modules: Mapping[str, nn.Module], changed: set[int] | None, parts: dict[str, bool]
) -> bool:
    own = modules.get(name)
    if own is None or _has_any(own, changed):
        return True
    stack = stack_of(name)
    if stack not in parts:
        module = modules.get(stack) if stack else None
        parts[stack] = module is not None and _has_any(module, changed)
    return parts[stack]


def _has_any(module: nn.Module, changed: set[int] | None) -> bool:
    return any(
        parameter.requires_grad if changed is None else id(parameter) in changed
        for parameter in module.parameters()
    )


def stack_of(name: str) -> str:
    """The list of blocks that a layer is in, by its qualified name; its parent where there is none."""
    found = list(re.finditer(r"\.\d+(?=\.|$)", name))
    return name[: found[-1].start()] if found else name.rpartition(".")[0]


class WatchedReader(ProjectionReader):
    """Reads the projections of the layers that patterns match, as many as can be read, and raises for none.

    Args:
        model: see :class:`~lightning_qk.heads.reader.ProjectionReader`.
        modules: glob pattern or patterns on qualified names; None for all layers.
        fold_norm: see there.
        root: see there.
    """

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
        self.found = {site.name: site.is_cross for site in attention_sites(model)}
        self.layers, self.refusals = {}, {}
        try:
            super()._plan(model)
        except Exception:
            if len(self.layers) + len(self.refusals) < len(self.found):
                self._plan_each(model)  # one layer took the others with it
        self.layers = {name: layer for name, layer in self.layers.items() if self._is_watched(name)}
        self.refusals = {name: own for name, own in self.refusals.items() if self._is_watched(name)}

    def go_by(self, labels: Mapping[str, str], heads: Mapping[str, int]) -> None:
        """Keep the layers under the names that they had before modules were replaced.

        An adapter that is merged and unloaded takes its wrapper's part of all names away: layers without a name
        of before that have the same labels and heads, all of them, are the same.

        Args:
            labels: name → label, of the layers as they were.
            heads: name → heads, in the model's order.
        """
        now = self.labels
        same = [(now[name], layer.heads) for name, layer in self.layers.items()]
        if same == [(labels[name], count) for name, count in heads.items()]:
            self.layers = dict(zip(heads, self.layers.values(), strict=True))

    def _is_watched(self, name: str) -> bool:
        return matches(name, self._modules_watched)

    def _plan_each(self, model: nn.Module) -> None:
        self.layers, self.refusals = {}, {}
        wrappers = self._wrappers(model)
        for site in attention_sites(model):
            try:
                self.layers[site.name] = layer_reader(site, self.fold_norm, wrappers)
            except UnreadLayer as reason:  # noqa: PERF203
                self.refusals[site.name] = UnreadLayer(str(reason))
            except Exception as error:
                text = f"its weights could not be read ({describe_error(error)})"
                self.refusals[site.name] = UnreadLayer(text)
