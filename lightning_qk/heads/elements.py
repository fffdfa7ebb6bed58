"""Projections that are bare parameters: which of their elements each feature of q and k is made with.

Given an input whose tokens are all one unit vector, a feature of ``x @ W``, ``F.linear(x, W[:d])``,
``einsum("bnd,dhe->bhne", x, W)`` or any other product is one element of ``W``: numbering the elements tells which.
"""

import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.dry_run import Trial
from lightning_qk.heads.projections import Affine, UnreadLayer
from lightning_qk.heads.running import Bench, Loose
from lightning_qk.heads.sharding import alive, is_dtensor, whole

Reading = Callable[[Trial, dict[int, Tensor]], Tensor]
"""One side of a product for a call and for parameters by id, in float64."""


class ParameterPlan:
    """How a bare parameter of any order is read, see :class:`~lightning_qk.heads.affine.AffineMap`.

    Its elements are seen as ``(blocks, columns, stride)``, the input in the middle: ``(out, in)`` has stride 1,
    ``(in, ...)`` one block. Rows run over blocks first.
    """

    as_matrix = False

    def __init__(self, loose: Loose, columns: int, stride: int) -> None:
        self.name = loose.path
        self.own_name = loose.name
        self.columns = columns
        self.stride = stride
        self.rows: int = loose.parameter.numel() // columns
        self._module = weakref.ref(loose.owner)
        self._bias: tuple[weakref.ref[nn.Module], str, Tensor] | None = None

    @property
    def module(self) -> nn.Module:
        """Holds the parameter."""
        return alive(self._module)

    def add_bias(self, loose: Loose, places: Tensor) -> None:
        """Say which parameter is added, and which of its elements to each row; -1 for none."""
        self._bias = weakref.ref(loose.owner), loose.name, places

    def read(self) -> Affine:
        """The map as it is now."""
        weight, bias, places = self.stored()
        added = None
        if bias is not None:
            flat = whole(bias).flatten()
            places = places.to(flat.device)
            added = flat[places.clamp_min(0)]
            if bool((places < 0).any()):
                added = torch.where(places < 0, torch.zeros_like(added), added)
        return Affine(self.as_rows(whole(weight)), added)

    def plain_weight(self) -> nn.Parameter | None:
        """The parameter itself, where it is stored whole and its rows are views."""
        weight = self.stored()[0]
        return None if is_dtensor(weight) else weight

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameter."""
        return [self.stored()[0]]

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return is_dtensor(self.stored()[0])

    def is_view(self) -> bool:
        """Whether reading takes no memory."""
        return not self.is_sharded() and (self.stride == 1 or self.stride * self.columns == self._numel())

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, seen as (out, in)."""
        return weight.reshape(-1, self.columns, self.stride).transpose(1, 2).flatten(0, 1)

    def stored(self) -> tuple[nn.Parameter, nn.Parameter | None, Tensor]:
        """The parameters of weight and bias, and which element of the bias belongs to each row."""
        weight = self.module._parameters[self.own_name]
        assert weight is not None
        if self._bias is None:
            return weight, None, torch.empty(0, dtype=torch.long)
        owner, name, places = self._bias
        return weight, alive(owner)._parameters[name], places

    @property
    def transposed(self) -> bool:
        """Whether rows of the map are no rows of the parameter."""
        return self.stride != 1

    def _numel(self) -> int:
        return self.rows * self.columns


class Elements(NamedTuple):
    """What the features of one side are made with.

    Attributes:
        numbers: of the row that each feature is, (..., tokens, d_head): rows of all plans in a row.
        factor: on all of them.
        biases: for each feature the number of the element that is added, over all bias parameters; -1 for none.
    """

    numbers: Tensor
    factor: float
    biases: Tensor


class ElementSearch:
    """Finds elements, one parameter after the other.

    Attributes:
        plans: those that were met, with the number of their first row.
    """

    def __init__(self, bench: Bench, trial: Trial) -> None:
        self.bench = bench
        self.trial = trial
        self.plans: dict[int, tuple[int, ParameterPlan]] = {}
        self._size = 0
        self._columns = {tensor.shape[-1] for tensor in trial.given.values()}

    def find(self, read: Reading, what: str) -> Elements:
        """Tell what one side is made with.

        Args:
            read: gives the side.
            what: the side, for messages: "its queries".

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
        return Elements(numbers, factor, self._biases(read, numbers, factor, what))

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
            if not float((factors[mine] - factor).abs().max()) <= _tolerance(parameter) * abs(factor):
                continue
            starts, ends = (
                self._numbered(parameter, functools.partial(change, column=column), factor, mine)
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
            first, plan = self._plan(loose, columns, stride)
            if plan.stride != stride or plan.columns != columns:
                continue
            rows = starts // (columns * stride) * stride + starts % stride + first
            return torch.where(mine, rows, -1), factor
        return None

    def _plan(self, loose: Loose, columns: int, stride: int) -> tuple[int, ParameterPlan]:
        key = id(loose.parameter)
        if key not in self.plans:
            plan = ParameterPlan(loose, columns, stride)
            self.plans[key] = self._size, plan
            self._size += plan.rows
        return self.plans[key]

    def _numbered(
        self, parameter: Tensor, read: Callable[[Tensor], Tensor], factor: float, mine: Tensor
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

    def _biases(self, read: Reading, numbers: Tensor, factor: float, what: str) -> Tensor:
        """Which element of a bias is added to each feature."""
        none = _unit(self.trial, None, None)
        biases = torch.full_like(numbers, -1)
        first = 0
        for loose in self.bench.loose:
            parameter, start = loose.parameter, first
            first += parameter.numel()
            if parameter.numel() > self._size or id(parameter) in self.plans:
                continue
            zero, one = (
                read(none, {id(parameter): make(parameter)}) for make in (torch.zeros_like, torch.ones_like)
            )
            factors = one - zero
            mine = factors.abs() > 1e-6 * abs(factor)
            if not bool(mine.any()):
                continue
            if not float((factors[mine] - factor).abs().max()) <= _tolerance(parameter) * abs(factor):
                raise UnreadLayer(
                    f"{what} depend on its parameter {loose.path!r} by no sum of one of its elements"
                )

            def change(values: Tensor, parameter: Tensor = parameter, zero: Tensor = zero) -> Tensor:
                return read(none, {id(parameter): values.to(parameter).view(parameter.shape)}) - zero

            found = self._numbered(parameter, change, factor, mine)
            if found is None or bool((biases[mine] >= 0).any()):
                raise UnreadLayer(f"{what} have several sums of parameters added to them")
            biases = torch.where(mine, found + start, biases)
        return biases

    def add_biases(self, elements: Elements) -> None:
        """Tell the plans what is added to their rows.

        Raises:
            UnreadLayer: several parameters to the rows of one, or different elements to one row.
        """
        numbers, biases = elements.numbers.flatten().cpu(), elements.biases.flatten().cpu()
        for first, plan in self.plans.values():
            mine = (numbers >= first) & (numbers < first + plan.rows)
            if not bool((biases[mine] >= 0).any()):
                continue
            start = 0
            for loose in self.bench.loose:
                stop = start + loose.parameter.numel()
                own = mine & (biases >= start) & (biases < stop)
                if bool(own.any()):
                    _, bias, known = plan.stored()
                    if bias is not None and bias is not loose.parameter:
                        raise UnreadLayer(f"several parameters are added to the rows of {plan.name!r}")
                    places = torch.full((plan.rows,), -1) if bias is None else known.clone()
                    places[numbers[own] - first] = biases[own] - start
                    plan.add_bias(loose, places)
                start = stop


def _unit(trial: Trial, columns: int | None, column: int | None) -> Trial:
    """A call whose tokens are all one unit vector, or zero."""

    def filled(tensor: Tensor) -> Tensor:
        values = torch.zeros_like(tensor)
        if column is not None and tensor.shape[-1] == columns:
            values[..., column] = 1.0
        return values

    return trial._replace(given={name: filled(tensor) for name, tensor in trial.given.items()})


def _tolerance(tensor: Tensor) -> float:
    return 1e-4 if tensor.dtype in (torch.float32, torch.float64) else 2e-2
