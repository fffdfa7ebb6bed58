"""Layers of one shape, read from their parameters and given gradients by as many operators as one layer takes."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.functional.precision import at_least_float32
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projection import Side
from lightning_qk.heads.reader import LARGEST_BATCH

_MOST_BESIDE = 2
"""Parameters that are so many times as large as what is taken of them are not copied whole."""


class _View(NamedTuple):
    """Where a side's weight, ``(heads, d_head, d_in)``, lies in its parameter, as of torch.as_strided."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_whole: bool

    def read(self, stacked: Tensor) -> Tensor:
        """Of copied parameters, ``(layers, ...)``: ``(layers, heads, d_head, d_in)``, one matrix after the other.

        Matrices of parameters that hold more lie apart: products would copy them each time. Those that are stored
        by columns stay so.
        """
        if self.is_whole:
            return stacked.view(-1, *self.size)
        if self.stride[1] == 1 and self.stride[2] != 1:
            return self.of(stacked, (0, 2, 1)).contiguous().mT
        return self.of(stacked).contiguous()

    def of(self, stacked: Tensor, order: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        """The view of such parameters, with its last axes in some order."""
        size, stride = ([own[axis] for axis in order] for own in (self.size, self.stride))
        return stacked.as_strided((len(stacked), *size), (stacked.stride(0), *stride), self.offset)


class _Gain(NamedTuple):
    """A gain of the rows of a side, ``parameter + added``, of one head or of all heads."""

    shape: tuple[int, ...]
    added: float


class _Place(NamedTuple):
    """What is equal in layers that are read together."""

    shapes: tuple[torch.Size, ...]
    query: _View
    key: _View
    gains: tuple[_Gain | None, _Gain | None]


class _Folded(NamedTuple):
    """One side's weight as it is stored, and its gain, which the weight that was read is the product of."""

    weight: Tensor
    gain: Tensor


class Weights(NamedTuple):
    """What :meth:`Stack.read` gives.

    Attributes:
        query: ``(layers, heads, d_head, d_in)``, a detached copy.
        key: likewise.
        folded: of each side that has a gain, what its weight is made of.
    """

    query: Tensor
    key: Tensor
    folded: tuple[_Folded | None, _Folded | None]


class Stack(NamedTuple):
    """Layers of one shape whose weights are views of parameters that are no other layer's.

    Attributes:
        names: of the layers.
        parameters: of each side that has some of its own, one a layer: one list where both sides share them.
        gains: of each side, one parameter a layer; empty where it has none.
        place: where query and key lie in them.
    """

    names: list[str]
    parameters: list[list[nn.Parameter]]
    gains: tuple[list[nn.Parameter], list[nn.Parameter]]
    place: _Place

    @torch.no_grad()
    def read(self) -> Weights:
        """Query and key weights of all layers."""
        stacked = [torch.stack(tuple(own)) for own in self.parameters]
        weights = self.place.query.read(stacked[0]), self.place.key.read(stacked[-1])
        query, key = (self._fold(side, weight) for side, weight in enumerate(weights))
        return Weights(query[0], key[0], (query[1], key[1]))

    def _fold(self, side: int, weight: Tensor) -> tuple[Tensor, _Folded | None]:
        kind = self.place.gains[side]
        if kind is None:
            return weight, None
        gain = at_least_float32(torch.stack(tuple(self.gains[side])))
        gain = (gain + kind.added if kind.added else gain).view(len(weight), -1, weight.shape[2], 1)
        return weight * gain, _Folded(weight, gain)

    def reaches(self, wanted: Collection[int]) -> tuple[bool, bool]:
        """Whether the weights of query and of key depend on a wanted parameter."""
        found = [any(id(parameter) in wanted for parameter in own) for own in self.parameters]
        of_gains = [any(id(parameter) in wanted for parameter in own) for own in self.gains]
        return found[0] or of_gains[0], found[-1] or of_gains[1]

    @torch.no_grad()
    def shares(
        self, gradients: Sequence[Tensor | None], weights: Weights, wanted: Collection[int]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients by the wanted parameters from those by what :meth:`read` gave, for query and key."""
        found: list[tuple[nn.Parameter, Tensor]] = []
        by_stored: list[Tensor | None] = []
        for gradient, folded, gains in zip(gradients, weights.folded, self.gains, strict=True):
            if gradient is None or folded is None:
                by_stored.append(gradient)
                continue
            by_stored.append(gradient * folded.gain)
            by_gain = (gradient * folded.weight).sum(-1)
            if folded.gain.shape[1] == 1:
                by_gain = by_gain.sum(1)
            found += zip(gains, by_gain.reshape(len(gains), *gains[0].shape).unbind(0), strict=True)
        sides = list(zip((self.place.query, self.place.key), by_stored, strict=True))
        is_shared = len(self.parameters) == 1
        for index, parameters in enumerate(self.parameters):
            parts = [(view, own) for view, own in (sides if is_shared else [sides[index]]) if own is not None]
            if not parts:
                continue
            shape = len(self.names), *parameters[0].shape
            (view, gradient), *_ = parts
            if view.is_whole:
                whole = gradient.reshape(shape)
            else:
                whole = gradient.new_zeros(shape)
                for view, gradient in parts:
                    view.of(whole).copy_(gradient)
            found += zip(parameters, whole.unbind(0), strict=True)
        return [pair for pair in found if id(pair[0]) in wanted]


def grouped(
    found: Mapping[str, tuple[Hashable, list[nn.Parameter]]],
) -> tuple[list[list[str]], list[str]]:
    """Names of layers that are read together, in batches of bounded size; and those of the others.

    Args:
        found: name → what is equal in layers that are read together, None for nothing; and parameters. Layers that
            share some with others, whose gradients would be written twice, are among the others.
    """
    holders = Counter(id(parameter) for _, own in found.values() for parameter in own)
    batches: dict[Hashable, list[list[str]]] = {}
    others = []
    sizes: dict[Hashable, int] = {}
    for name, (kind, own) in found.items():
        if kind is None or any(holders[id(parameter)] > 1 for parameter in own):
            others.append(name)
            continue
        size = sum(parameter.numel() for parameter in own)
        if kind not in batches or sizes[kind] + size > LARGEST_BATCH:
            batches.setdefault(kind, []).append([])
            sizes[kind] = 0
        batches[kind][-1].append(name)
        sizes[kind] += size
    return [batch for of_kind in batches.values() for batch in of_kind], others


class Stacker:
    """Finds layers that can be read together; where their weights lie, once for parameters of one shape."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[LayerReader, tuple[object, ...], _Place | None]] = {}

    def stacks(
        self, layers: Mapping[str, LayerReader], names: Iterable[str]
    ) -> tuple[list[Stack], list[str]]:
        """Layers that are read together, in batches of bounded size; and the names of the others."""
        own = {name: _parameters(layers[name]) for name in names}
        kinds: dict[str, tuple[Hashable, list[nn.Parameter]]] = {}
        for name, found in own.items():
            place = None if found is None else self._place(name, layers[name], found)
            parameters = [] if found is None else found.all
            kind = place, tuple((parameter.dtype, parameter.device) for parameter in parameters)
            kinds[name] = None if place is None else kind, parameters
        batches, others = grouped(kinds)
        stacks = []
        for batch in batches:
            found_of = [found for found in map(own.get, batch) if found is not None]
            place = self._places[batch[0]][2]
            assert place is not None  # those without one are others
            weights = [list(column) for column in zip(*(found.weights for found in found_of), strict=True)]
            of_query, of_key = (
                [gain[0] for found in found_of if (gain := found.gains[side]) is not None]
                for side in range(2)
            )
            stacks.append(Stack(batch, weights, (of_query, of_key), place))
        return stacks, others

    def _place(self, name: str, layer: LayerReader, own: "_Own") -> _Place | None:
        kind = tuple((parameter.shape, parameter.stride()) for parameter in own.all)
        known = self._places.get(name)
        if known is None or known[0] is not layer or known[1] != kind:
            known = layer, kind, _find(layer, own)
            self._places[name] = known
        return known[2]


class _Own(NamedTuple):
    """The parameters of a layer's query and key.

    Attributes:
        weights: one where both share it.
        gains: of each side, with what is added; None where it has none.
    """

    weights: list[nn.Parameter]
    gains: tuple[tuple[nn.Parameter, float] | None, tuple[nn.Parameter, float] | None]

    @property
    def all(self) -> list[nn.Parameter]:
        """All of them."""
        return self.weights + [gain[0] for gain in self.gains if gain is not None]


def _parameters(layer: LayerReader) -> _Own | None:
    """The parameters of query and key; None where the weights are not these, but for gains of their rows."""
    sides = layer.query, layer.key
    norms = [side.qk_norm for side in sides if side.qk_norm is not None]
    if layer.is_flat or len(layer.norms) != len(norms):
        return None
    if any(side.factor is not None or not side.projection.is_view() for side in sides):
        return None
    query, key = (side.projection.plain_weight() for side in sides)
    of_query, of_key = (None if side.qk_norm is None else side.qk_norm.stored_gain() for side in sides)
    if query is None or key is None or len(norms) != sum(gain is not None for gain in (of_query, of_key)):
        return None
    return _Own([query] if query is key else [query, key], (of_query, of_key))


@torch.no_grad()
def _find(layer: LayerReader, own: _Own) -> _Place | None:
    parameters = own.weights
    query, key = (
        _view(side, parameter, layer)
        for side, parameter in ((layer.query, parameters[0]), (layer.key, parameters[-1]))
    )
    if query is None or key is None:
        return None
    rows = [
        side.pick(torch.arange(side.projection.rows), layer.sizes).flatten().tolist()
        for side in (layer.query, layer.key)
    ]
    # What is both query and key would be written twice.
    if len(parameters) == 1 and set(rows[0]) & set(rows[1]):
        return None
    # All that is copied, against what is taken of it.
    if sum(parameter.numel() for parameter in parameters) > _MOST_BESIDE * layer.numel:
        return None
    of_query, of_key = (None if gain is None else _Gain(tuple(gain[0].shape), gain[1]) for gain in own.gains)
    return _Place(tuple(parameter.shape for parameter in parameters), query, key, (of_query, of_key))


def _view(side: Side, parameter: nn.Parameter, layer: LayerReader) -> _View | None:
    if not parameter.is_contiguous():
        return None
    view = side.view(parameter.detach(), layer.sizes)
    if view is None or view.dim() != 3:
        return None
    is_whole = view.numel() == parameter.numel() and view.is_contiguous()
    offset = int(view.storage_offset()) - int(parameter.storage_offset())
    return _View(tuple(view.shape), tuple(view.stride()), offset, is_whole)
