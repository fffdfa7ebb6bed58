"""What running models has shown of single layers, so that every reader of them plans by it."""

import operator
import weakref
from typing import Any, NamedTuple

from torch import nn

from lightning_qk.heads.layouts import Layout
from lightning_qk.heads.trials import Trial


class Finding(NamedTuple):
    """What a layer's real call has shown.

    Attributes:
        ways: how it was called, where it has to be run so to be read.
        layout: the layout by which it has to be read, since that gave what its attention received.
        added: parameters of the layer that are added to its queries besides.
        reason: why it has to be left out; None to read it.
        self_attention: whether queries and keys are made of the same tokens; None where that was not seen.
    """

    ways: tuple[Trial, ...] = ()
    layout: Layout | None = None
    added: tuple[str, ...] = ()
    reason: str | None = None
    self_attention: bool | None = None


_findings: "weakref.WeakKeyDictionary[nn.Module, tuple[Finding, list[Any]]]" = weakref.WeakKeyDictionary()


def settle(module: nn.Module, finding: Finding) -> None:
    """Let all readers of a layer know; those that exist notice at their next ``refresh``, if it is news."""
    known, make_up = _findings.get(module), _make_up(module)
    if known is None or known[1] != make_up or not _is_same(known[0], finding):
        _findings[module] = finding, make_up


def finding_of(module: nn.Module) -> Finding | None:
    """What is known of a layer from its calls; None where nothing is."""
    known = _findings.get(module)
    return None if known is None else known[0]


def forget_changed(model: nn.Module) -> None:
    """Forget what is known of layers that are not what they were: their modules, forwards or settings changed."""
    for module in model.modules():
        known = _findings.get(module)
        if known is not None and known[1] != _make_up(module):
            del _findings[module]


def _make_up(module: nn.Module) -> list[Any]:
    """What a layer computes by, but for its weights' values."""
    plain = (bool, int, float, str, type(None))
    return [
        (
            name,
            id(part),
            type(part),
            getattr(vars(part).get("forward"), "__func__", vars(part).get("forward")),
            {key: own for key, own in vars(part).items() if isinstance(own, plain) and key != "training"},
        )
        for name, part in module.named_modules()
    ]


def _is_same(one: Finding, other: Finding) -> bool:
    """Whether two findings say the same; calls, which hold tensors, have to be the very same."""
    ways = len(one.ways) == len(other.ways) and all(map(operator.is_, one.ways, other.ways))
    return ways and one._replace(ways=()) == other._replace(ways=())
