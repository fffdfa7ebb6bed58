"""What running models has shown of single layers, so that every reader of them plans by it."""

import operator
import weakref
from typing import NamedTuple

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


_findings: "weakref.WeakKeyDictionary[nn.Module, Finding]" = weakref.WeakKeyDictionary()


def settle(module: nn.Module, finding: Finding) -> None:
    """Let all readers of a layer know; those that exist notice at their next ``refresh``, if it is news."""
    known = finding_of(module)
    if known is None or not _is_same(known, finding):
        _findings[module] = finding


def finding_of(module: nn.Module) -> Finding | None:
    """What is known of a layer from its calls; None where nothing is."""
    return _findings.get(module)


def _is_same(one: Finding, other: Finding) -> bool:
    """Whether two findings say the same; calls, which hold tensors, have to be the very same."""
    ways = len(one.ways) == len(other.ways) and all(map(operator.is_, one.ways, other.ways))
    return ways and one._replace(ways=()) == other._replace(ways=())
