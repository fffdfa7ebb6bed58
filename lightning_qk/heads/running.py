"""Run one attention layer alone: its projections give numbers of our choice, its parameters are as we set them."""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import alive, shadow
from lightning_qk.architecture.products import Following, Product
from lightning_qk.heads.norms import is_norm
from lightning_qk.heads.projection import Projection, parameter_projection, projection_of
from lightning_qk.heads.projections import InaccessibleWeights, UnreadLayer
from lightning_qk.heads.sharding import check_access, is_dtensor, whole
from lightning_qk.heads.trials import Trial

Emission = Callable[["Emitter", tuple[int, ...]], Tensor]
"""What an emitter gives: shape (..., rows) for its shape."""


class Emitter(nn.Module):
    """Replaces a projection: gives numbers of our choice, and keeps its inputs and outputs."""

    def __init__(self, plan: Projection, first: int) -> None:
        super().__init__()
        self.plan = plan
        self.first = first
        self.emission: Emission = lambda own, shape: torch.zeros(shape)
        self.given: list[Tensor] = []
        self.gave: list[Tensor] = []
        self.channels_first = any(isinstance(layer, nn.Conv1d | nn.Conv2d) for layer in plan.module.modules())

    def owns(self, numbers: Tensor) -> Tensor:
        """Where numbers are those of its rows."""
        return (numbers >= self.first) & (numbers < self.first + self.plan.rows)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Numbers of our choice in the shape of the projection's output."""
        if self.channels_first:
            x = x.movedim(1, -1)
        if x.shape[-1] != self.plan.columns:
            raise ValueError("a projection is given something of another width")
        # A copy, for what is given may be changed in place.
        self.given.append(x.clone())
        out = self.emission(self, (*x.shape[:-1], self.plan.rows)).to(x)
        self.gave.append(out)
        out = out.clone()
        return out.movedim(-1, 1).contiguous() if self.channels_first else out


class _Passed(nn.Module):
    """Stands for a norm: gives its input back, and keeps it beside the norm, and what it gave."""

    def __init__(
        self, norm: nn.Module, normed: list[tuple[nn.Module, Tensor]], passed: list["Passed"]
    ) -> None:
        super().__init__()
        self._keep = lambda x: normed.append((norm, x))
        self._norm, self._passed = weakref.ref(norm), passed

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        self._keep(x)
        out = x.clone()
        self._passed.append(Passed(alive(self._norm), x, args, kwargs, out))
        return out


class Passed(NamedTuple):
    """A call of a norm that was passed by.

    Attributes:
        norm: the norm.
        given: its input.
        args: what else it got by position.
        kwargs: what else it got by name.
        gave: what replaces its output.
    """

    norm: nn.Module
    given: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gave: Tensor

    def is_scale_free(self) -> bool:
        """Whether what the norm gives does not depend on the length of what it is given, as of any norm."""
        run = shadow(self.norm)
        try:
            first, second = (run(size * self.given, *self.args, **self.kwargs) for size in (1e2, 1e3))
            return bool((first - second).abs().max() <= 2e-2 * first.abs().max())
        except Exception:
            return False


class Seen(NamedTuple):
    """What one run shows.

    Attributes:
        products: those that the layer takes softmaxes of.
        normed: what its norms are given, in order.
        sources: what each projection is given, the last time.
        failed: how the run ended, where by an error.
        output: what the layer gave, or None.
        passed: calls of its norms.
    """

    products: list[Product]
    normed: list[tuple[nn.Module, Tensor]]
    sources: dict[Emitter, Tensor]
    failed: str
    output: Any = None
    passed: Sequence[Passed] = ()


class Loose(NamedTuple):
    """A parameter, or a buffer, that no emitter replaces.

    Attributes:
        owner: the module that holds it.
        name: its name there.
        path: its qualified name in the layer.
    """

    owner: nn.Module
    name: str
    path: str

    @property
    def parameter(self) -> Tensor:
        """The parameter itself."""
        found: Tensor | None = self.owner._parameters.get(self.name)
        found = self.owner._buffers[self.name] if found is None else found
        assert found is not None
        return found


class Bench:
    """The modules in a layer, and what replaces them in a run.

    Attributes:
        emitters: projections.
        stand_ins: what replaces projections and norms.
        norms: norms alone.
        loose: parameters that are part of neither.
        buffers: floating-point buffers that are part of neither.
        size: number of rows of all projections.
    """

    def __init__(self, module: nn.Module, *, is_bare: bool = False) -> None:
        """Prepare a layer.

        Args:
            module: the layer.
            is_bare: no projection is replaced: all are run, with weights of our choice.
        """
        self.module = module
        self.emitters: dict[nn.Module, Emitter] = {}
        self.stand_ins: dict[nn.Module, nn.Module] = {}
        self.loose: list[Loose] = []
        self.buffers: list[Loose] = []
        self._normed: list[tuple[nn.Module, Tensor]] = []
        self._passed: list[Passed] = []
        self._is_bare = is_bare
        self.size = 0
        self._hold(module, "")
        for name, child in module.named_children():
            self._add(child, name)

    def device(self) -> torch.device:
        """Where the layer's weights are."""
        tensor = next(iter(self.module.parameters()), None)
        if tensor is None:
            return torch.device("cpu")
        return torch.device(tensor.device_mesh.device_type) if is_dtensor(tensor) else tensor.device  # type: ignore[attr-defined]

    def widths(self) -> list[int]:
        """Widths that the layer's input may have, likeliest first."""
        found = [emitter.plan.columns for emitter in self.emitters.values()]
        if self._is_bare:
            found += [
                size
                for loose in self.loose
                if loose.parameter.dim() > 1
                for size in loose.parameter.shape[::-1]
            ]
        return [width for width in dict.fromkeys(found) if width > 1]

    def run(self, trial: Trial, emission: Emission, given: Mapping[int, Tensor] | None = None) -> Seen:
        """Run the layer on a copy, its projections giving the emission.

        Args:
            trial: how it is called.
            emission: what its projections give.
            given: parameters by id, and what is put in their places.
        """
        for emitter in self.emitters.values():
            emitter.emission = emission
            emitter.given.clear()
            emitter.gave.clear()
        self._normed.clear()
        self._passed.clear()
        given = given or {}

        def convert(tensor: Tensor) -> Tensor:
            if id(tensor) in given:
                return given[id(tensor)]
            return whole(tensor) if is_dtensor(tensor) else _own_buffer(tensor)

        copied = shadow(self.module, convert=convert, stand_ins=self.stand_ins)
        if trial.config is not None and "config" in copied.__dict__:
            copied.__dict__["config"] = trial.config
        follow = Following(self._passed)
        failed, output = "", None
        try:
            with follow:
                output = trial.call(copied)
        except Exception as error:
            # What comes behind the softmax may fail.
            failed = (
                f" ({type(error).__name__}: "
                f"{str(error).splitlines()[0][:120] if str(error) else 'no message'})"
            )
        sources = {emitter: emitter.given[-1] for emitter in self.emitters.values() if emitter.given}
        return Seen(
            _distinct(follow.products), list(self._normed), sources, failed, output, tuple(self._passed)
        )

    def _hold(self, module: nn.Module, path: str) -> None:
        self.loose += [
            Loose(module, name, f"{path}{name}")
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_floating_point()
        ]
        self.buffers += [
            Loose(module, name, f"{path}{name}")
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]

    def _add(self, module: nn.Module, path: str) -> None:
        if module in self.stand_ins:
            return
        if is_norm(module):
            self.stand_ins[module] = _Passed(module, self._normed, self._passed)
            return
        if not self._is_bare:
            plan = _affine(module, path) if any(True for _ in module.parameters()) else None
            if plan is not None:
                self.emitters[module] = self.stand_ins[module] = Emitter(plan, self.size)
                self.size += plan.rows
                return
        self._hold(module, f"{path}.")
        for name, child in module.named_children():
            self._add(child, f"{path}.{name}")

    def check_access(self) -> None:
        """Make sure that the values of parameters that nothing replaces are within reach.

        Raises:
            InaccessibleWeights: they are not.
        """
        for loose in self.loose:
            check_access(loose.parameter, f"its parameter {loose.path!r}")


def _affine(module: nn.Module, path: str) -> Projection | None:
    try:
        return projection_of(module, path)
    except InaccessibleWeights:
        raise
    except UnreadLayer:
        return None


def _own_buffer(tensor: Tensor) -> Tensor:
    """A forward may write into its buffers; parameters, and large tables, are left where they are."""
    return tensor if isinstance(tensor, nn.Parameter) or tensor.numel() > 2**20 else tensor.clone()


def _distinct(products: list[Product]) -> list[Product]:
    """Products, each once."""
    found: dict[tuple[int, int], Product] = {}
    for product in products:
        found.setdefault(
            (id(product.query), id(product.key if product.dots is None else product.dots)), product
        )
    return list(found.values())


def constant(values: Tensor) -> Emission:
    """The same numbers for all tokens: one for each row of all projections."""

    def emission(own: Emitter, shape: tuple[int, ...]) -> Tensor:
        return values[own.first : own.first + own.plan.rows].expand(shape)

    return emission


def random(seed: int, scale: float) -> Emission:
    """Other numbers for each token, the same for each run."""
    generator = torch.Generator().manual_seed(seed)
    return lambda own, shape: scale * torch.randn(shape, generator=generator)


Reading = Callable[[Trial, dict[int, Tensor]], Tensor]
"""One side of a product for a call and for parameters by id, in float64."""


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
    """Finds which elements of bare parameters each feature of q and k is made with, one parameter at a time.

    Given an input whose tokens are all one unit vector, a feature of ``x @ W``, ``F.linear(x, W[:d])``,
    ``einsum("bnd,dhe->bhne", x, W)`` or any other product is one element of ``W``, known by its number.

    Attributes:
        plans: those that were met, with the number of their first row.
    """

    def __init__(self, bench: Bench, trial: Trial) -> None:
        self.bench = bench
        self.trial = trial
        self.plans: dict[int, tuple[int, Projection]] = {}
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
            stored = plan.stored
            if stored is None or (stored.stride, stored.columns) != (stride, columns):
                continue
            rows = starts // (columns * stride) * stride + starts % stride + first
            return torch.where(mine, rows, -1), factor
        return None

    def _plan(self, loose: Loose, columns: int, stride: int) -> tuple[int, Projection]:
        key = id(loose.parameter)
        if key not in self.plans:
            plan = parameter_projection(
                loose.owner, loose.name, columns=columns, stride=stride, path=loose.path
            )
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
                    assert plan.stored is not None  # as of every parameter
                    bias, known = plan.stored.bias, plan.stored.places
                    if bias is not None and bias is not loose.parameter:
                        raise UnreadLayer(f"several parameters are added to the rows of {plan.name!r}")
                    fresh = bias is None or isinstance(known, slice)
                    places = torch.full((plan.rows,), -1) if fresh else known.clone()  # type: ignore[union-attr]
                    places[numbers[own] - first] = biases[own] - start
                    plan.stored.add_bias(loose.owner, loose.name, places)
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
