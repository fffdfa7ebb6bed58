"""Run one attention layer alone: its projections give numbers of our choice, its parameters are as we set them."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import shadow
from lightning_qk.architecture.products import Following, Product
from lightning_qk.heads.live_weights import alive, check_access, is_dtensor, whole
from lightning_qk.heads.module_projection import projection_of
from lightning_qk.heads.norms import is_norm
from lightning_qk.heads.projection import Projection
from lightning_qk.heads.projections import InaccessibleWeights, UnreadLayer
from lightning_qk.heads.trials import Trial, trials

Emission = Callable[["Emitter", tuple[int, ...]], Tensor]
"""What an emitter gives: shape (..., rows) for its shape."""


class Emitter(nn.Module):
    """Replaces a projection: gives numbers of our choice, and keeps its inputs and outputs."""

    def __init__(self, plan: Projection, first: int) -> None:
        super().__init__()
        self.plan = plan
        self.first, self.rows = first, slice(first, first + plan.rows)
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
    """Replaces a norm: gives its input back, and keeps the call."""

    def __init__(self, norm: nn.Module, passed: list["Passed"]) -> None:
        super().__init__()
        self._norm, self._passed = weakref.ref(norm), passed

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
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
        passed: calls of its norms, in order.
        sources: what each projection is given, the last time.
        failed: how the run ended, where by an error.
        output: what the layer gave, or None.
    """

    products: list[Product]
    passed: list[Passed]
    sources: dict[Emitter, Tensor]
    failed: str
    output: Any = None

    def product(self, place: int) -> Product | None:
        """One of the products; None where the run did not come to it."""
        return self.products[place] if place < len(self.products) else None


class Loose(NamedTuple):
    """A parameter that no emitter replaces.

    Attributes:
        parameter: itself.
        owner: the module that holds it.
        name: its name there.
        path: its qualified name in the layer.
        first: number of its first element, over all of them.
    """

    parameter: nn.Parameter
    owner: nn.Module
    name: str
    path: str
    first: int

    def owns(self, numbers: Tensor) -> Tensor:
        """Where numbers are those of its elements."""
        return (numbers >= self.first) & (numbers < self.first + self.parameter.numel())


class Bench:
    """The modules in a layer, and what replaces them in a run.

    Args:
        module: the layer.
        config: the nearest configuration, or None.
        ways: how it is called; none for arguments guessed from its signature.
        is_bare: no projection is replaced: all are run, with weights of our choice.

    Attributes:
        emitters: projections.
        stand_ins: what replaces projections and norms.
        loose: parameters that are part of neither.
        size: number of rows of all projections.
    """

    def __init__(
        self, module: nn.Module, config: Any = None, ways: Sequence[Trial] = (), *, is_bare: bool = False
    ) -> None:
        self.module, self.config, self.ways = module, config, ways
        self.emitters: dict[nn.Module, Emitter] = {}
        self.stand_ins: dict[nn.Module, nn.Module] = {}
        self.loose: list[Loose] = []
        self._passed: list[Passed] = []
        self._is_bare = is_bare
        self.size = 0
        self._hold(module, "")
        for name, child in module.named_children():
            self._add(child, name)

    def widths(self) -> list[int]:
        """Widths that the layer's input may have, likeliest first."""
        found = [emitter.plan.columns for emitter in self.emitters.values()]
        if self._is_bare:
            tensors = [own.parameter for own in self.loose if own.parameter.dim() > 1]
            found += [size for own in tensors for size in own.shape[::-1]]
        return [width for width in dict.fromkeys(found) if width > 1]

    def trials(self, widths: int = 3) -> Iterable[Trial]:
        """Ways to call the layer, likeliest first; guessed ones on inputs of so many of its likeliest widths."""
        return self.ways or trials(self.module, self.config, self.widths()[:widths])

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
        return Seen(_distinct(follow.products), list(self._passed), sources, failed, output)

    def sums_over_tokens(self) -> bool:
        """Whether the axis that the products sum over is that of the tokens, by the first call that tells."""
        for trial in itertools.islice(self.trials(1), 7):
            found = None if trial.tokens == 1 else self.runs_over_tokens(trial)
            if found is not None:
                return found
        return False

    def runs_over_tokens(self, trial: Trial) -> bool | None:
        """The same of one way to call the layer; None where no run tells."""
        if trial.wider is None or not trial.tokens or trial.tokens == trial.wider.tokens:
            return None
        for own in (trial, trial.wider):
            products = self.run(own, constant(torch.ones(self.size))).products
            if not products:
                return None
            if {product.query.shape[-1] for product in products} != {own.tokens}:
                return False
        return True

    def _hold(self, module: nn.Module, path: str) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                first = self.loose[-1].first + self.loose[-1].parameter.numel() if self.loose else 0
                self.loose.append(Loose(parameter, module, name, f"{path}{name}", first))

    def _add(self, module: nn.Module, path: str) -> None:
        if module in self.stand_ins:
            return
        if is_norm(module):
            self.stand_ins[module] = _Passed(module, self._passed)
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
    return lambda own, shape: values[own.rows].expand(shape)


def random(seed: int, scale: float) -> Emission:
    """Other numbers for each token, the same for each run."""
    generator = torch.Generator().manual_seed(seed)
    return lambda own, shape: scale * torch.randn(shape, generator=generator)


def varied_values(parameter: Tensor, place: int) -> Tensor:
    """Other values of a parameter, of the same size."""
    plain = whole(parameter).detach()
    wave = torch.arange(plain.numel(), device=plain.device, dtype=torch.float32)
    wave = torch.cos(wave * (1.3 + 0.1 * place) + 1.0).view(plain.shape).to(plain.dtype)
    return plain * (1 + 0.3 * wave) + 0.2 * wave + 0.1


def varied_parameters(loose: Iterable[Loose]) -> dict[int, Tensor]:
    """Other values for some parameters, by id."""
    return {id(own.parameter): varied_values(own.parameter, place) for place, own in enumerate(loose)}


def tolerance(tensor: Tensor) -> float:
    """Relative error that a type's rounding explains."""
    return 1e-4 if tensor.dtype in (torch.float32, torch.float64) else 2e-2
