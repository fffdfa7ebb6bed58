"""Layers of one shape, read from their parameters and given gradients by as many operators as one layer takes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

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


class _Place(NamedTuple):
    """What is equal in layers that are read together."""

    shapes: tuple[torch.Size, ...]
    query: _View
    key: _View


class Stack(NamedTuple):
    """Layers of one shape whose weights are views of parameters that are no other layer's.

    Attributes:
        names: of the layers.
        parameters: of each side that has some of its own, one a layer: one list where both sides share them.
        place: where query and key lie in them.
    """

    names: list[str]
    parameters: list[list[nn.Parameter]]
    place: _Place

    @torch.no_grad()
    def read(self) -> tuple[Tensor, Tensor]:
        """Query and key weights, ``(layers, heads, d_head, d_in)``, detached copies."""
        stacked = [torch.stack(tuple(own)) for own in self.parameters]
        return self.place.query.read(stacked[0]), self.place.key.read(stacked[-1])

    def reaches(self, wanted: Collection[int]) -> tuple[bool, bool]:
        """Whether the weights of query and of key depend on a wanted parameter."""
        found = [any(id(parameter) in wanted for parameter in own) for own in self.parameters]
        return found[0], found[-1]

    @torch.no_grad()
    def shares(
        self, gradients: Sequence[Tensor | None], wanted: Collection[int]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients by the wanted parameters from those by what :meth:`read` gave, for query and key."""
        sides = list(zip((self.place.query, self.place.key), gradients, strict=True))
        is_shared = len(self.parameters) == 1
        found = []
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
            found += [pair for pair in zip(parameters, whole.unbind(0), strict=True) if id(pair[0]) in wanted]
        return found


class Stacker:
    """Finds layers that can be read together; where their weights lie, once for parameters of one shape."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[LayerReader, tuple[object, ...], _Place | None]] = {}

    def stacks(
        self, layers: Mapping[str, LayerReader], names: Iterable[str]
    ) -> tuple[list[Stack], list[str]]:
        """Layers that are read together, in batches of bounded size; and the names of the others."""
        own: dict[str, list[nn.Parameter]] = {}
        holders: dict[int, int] = {}
        others: list[str] = []
        for name in names:
            parameters = _parameters(layers[name])
            if parameters is None:
                others.append(name)
                continue
            own[name] = parameters
            for parameter in parameters:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        groups: dict[tuple[object, ...], list[Stack]] = {}
        for name, parameters in own.items():
            place = self._place(name, layers[name], parameters)
            if place is None or any(holders[id(parameter)] > 1 for parameter in parameters):
                others.append(name)
                continue
            kinds = tuple((parameter.dtype, parameter.device) for parameter in parameters)
            stacks = groups.setdefault((place, kinds), [])
            size = sum(parameter.numel() for parameter in parameters)
            if not stacks or (len(stacks[-1].names) + 1) * size > LARGEST_BATCH:
                stacks.append(Stack([], [[] for _ in parameters], place))
            stacks[-1].names.append(name)
            for column, parameter in zip(stacks[-1].parameters, parameters, strict=True):
                column.append(parameter)
        return [stack for stacks in groups.values() for stack in stacks], others

    def _place(self, name: str, layer: LayerReader, parameters: list[nn.Parameter]) -> _Place | None:
        kind = tuple((parameter.shape, parameter.stride()) for parameter in parameters)
        known = self._places.get(name)
        if known is None or known[0] is not layer or known[1] != kind:
            known = layer, kind, _find(layer, parameters)
            self._places[name] = known
        return known[2]


def _parameters(layer: LayerReader) -> list[nn.Parameter] | None:
    """The parameters of query and key, one where they share it; None where the weights are no plain parameters."""
    if not layer.is_view() or layer.is_flat:
        return None
    query, key = layer.query.projection.plain_weight(), layer.key.projection.plain_weight()
    if query is None or key is None:
        return None
    return [query] if query is key else [query, key]


@torch.no_grad()
def _find(layer: LayerReader, parameters: list[nn.Parameter]) -> _Place | None:
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
    return _Place(tuple(parameter.shape for parameter in parameters), query, key)


def _view(side: Side, parameter: nn.Parameter, layer: LayerReader) -> _View | None:
    if not parameter.is_contiguous():
        return None
    view = side.view(parameter.detach(), layer.sizes)
    if view is None or view.dim() != 3:
        return None
    is_whole = view.numel() == parameter.numel() and view.is_contiguous()
    offset = int(view.storage_offset()) - int(parameter.storage_offset())
    return _View(tuple(view.shape), tuple(view.stride()), offset, is_whole)
