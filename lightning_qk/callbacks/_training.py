"""Which layers of a module train, and which are copies that only look on: teachers, references, averages."""

import re
from collections.abc import Iterable, Mapping

from lightning.pytorch import Trainer
from torch import nn


def training_layers(trainer: Trainer, pl_module: nn.Module, layers: Iterable[str]) -> set[str]:
    """Of some layers, those whose network the optimizers change.

    A layer trains where one of its own parameters does (those of an adapter count), or one of its stack: the list
    of blocks that it is in. So a layer that is frozen among others that train counts, and a teacher, a copy of
    averaged weights or a frozen reference does not. Where nothing can be told, or no layer trains, all do.

    Args:
        trainer: the trainer, from ``on_fit_start``.
        pl_module: its module.
        layers: qualified names of modules of ``pl_module``.

    Returns:
        Their names; never empty where ``layers`` is not.
    """
    names = list(layers)
    modules = dict(pl_module.named_modules())
    changed = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    parts: dict[str, bool] = {}
    for ids in (changed, None):
        # An optimizer may have copies of its own of the parameters: then only who asks for gradients is known.
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
