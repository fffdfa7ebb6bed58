"""Follows elements of weights that are no projection's: bare parameters, multiplied in a layer's own forward."""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.heads.projection import Part, Projection, StoredWeight, composed, parameter_projection
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.row_numbers import NAMES, SIDES, FoundSide, Numbers, RowFollower, Sample, common_rows
from lightning_qk.heads.running import Bench, Loose, Seen, constant, tolerance, varied_parameters
from lightning_qk.heads.trials import Trial

Reading = Callable[[Trial, dict[int, Tensor]], Tensor]
"""One side of a product for a call and for parameters by id, in float64."""

_NOTHING = constant(torch.zeros(0))


class _Elements(NamedTuple):
    """What the features of one side are made with.

    Attributes:
        numbers: of the row that each feature is, (..., tokens, d_head): rows of all plans in a row.
        factor: on all of them.
        biases: for each feature the number of the element that is added, over all parameters; -1 for none.
    """

    numbers: Tensor
    factor: float
    biases: Tensor


class _Weight(NamedTuple):
    """A parameter that is read as a weight, and the number of its first row."""

    first: int
    plan: Projection

    @property
    def stored(self) -> StoredWeight:
        """Where its rows lie."""
        assert self.plan.stored is not None  # as of every parameter
        return self.plan.stored

    def owns(self, numbers: Tensor) -> Tensor:
        """Where numbers are those of its rows."""
        return (numbers >= self.first) & (numbers < self.first + self.plan.rows)


class BareFollower(RowFollower):
    """Finds which elements of bare parameters each feature of q and k is made with, one parameter at a time.

    Given an input whose tokens are all one unit vector, a feature of ``x @ W``, ``F.linear(x, W[:d])``,
    ``einsum("bnd,dhe->bhne", x, W)`` or any other product is one element of ``W``, known by its number.
    """

    def __init__(self, bench: Bench, trial: Trial) -> None:
        super().__init__(bench, trial)
        self._weights: dict[int, _Weight] = {}
        self._elements: dict[tuple[int, str], _Elements] = {}
        self._columns = {tensor.shape[-1] for tensor in trial.given.values()}

    @property
    def size(self) -> int:
        """How many rows there are in all."""
        return sum(own.plan.rows for own in self._weights.values())

    def own_parameters(self) -> set[int]:
        """Parameters that are read as weights or biases, by id."""
        return {*self._weights, *(id(own.parameter) for own in self._added())}

    def _added(self) -> list[Loose]:
        """Parameters of which elements are added to some feature."""
        used = [torch.zeros(0, dtype=torch.long)] + [
            own.biases.flatten().cpu() for own in self._elements.values()
        ]
        return [own for own in self.bench.loose if bool(own.owns(torch.cat(used)).any())]

    def number_rows(self) -> None:
        """Run the layer once, to see its products."""
        self._run(torch.zeros(0))

    def numbers_of(self, place: int, side: str) -> Numbers:
        """The rows that one side of a product is."""

        def read(trial: Trial, given: dict[int, Tensor]) -> Tensor:
            seen = self.bench.run(trial, _NOTHING, given)
            if len(seen.products) != len(self.runs[0].products):
                raise UnreadLayer("it takes other products when its parameters change")
            return getattr(seen.products[place], side).double()

        found = self._elements[place, side] = self._find(read, NAMES[side])
        return Numbers(found.numbers, found.factor)

    def _find(self, read: Reading, what: str) -> _Elements:
        """What one side is made with.

        Raises:
            UnreadLayer: some of its features are no elements of one parameter, each with one factor.
        """
        numbers: Tensor | None = None
        factor = 0.0
        for loose in self.bench.loose:
            parameter = loose.parameter
            if parameter.dim() < 2 or parameter.numel() < max(self._columns):
                continue
            found = self._of(loose, read)
            if found is None:
                continue
            own, own_factor = found
            if numbers is not None and (bool(((numbers >= 0) & (own >= 0)).any()) or factor != own_factor):
                raise UnreadLayer(f"{what} are sums of several products, or have factors that differ")
            numbers = own if numbers is None else torch.where(own >= 0, own, numbers)
            factor = own_factor
        if numbers is None or bool((numbers < 0).any()):
            raise UnreadLayer(f"{what} are not rows of its projections alone, each with one factor")
        return _Elements(numbers, factor, self._biases(read, numbers, factor, what))

    def _of(self, loose: Loose, read: Reading) -> tuple[Tensor, float] | None:
        """Row numbers of the features that a parameter makes, -1 elsewhere, and their factor."""
        parameter = loose.parameter
        for columns in self._columns:
            if parameter.numel() % columns:
                continue

            def change(values: Tensor, column: int, columns: int = columns) -> Tensor:
                given = {id(parameter): values.to(parameter).view(parameter.shape)}
                return read(_unit(self.trial, columns, column), given) - read(
                    _unit(self.trial, columns, None), given
                )

            zero, one = (change(make(parameter), 0) for make in (torch.zeros_like, torch.ones_like))
            factors = one - zero
            scale = float(factors.abs().max())
            mine = factors.abs() > 1e-6 * scale
            if not scale > 0 or bool((zero.abs()[mine] > 1e-6 * scale).any()):
                continue
            factor = float(factors[mine][0])
            if not float((factors[mine] - factor).abs().max()) <= tolerance(parameter) * abs(factor):
                continue
            starts, ends = (
                _numbered(parameter, functools.partial(change, column=column), factor, mine)
                for column in (0, columns - 1)
            )
            if starts is None or ends is None:
                continue
            strides = (ends - starts)[mine]
            stride = int(strides[0]) // max(columns - 1, 1)
            if stride < 1 or bool((strides != stride * (columns - 1)).any()):
                continue
            if bool((starts[mine] // stride % columns != 0).any()):
                continue
            weight = self._weight(loose, columns, stride)
            if (weight.stored.stride, weight.stored.columns) != (stride, columns):
                continue
            rows = starts // (columns * stride) * stride + starts % stride + weight.first
            return torch.where(mine, rows, -1), factor
        return None

    def _weight(self, loose: Loose, columns: int, stride: int) -> _Weight:
        key = id(loose.parameter)
        if key not in self._weights:
            plan = parameter_projection(
                loose.owner, loose.name, columns=columns, stride=stride, path=loose.path
            )
            self._weights[key] = _Weight(self.size, plan)
        return self._weights[key]

    def _biases(self, read: Reading, numbers: Tensor, factor: float, what: str) -> Tensor:
        """Which element of a bias is added to each feature."""
        none = _unit(self.trial, None, None)
        biases = torch.full_like(numbers, -1)
        for loose in self.bench.loose:
            parameter = loose.parameter
            if parameter.numel() > self.size or id(parameter) in self._weights:
                continue
            zero, one = (
                read(none, {id(parameter): make(parameter)}) for make in (torch.zeros_like, torch.ones_like)
            )
            factors = one - zero
            mine = factors.abs() > 1e-6 * abs(factor)
            if not bool(mine.any()):
                continue
            if not float((factors[mine] - factor).abs().max()) <= tolerance(parameter) * abs(factor):
                raise UnreadLayer(
                    f"{what} depend on its parameter {loose.path!r} by no sum of one of its elements"
                )

            def change(values: Tensor, parameter: Tensor = parameter, zero: Tensor = zero) -> Tensor:
                return read(none, {id(parameter): values.to(parameter).view(parameter.shape)}) - zero

            found = _numbered(parameter, change, factor, mine)
            if found is None or bool((biases[mine] >= 0).any()):
                raise UnreadLayer(f"{what} have several sums of parameters added to them")
            biases = torch.where(mine, found + loose.first, biases)
        return biases

    def add_biases(self, place: int) -> None:
        """Let the weights that make a product know what is added to their rows.

        Raises:
            UnreadLayer: several parameters to the rows of one, or different elements to one row.
        """
        for side in SIDES:
            elements = self._elements[place, side]
            numbers, biases = elements.numbers.flatten().cpu(), elements.biases.flatten().cpu()
            for weight in self._weights.values():
                for loose in self.bench.loose:
                    own = weight.owns(numbers) & loose.owns(biases)
                    if not bool(own.any()):
                        continue
                    bias, known = weight.stored.bias, weight.stored.places
                    if bias is not None and bias is not loose.parameter:
                        raise UnreadLayer(f"several parameters are added to the rows of {weight.plan.name!r}")
                    if bias is None or isinstance(known, slice):
                        known = torch.full((weight.plan.rows,), -1)
                    places = known.clone()
                    places[numbers[own] - weight.first] = biases[own] - loose.first
                    weight.stored.bias_owner = weakref.ref(loose.owner)
                    weight.stored.bias_name, weight.stored.places = loose.name, places

    def sample(
        self,
        seed: int,
        scale: float,
        *,
        trial: Trial | None = None,
        varied: Iterable[Loose] = (),
        shifted: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> Sample:
        """Run the layer with random weights, on a random input; arguments as for projections."""
        generator = torch.Generator().manual_seed(seed)
        shift = torch.Generator().manual_seed(seed + 100)

        def drawn(shape: Sequence[int]) -> Tensor:
            return torch.randn(tuple(shape), generator=generator)

        given = varied_parameters(varied)
        for key, weight in self._weights.items():
            parameter, columns, stride = weight.stored.weight, weight.plan.columns, weight.stored.stride
            assert parameter is not None  # bare ones are no parametrization's
            values = drawn(parameter.shape) / columns**0.5
            blocks = values.view(-1, columns, stride)
            if shifted is not None:
                own = shifted[weight.owns(shifted)] - weight.first
                blocks[own // stride, :, own % stride] += torch.randn(len(own), columns, generator=shift)
            if factors is not None:
                blocks *= factors[weight.first : weight.first + weight.plan.rows].view(-1, 1, stride)
            given[key] = values.to(parameter)
        biases = torch.cat(
            [torch.zeros(0), *(drawn((loose.parameter.numel(),)) for loose in self.bench.loose)]
        )
        if factors is not None:
            # Biases belong to rows too: without them products are as they were.
            places = torch.cat([found.biases.flatten().cpu() for found in self._elements.values()])
            biases[places[places >= 0]] = 0.0
        for loose in self._added():
            own = biases[loose.first : loose.first + loose.parameter.numel()]
            given[id(loose.parameter)] = own.view(loose.parameter.shape).to(loose.parameter)
        trial = (trial or self.trial).mapped(lambda own: (scale * drawn(own.shape)).to(own))
        seen = self.bench.run(trial, _NOTHING, given)
        tokens = [own.flatten(0, -2).double() for own in trial.given.values()]
        added = {
            int(number): int(bias)
            for found in self._elements.values()
            for number, bias in zip(
                found.numbers.flatten().tolist(), found.biases.flatten().tolist(), strict=True
            )
        }

        def made(numbers: Tensor) -> Tensor | None:
            out = []
            for own in tokens:
                columns: list[Tensor] = []
                for number in numbers.tolist():
                    for key, weight in self._weights.items():
                        at = number - weight.first
                        if 0 <= at < weight.plan.rows and weight.plan.columns == own.shape[-1]:
                            row = weight.plan.as_rows(given[key])[at].double()
                            bias = added.get(number, -1)
                            columns.append(own @ row + (float(biases[bias]) if bias >= 0 else 0.0))
                if len(columns) == len(numbers):
                    out.append(torch.stack(columns, -1))
            return torch.cat(out) if out else None

        return Sample(seen, made)

    def run_on_zeros(self, varied: Iterable[Loose] = ()) -> Seen:
        """Run the layer with all parameters zero but for those that are varied and make no queries or keys."""
        given = {id(own.parameter): torch.zeros_like(own.parameter) for own in self.bench.loose}
        own = self.own_parameters()
        others = {key: value for key, value in varied_parameters(varied).items() if key not in own}
        return self.bench.run(self.trial, _NOTHING, given | others)

    def side(self, numbers: Tensor, what: str) -> FoundSide:
        """The parameters that make some rows of q or k, (heads, d_head).

        Raises:
            UnreadLayer: they map something else than one of the layer's inputs.
        """
        inputs = list(self.trial.given.values())
        for passed in self.runs[0].passed:
            if not any(own.shape == passed.given.shape and torch.equal(passed.given, own) for own in inputs):
                raise UnreadLayer("a norm stands behind projections that are bare parameters")
        flat = numbers.flatten()
        parts = []
        for weight in self._weights.values():
            places = weight.owns(flat).nonzero()[:, 0]
            if len(places):
                parts.append(Part(places, weight.plan, flat[places] - weight.first))
        given = self._source(numbers, {part.projection.columns for part in parts})
        if given is None:
            raise UnreadLayer(f"its {what} are computed from none of its inputs, or from several")
        if len(parts) == 1:
            (part,) = parts
            assert isinstance(part.rows, Tensor)  # as made above
            return FoundSide(part.projection, part.rows.view(numbers.shape), None, given)
        rows = torch.arange(len(flat)).view(numbers.shape)
        return FoundSide(composed(parts), rows, None, given, shared=common_rows(numbers))

    def check_rows(self, numbers: Tensor, what: str) -> None:
        """Rows are elements of parameters, which map the layer's input."""

    def _source(self, numbers: Tensor, columns: set[int]) -> str | None:
        """The only input of some widths whose change changes some rows."""
        names = [name for name, own in self.trial.given.items() if own.shape[-1] in columns]
        if len(names) == 1:
            return names[0]
        wanted = set(numbers.flatten().tolist())
        found = set()
        base = self.bench.run(self.trial, _NOTHING)
        # Of those that are one tensor the first.
        for name in {id(self.trial.given[name]): name for name in names[::-1]}.values():
            tensor = self.trial.given[name]
            other = self.trial.mapped(lambda own, tensor=tensor: own + 1.0 if own is tensor else own)  # type: ignore[misc]
            seen = self.bench.run(other, _NOTHING)
            for (place, side), own in self._elements.items():
                before, after = (getattr(run.products[place], side) for run in (base, seen))
                if wanted.issubset(own.numbers.flatten().tolist()) and bool((before != after).any()):
                    found.add(name)
        return found.pop() if len(found) == 1 else None


def _numbered(
    parameter: Tensor, read: Callable[[Tensor], Tensor], factor: float, mine: Tensor
) -> Tensor | None:
    """Which element each feature is, from its digits."""
    size = parameter.numel()
    base = 32 if parameter.element_size() < 4 else 1024
    found = torch.zeros(mine.shape, dtype=torch.long, device=mine.device)
    place = 1
    while place < size or place == 1:
        digits = torch.arange(size, device=parameter.device) // place % base
        value = read(digits / base) * base / factor
        rounded = value.round()
        if not float((value - rounded)[mine].abs().max()) <= 0.25:
            return None
        found += rounded.long() * place
        place *= base
    return found if bool((found[mine] >= 0).all()) and bool((found[mine] < size).all()) else None


def _unit(trial: Trial, columns: int | None, column: int | None) -> Trial:
    """A call whose tokens are all one unit vector, or zero."""

    def filled(tensor: Tensor) -> Tensor:
        values = torch.zeros_like(tensor)
        if column is not None and tensor.shape[-1] == columns:
            values[..., column] = 1.0
        return values

    return trial.mapped(filled)
