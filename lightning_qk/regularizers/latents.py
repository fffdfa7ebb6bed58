"""Layers of one shape whose weights are products of several, as of a latent that is expanded, read together."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projection import Composition, Projection, Side
from lightning_qk.regularizers.stacks import grouped


class _Step(NamedTuple):
    """Some rows of a composition, as :class:`~lightning_qk.heads.projection.Part`, by numbers of parameters."""

    places: tuple[int, ...]
    weight: int
    rows: tuple[int, ...]
    source: "tuple[_Step, ...] | None"
    gain: int | None
    added: float


class _Kind(NamedTuple):
    """How the weights of query and key follow from a layer's parameters: what is equal in layers read together.

    Attributes:
        steps: of query and of key.
        heads: of each, the rows of each head.
        parameters: what these are.
    """

    steps: tuple[tuple[_Step, ...], ...]
    heads: tuple[tuple[tuple[int, ...], ...], ...]
    parameters: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


class _Rows:
    """Takes some rows of each of several tables: a view where they are next to each other."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._run = slice(rows[0], rows[-1] + 1)
        is_run = list(rows) == list(range(self._run.start, self._run.stop))
        self._index = None if is_run else torch.tensor(rows)

    def of(self, table: Tensor) -> Tensor:
        """Of ``(tables, rows, ...)``."""
        if self._index is None:
            return table if self._run == slice(0, table.shape[1]) else table[:, self._run]
        self._index = self._index.to(table.device)
        return table.index_select(1, self._index)


class _Composed:
    """A composition of stacked parameters, ready to be run.

    Args:
        steps: of the composition.
        rows: which of its rows are wanted, in their order.
    """

    def __init__(self, steps: tuple[_Step, ...], rows: Sequence[int]) -> None:
        self._steps = [
            (
                step,
                _Rows(step.rows),
                None if step.source is None else _Composed(step.source, range(_number_of_rows(step.source))),
            )
            for step in steps
        ]
        made = {place: row for row, place in enumerate(place for step in steps for place in step.places)}
        self._wanted = _Rows([made[row] for row in rows])

    def of(self, parameters: Sequence[Tensor]) -> Tensor:
        """``(layers, rows, d_in)``."""
        parts = []
        for step, rows, source in self._steps:
            made = rows.of(parameters[step.weight])
            gain = None if step.gain is None else (parameters[step.gain] + step.added)[..., None]
            if source is not None:
                below = source.of(parameters)
                made = made @ (below if gain is None else below * gain)
            elif gain is not None:
                made = made * gain
            parts.append(made)
        return self._wanted.of(torch.cat(parts, 1) if len(parts) > 1 else parts[0])


def _number_of_rows(steps: tuple[_Step, ...]) -> int:
    return sum(len(step.places) for step in steps)


class _Program:
    """Makes the weights of query and key of layers of one kind; it is the same object for all of them."""

    def __init__(self, kind: _Kind) -> None:
        self.parameters = kind.parameters
        self._sides = [
            (_Composed(steps, [row for head in heads for row in head]), len(heads))
            for steps, heads in zip(kind.steps, kind.heads, strict=True)
        ]

    def run(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Query and key of stacked parameters, ``(layers, heads, d_head, d_in)``."""
        return [composed.of(parameters).unflatten(1, (heads, -1)) for composed, heads in self._sides]


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
            query, key = self.program.run(wide)
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

    def parameters(self) -> list[nn.Parameter]:
        """The layer's parameters, where they are what the program is of; else none."""
        own = [source() for source in self.sources]
        found = [one for one in own if one is not None]
        kept = self.program is not None and tuple(map(_kind, found)) == self.program.parameters
        return found if kept else []


class LatentStacker:
    """Finds layers whose weights are products that can be read together."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._programs: dict[_Kind, _Program] = {}

    def stacks(
        self, layers: Mapping[str, LayerReader], names: Iterable[str]
    ) -> tuple[list[LatentStack], list[str]]:
        """Layers that are read together, in batches of bounded size; and the names of the others."""
        own: dict[str, tuple[_Program | None, list[nn.Parameter]]] = {}
        for name in names:
            known = self._known.get(name)
            if known is None or known.layer is not layers[name]:
                known = self._known[name] = self._look_at(layers[name])
            parameters = known.parameters()
            own[name] = known.program if parameters else None, parameters
        batches, others = grouped(own)
        stacks = []
        for batch in batches:
            program = own[batch[0]][0]
            assert program is not None  # those without one are others
            columns = zip(*(own[name][1] for name in batch), strict=True)
            stacks.append(LatentStack(batch, [list(column) for column in columns], program))
        return stacks, others

    @torch.no_grad()
    def _look_at(self, layer: LayerReader) -> _Known:
        sides = layer.query, layer.key
        sources: dict[object, Callable[[], nn.Parameter | None]] = {}
        try:
            if layer.is_flat or layer.feeding is not None:
                raise _NotStacked
            steps = tuple(_steps_of(side, sources) for side in sides)
            own = [source() for source in sources.values()]
            found = tuple(_kind(one) for one in own if one is not None)
            if len(found) != len(own):
                raise _NotStacked
        except _NotStacked:
            return _Known(layer, None, [])
        rows = [side.pick(torch.arange(side.projection.rows), layer.sizes).tolist() for side in sides]
        kind = _Kind(steps, tuple(tuple(map(tuple, heads)) for heads in rows), found)
        program = self._programs.get(kind)
        if program is None:
            program = self._programs[kind] = _Program(kind)
        return _Known(layer, program, list(sources.values()))


def _kind(parameter: nn.Parameter) -> tuple[torch.Size, torch.dtype, torch.device]:
    return parameter.shape, parameter.dtype, parameter.device


class _NotStacked(Exception):
    """Something else than products of plain parameters is in a layer's weights."""


def _steps_of(side: Side, sources: dict[object, Callable[[], nn.Parameter | None]]) -> tuple[_Step, ...]:
    projection = side.projection
    if side.qk_norm is not None or side.factor is not None:
        raise _NotStacked
    if projection.composition is not None:
        return _steps(projection.composition, sources)
    every = tuple(range(projection.rows))
    return (_Step(every, _number(projection, sources), every, None, None, 0.0),)


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
        found.append(_Step(tuple(part.places.tolist()), weight, rows, source, gain, added))
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
