"""Layers of one shape whose weights are products of several, as of a latent that is expanded, read together."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projection import Composition, Projection, Side
from lightning_qk.heads.reader import LARGEST_BATCH


class _Step(NamedTuple):
    """Some rows of a composition, as :class:`~lightning_qk.heads.projection.Part`, by numbers of parameters."""

    places: tuple[int, ...]
    weight: int
    rows: tuple[int, ...] | None
    source: "tuple[_Step, ...] | None"
    gain: int | None
    added: float


class _Program(NamedTuple):
    """How the weights of query and key follow from a layer's parameters; what is equal in layers read together."""

    query: tuple[_Step, ...]
    key: tuple[_Step, ...]
    heads: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    kinds: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


class LatentWeights(NamedTuple):
    """What :meth:`LatentStack.read` gives.

    Attributes:
        query: ``(layers, heads, d_head, d_in)``.
        key: likewise.
        leaves: copies of the parameters that they follow from.
    """

    query: Tensor
    key: Tensor
    leaves: list[Tensor]


class LatentStack(NamedTuple):
    """Layers of one program; see :class:`~lightning_qk.regularizers.stacks.Stack`, which has the same methods.

    Attributes:
        names: of the layers.
        parameters: one list for each parameter of a layer, one a layer.
        program: of all of them.
    """

    names: list[str]
    parameters: list[list[nn.Parameter]]
    program: _Program

    def read(self) -> LatentWeights:
        """Query and key weights of all layers, differentiable in copies of their parameters."""
        with torch.no_grad():
            leaves = [torch.stack(tuple(column)).requires_grad_() for column in self.parameters]
        with torch.enable_grad(), full_precision(leaves[0].device):
            wide = [at_least_float32(leaf) for leaf in leaves]
            query, key = (
                _by_heads(_run(steps, wide), heads)
                for steps, heads in zip(self.program[:2], self.program.heads, strict=True)
            )
        return LatentWeights(query, key, leaves)

    def reaches(self, wanted: Collection[int]) -> tuple[bool, bool]:
        """Whether the weights depend on a wanted parameter: of either side, since latents may be shared."""
        found = any(id(parameter) in wanted for own in self.parameters for parameter in own)
        return found, found

    def shares(
        self, gradients: Sequence[Tensor | None], weights: LatentWeights, wanted: Collection[int]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients by the wanted parameters from those by what :meth:`read` gave, for query and key."""
        known = [pair for pair in zip(weights[:2], gradients, strict=True) if pair[1] is not None]
        if not known:
            return []
        made, by_made = zip(*known, strict=True)
        with full_precision(made[0].device):
            by_leaves = torch.autograd.grad(made, weights.leaves, by_made, allow_unused=True)
        return [
            (parameter, share)
            for column, whole in zip(self.parameters, by_leaves, strict=True)
            if whole is not None
            for parameter, share in zip(column, whole.unbind(0), strict=True)
            if id(parameter) in wanted
        ]


class _Known(NamedTuple):
    """What was found of a layer.

    Attributes:
        layer: that it was found of.
        program: None where its weights are no such products.
        sources: give the parameters as they are now; None where one is no plain parameter any more.
    """

    layer: LayerReader
    program: _Program | None
    sources: list[Callable[[], nn.Parameter | None]]

    def parameters(self) -> list[nn.Parameter] | None:
        """The layer's parameters, where they are what the program is of."""
        if self.program is None:
            return None
        own = [source() for source in self.sources]
        found = [one for one in own if one is not None]
        return found if tuple(map(_kind, found)) == self.program.kinds else None


class LatentStacker:
    """Finds layers whose weights are products that can be read together."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def stacks(
        self, layers: Mapping[str, LayerReader], names: Iterable[str]
    ) -> tuple[list[LatentStack], list[str]]:
        """Layers that are read together, in batches of bounded size; and the names of the others."""
        own: dict[str, list[nn.Parameter]] = {}
        holders: Counter[int] = Counter()
        others: list[str] = []
        for name in names:
            known = self._known.get(name)
            if known is None or known.layer is not layers[name]:
                known = self._known[name] = _look_at(layers[name])
            parameters = known.parameters()
            if parameters is None:
                others.append(name)
                continue
            own[name] = parameters
            holders.update(map(id, parameters))
        groups: dict[_Program | None, list[LatentStack]] = {}
        for name, parameters in own.items():
            program = self._known[name].program
            if program is None or any(holders[id(parameter)] > 1 for parameter in parameters):
                others.append(name)
                continue
            stacks = groups.setdefault(program, [])
            size = sum(parameter.numel() for parameter in parameters)
            if not stacks or (len(stacks[-1].names) + 1) * size > LARGEST_BATCH:
                stacks.append(LatentStack([], [[] for _ in parameters], program))
            stacks[-1].names.append(name)
            for column, parameter in zip(stacks[-1].parameters, parameters, strict=True):
                column.append(parameter)
        return [stack for stacks in groups.values() for stack in stacks], others


def _kind(parameter: nn.Parameter) -> tuple[torch.Size, torch.dtype, torch.device]:
    return parameter.shape, parameter.dtype, parameter.device


class _NotStacked(Exception):
    """Something else than products of plain parameters is in a layer's weights."""


@torch.no_grad()
def _look_at(layer: LayerReader) -> _Known:
    sides = layer.query, layer.key
    sources: dict[object, Callable[[], nn.Parameter | None]] = {}
    try:
        if layer.is_flat or layer.feeding is not None:
            raise _NotStacked
        steps, heads = zip(*(_steps_of(side, layer, sources) for side in sides), strict=True)
        own = [source() for source in sources.values()]
        kinds = tuple(_kind(one) for one in own if one is not None)
        if len(kinds) != len(own):
            raise _NotStacked
        return _Known(
            layer, _Program(steps[0], steps[1], (heads[0], heads[1]), kinds), list(sources.values())
        )
    except _NotStacked:
        return _Known(layer, None, [])


def _steps_of(
    side: Side, layer: LayerReader, sources: dict[object, Callable[[], nn.Parameter | None]]
) -> tuple[tuple[_Step, ...], tuple[tuple[int, ...], ...]]:
    """The steps of one side, and which of the rows belong to each head."""
    projection = side.projection
    if side.qk_norm is not None or side.factor is not None:
        raise _NotStacked
    rows = side.pick(torch.arange(projection.rows), layer.sizes)
    heads = tuple(map(tuple, rows.tolist()))
    if projection.composition is not None:
        return _steps(projection.composition, sources), heads
    return (_Step(tuple(range(projection.rows)), _number(projection, sources), None, None, None, 0.0),), heads


def _steps(
    composition: Composition, sources: dict[object, Callable[[], nn.Parameter | None]]
) -> tuple[_Step, ...]:
    found = []
    for part in composition.parts:
        if part.factor is not None:
            raise _NotStacked
        weight = _number(part.projection, sources)
        rows = tuple(torch.arange(part.projection.rows)[part.rows].tolist())
        source = None if part.source is None else _steps(part.source, sources)
        gain, added = None, 0.0
        if part.norm is not None:
            stored = part.norm.stored_gain()
            if stored is None:
                raise _NotStacked
            added, plan = stored[1], part.norm
            sources.setdefault(plan, lambda plan=plan: (plan.stored_gain() or (None,))[0])  # type: ignore[misc]
            gain = list(sources).index(plan)
        whole = rows == tuple(range(part.projection.rows))
        found.append(_Step(tuple(part.places.tolist()), weight, None if whole else rows, source, gain, added))
    return tuple(found)


def _number(projection: Projection, sources: dict[object, Callable[[], nn.Parameter | None]]) -> int:
    """Which of the parameters a projection's weight is."""
    weight = projection.plain_weight()
    if weight is None or weight.shape != (projection.rows, projection.columns) or not projection.is_view():
        raise _NotStacked
    if projection.as_rows(weight).stride() != weight.stride():
        raise _NotStacked
    sources.setdefault(projection, projection.plain_weight)
    return list(sources).index(projection)


def _run(steps: tuple[_Step, ...], parameters: Sequence[Tensor]) -> Tensor:
    """The composition of stacked parameters, ``(layers, rows, d_in)``."""
    parts = []
    for step in steps:
        made = parameters[step.weight]
        if step.rows is not None:
            made = _rows(made, step.rows)
        gain = None if step.gain is None else parameters[step.gain] + step.added
        if step.source is not None:
            below = _run(step.source, parameters)
            made = made @ (below if gain is None else below * gain[..., None])
        elif gain is not None:
            made = made * gain[..., None]
        parts.append(made)
    whole = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    places = [place for step in steps for place in step.places]
    order = sorted(range(len(places)), key=places.__getitem__)
    return _rows(whole, order)


def _rows(table: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of each of several tables: a view where they are next to each other."""
    first, last = rows[0], rows[-1] + 1
    if list(rows) == list(range(first, last)):
        return table if last - first == table.shape[1] else table[:, first:last]
    return table.index_select(1, torch.tensor(rows, device=table.device))


def _by_heads(table: Tensor, heads: tuple[tuple[int, ...], ...]) -> Tensor:
    return _rows(table, [row for head in heads for row in head]).unflatten(1, (len(heads), -1))
