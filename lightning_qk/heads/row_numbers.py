"""Follows the numbers of rows through a layer: which row of which projection each feature of q and k is.

The layer runs on a copy in which every projection gives numbers of our choice in the place of its output, one for
each of its rows. At the product whose softmax is taken these numbers show which row of which projection each
feature of q and k is, for all ways to split, order and repeat them. Norms are passed by, rotations are given the
angle zero.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.composition import Composition, Part, composed
from lightning_qk.heads.norms import plan_norm
from lightning_qk.heads.projection import Projection
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.running import (
    Bench,
    Elements,
    ElementSearch,
    Emission,
    Emitter,
    Loose,
    Seen,
    constant,
    random,
)
from lightning_qk.heads.sharding import whole
from lightning_qk.heads.trials import Trial

# Rows are numbered by digits to this base, small enough that half precision keeps them apart.
_BASE = 32
SIDES = ("query", "key")
NAMES = {"query": "its queries", "key": "its keys"}


class FoundSide(NamedTuple):
    """Where the queries or the keys of a layer come from.

    Attributes:
        projection: makes them.
        rows: which of its rows they are, shape ``(heads, d_head)``.
        norm: a norm that they pass by on their way to the product, or None.
        given: name of the argument that the projection maps.
        normed: the projection is put together of several, with a norm between them.
        shared: how many coordinates, the last ones of each head, all heads have in common.
    """

    projection: Projection
    rows: Tensor
    norm: nn.Module | None
    given: str
    normed: bool = False
    shared: int = 0


class NoProduct(Exception):
    """A run did not come to a softmax."""


class Numbers(NamedTuple):
    """Which row each feature is, (..., tokens, d_head), and the factor on it."""

    rows: Tensor
    factor: float


class Sample(NamedTuple):
    """A run on random numbers.

    Attributes:
        seen: what it shows.
        made: rows, by their numbers (d,), to what the projections gave for them, (tokens, d).
    """

    seen: Seen
    made: Callable[[Tensor], Tensor | None]


class RowFollower:
    """Follows the numbers of rows through one way to call a layer.

    Args:
        bench: the layer.
        trial: how it is called.

    Attributes:
        runs: of zeros, of ones, and of each digit of the rows' numbers.
        elements: how bare parameters are read, with the number of the first row of each; None for projections.
        links: projections that map what others give, and what they were found to be given.
        sources: the arguments that projections map.
        biases: of bare parameters, by place of the product and side.
    """

    def __init__(self, bench: Bench, trial: Trial) -> None:
        self.bench, self.trial = bench, trial
        self.runs: list[Seen] = []
        self.elements: ElementSearch | None = None
        self.links: dict[Emitter, Numbers] = {}
        self.sources: dict[Emitter, str] = {}
        self.biases: dict[tuple[int, str], Elements] = {}

    def tell(self) -> None:
        """Run the layer on zeros, on ones and on the digits of its rows' numbers."""
        size = self.bench.size
        numbers = torch.arange(size)
        told = [torch.zeros(size), torch.ones(size)]
        # No larger than one, where bounds are flat.
        told += [(numbers // _BASE**place % _BASE) / _BASE for place in range(_digits(size))]
        if not self.bench.emitters:
            told = told[:1]
            self.elements = ElementSearch(self.bench, self.trial)
        for values in told:
            self.runs.append(self.bench.run(self.trial, constant(values)))
            for emitter in self.bench.emitters.values():
                # Of several calls the last one in which it maps an argument as it is.
                names = [self.trial.name_of(own) for own in emitter.given]
                name = next((own for own in names[::-1] if own is not None), None)
                if name is not None:
                    self.sources[emitter] = name
            if not self.runs[-1].products or len(self.runs[-1].products) != len(self.runs[0].products):
                raise NoProduct(self.runs[-1].failed)

    def numbers_of(self, place: int, side: str) -> Numbers:
        """The rows that one side of a product is.

        Raises:
            UnreadLayer: it is something else.
        """
        if self.elements is None:
            return read_numbers([getattr(run.products[place], side) for run in self.runs], NAMES[side])

        def reading(trial: Trial, given: dict[int, Tensor]) -> Tensor:
            seen = self.bench.run(trial, constant(torch.zeros(0)), given)
            if len(seen.products) != len(self.runs[0].products):
                raise UnreadLayer("it takes other products when its parameters change")
            return getattr(seen.products[place], side).double()

        found = self.elements.find(reading, NAMES[side])
        self.biases[place, side] = found
        return Numbers(found.numbers, found.factor)

    def add_biases(self, place: int) -> None:
        """Set which parameters are added to the bare ones that make a product."""
        if self.elements is not None:
            for side in SIDES:
                self.elements.add_biases(self.biases[place, side])

    def sample(
        self,
        seed: int,
        scale: float,
        *,
        trial: Trial | None = None,
        varied: Sequence[Loose] = (),
        shifted: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> Sample:
        """Run the layer on random numbers, in the place of its projections' output and of its own input.

        Args:
            seed: of the numbers.
            scale: their size.
            trial: how it is called, where not in its own way.
            varied: parameters that get other values.
            shifted: numbers of rows that get other values than without.
            factors: on what every row gives, (rows,).
        """
        trial = trial or self.trial
        given = {
            id(loose.parameter): varied_values(loose.parameter, place) for place, loose in enumerate(varied)
        }
        if self.elements is not None:
            return self._sample_bare(seed, scale, trial, given, shifted, factors)
        trial = trial.drawn(seed)
        emission: Emission = random(seed, scale)
        if shifted is not None:
            mask = torch.zeros(self.bench.size)
            mask[shifted] = 1.0
            first, second = emission, random(seed + 100, scale)

            def emission(own: Emitter, shape: tuple[int, ...]) -> Tensor:
                part = mask[own.first : own.first + own.plan.rows]
                return first(own, shape) + part * second(own, shape)

        if factors is not None:
            plain = emission

            def emission(own: Emitter, shape: tuple[int, ...]) -> Tensor:
                return plain(own, shape) * factors[own.first : own.first + own.plan.rows]

        seen = self.bench.run(trial, emission, given)
        # Of a projection that is called several times only what it makes of the layer's input, where it does.
        gave = {}
        for emitter in self.bench.emitters.values():
            if emitter.gave:
                direct = [(trial.name_of(own) is not None) for own in emitter.given]
                outs = [out for out, own in zip(emitter.gave, direct, strict=True) if own or not any(direct)]
                gave[emitter] = torch.cat([out.flatten(0, -2) for out in outs])

        def made(numbers: Tensor) -> Tensor | None:
            parts = [(emitter, emitter.owns(numbers)) for emitter in self.bench.emitters.values()]
            parts = [(emitter, mine) for emitter, mine in parts if bool(mine.any())]
            if any(emitter not in gave for emitter, _ in parts):
                return None
            if len({len(gave[emitter]) for emitter, _ in parts}) != 1:
                return None
            out = gave[parts[0][0]].new_zeros(len(gave[parts[0][0]]), len(numbers), dtype=torch.float64)
            for emitter, mine in parts:
                out[:, mine] = gave[emitter].double()[:, numbers[mine] - emitter.first]
            return out

        return Sample(seen, made)

    def _sample_bare(
        self,
        seed: int,
        scale: float,
        trial: Trial,
        given: dict[int, Tensor],
        shifted: Tensor | None,
        factors: Tensor | None,
    ) -> Sample:
        """The same, where weights are parameters: they and the layer's input are random."""
        assert self.elements is not None
        generator = torch.Generator().manual_seed(seed)

        def drawn(shape: Sequence[int]) -> Tensor:
            return torch.randn(tuple(shape), generator=generator)

        weights: list[tuple[int, Projection, Tensor, Tensor | None]] = []
        shift = torch.Generator().manual_seed(seed + 100)
        for first, plan in self.elements.plans.values():
            stored = plan.stored
            assert stored is not None  # as of every parameter
            assert stored.weight is not None
            weight, stride = stored.weight, stored.stride
            values = drawn(weight.shape) / plan.columns**0.5
            if shifted is not None:
                own = shifted[(shifted >= first) & (shifted < first + plan.rows)] - first
                blocks = values.view(-1, plan.columns, stride)
                blocks[own // stride, :, own % stride] += torch.randn(len(own), plan.columns, generator=shift)
            if factors is not None:
                own_factors = factors[first : first + plan.rows].view(-1, 1, stride)
                values = (values.view(-1, plan.columns, stride) * own_factors).view(values.shape)
            given[id(weight)] = values.to(weight)
            weights.append((first, plan, given[id(weight)], None))
        biases = torch.cat(
            [torch.zeros(0), *(drawn((loose.parameter.numel(),)) for loose in self.bench.loose)]
        )
        used = torch.cat(
            [torch.zeros(0, dtype=torch.long), *(own.biases.flatten().cpu() for own in self.biases.values())]
        )
        if factors is not None:
            # Biases belong to rows too: without them products are as they were.
            places = torch.cat([found.biases.flatten().cpu() for found in self.biases.values()])
            biases[places[places >= 0]] = 0.0
        start = 0
        for loose in self.bench.loose:
            stop = start + loose.parameter.numel()
            if bool(((used >= start) & (used < stop)).any()):
                given[id(loose.parameter)] = (
                    biases[start:stop].view(loose.parameter.shape).to(loose.parameter)
                )
            start = stop
        firsts = trial.first_names()
        inputs = {
            name: (scale * drawn(own.shape)).to(own)
            for name, own in trial.given.items()
            if firsts[name] == name
        }
        inputs = {name: inputs[first] for name, first in firsts.items()}
        seen = self.bench.run(trial._replace(given=inputs), constant(torch.zeros(0)), given)
        tokens = {name: own.flatten(0, -2).double() for name, own in inputs.items()}
        added = {
            int(number): int(bias)
            for own in self.biases.values()
            for number, bias in zip(
                own.numbers.flatten().tolist(), own.biases.flatten().tolist(), strict=True
            )
        }

        def made(numbers: Tensor) -> Tensor | None:
            out = []
            for own in tokens.values():
                columns: list[Tensor] = []
                for number in numbers.tolist():
                    for first, plan, values, _ in weights:
                        if first <= number < first + plan.rows and plan.columns == own.shape[-1]:
                            row = plan.as_rows(values)[number - first].double()
                            bias = added.get(number, -1)
                            columns.append(own @ row + (float(biases[bias]) if bias >= 0 else 0.0))
                if len(columns) == len(numbers):
                    out.append(torch.stack(columns, -1))
            return torch.cat(out) if out else None

        return Sample(seen, made)

    def size(self) -> int:
        """How many rows there are in all."""
        if self.elements is None:
            return self.bench.size
        return sum(plan.rows for _, plan in self.elements.plans.values())

    def own_parameters(self) -> set[int]:
        """Parameters that are read as weights or biases."""
        assert self.elements is not None
        found = set(self.elements.plans)
        used = torch.cat([own.biases.flatten().cpu() for own in self.biases.values()])
        start = 0
        for loose in self.bench.loose:
            stop = start + loose.parameter.numel()
            if bool(((used >= start) & (used < stop)).any()):
                found.add(id(loose.parameter))
            start = stop
        return found

    def side(self, numbers: Tensor, what: str) -> FoundSide:
        """The projection that makes some rows of q or k, (heads, d_head).

        Raises:
            UnreadLayer: it maps something else than one of the layer's inputs.
        """
        norm = self._norm_of(numbers)
        if self.elements is not None:
            return self._bare_side(numbers, norm, what)
        given: set[str] = set()
        first, *others = self._owners(numbers)
        direct = None if others else self.sources.get(first)
        if direct is not None:
            return FoundSide(first.plan, numbers - first.first, norm, direct, normed=False)
        whole_map = composed(self._compose(numbers.flatten(), given, depth=3))
        if len(given) != 1:
            raise UnreadLayer(f"its {what} are made of several inputs ({', '.join(sorted(given)) or 'none'})")
        rows = torch.arange(numbers.numel()).view(numbers.shape)
        return FoundSide(whole_map, rows, norm, given.pop(), whole_map.normed, _common(numbers))

    def _bare_side(self, numbers: Tensor, norm: nn.Module | None, what: str) -> FoundSide:
        """A side that bare parameters make; its input is the one that explains it."""
        assert self.elements is not None
        flat = numbers.flatten()
        parts = []
        for first, plan in self.elements.plans.values():
            places = ((flat >= first) & (flat < first + plan.rows)).nonzero()[:, 0]
            if len(places):
                parts.append(Part(places, plan, flat[places] - first))
        columns = {part.projection.columns for part in parts}
        names = [name for name, own in self.trial.given.items() if own.shape[-1] in columns]
        given = self._bare_source(numbers, names)
        if given is None:
            raise UnreadLayer(f"its {what} are made of none of its inputs, or of several")
        if len(parts) == 1:
            (part,) = parts
            assert isinstance(part.rows, Tensor)  # as made above
            return FoundSide(part.projection, part.rows.view(numbers.shape), norm, given)
        return FoundSide(
            composed(parts), torch.arange(len(flat)).view(numbers.shape), norm, given, shared=_common(numbers)
        )

    def _bare_source(self, numbers: Tensor, names: list[str]) -> str | None:
        """The only input whose change changes some rows."""
        if len(names) == 1:
            return names[0]
        wanted = set(numbers.flatten().tolist())
        found = []
        base = self.bench.run(self.trial, constant(torch.zeros(0)))
        firsts = self.trial.first_names()
        for name in dict.fromkeys(firsts[own] for own in names):
            given = {
                own: value + 1.0 if firsts[own] == name else value for own, value in self.trial.given.items()
            }
            seen = self.bench.run(self.trial._replace(given=given), constant(torch.zeros(0)))
            for (place, side), own in self.biases.items():
                if not wanted.issubset(own.numbers.flatten().tolist()):
                    continue
                before, after = (getattr(run.products[place], side) for run in (base, seen))
                if bool((before != after).any()):
                    found.append(name)
        return found[0] if len(set(found)) == 1 else None

    def _owners(self, numbers: Tensor) -> list[Emitter]:
        """The projections that rows belong to."""
        return [emitter for emitter in self.bench.emitters.values() if bool(emitter.owns(numbers).any())]

    def _compose(self, numbers: Tensor, given: set[str], depth: int) -> list[Part]:
        """What gives some rows, back to the layer's inputs, whose names are added to ``given``."""
        made: list[Part] = []
        for emitter in self._owners(numbers):
            places = emitter.owns(numbers).nonzero()[:, 0]
            rows = numbers[places] - emitter.first
            name = self.sources.get(emitter)
            if name is not None:
                given.add(name)
                made.append(Part(places, emitter.plan, rows))
                continue
            features = _features(emitter, self.runs)
            if features is None or depth == 0:
                raise UnreadLayer(
                    f"its projection {emitter.plan.name!r} maps something else than the layer's input"
                )
            self.links[emitter] = features
            source = Composition(self._compose(features.rows, given, depth - 1))
            between = self._norm_of(features.rows)
            norm = None if between is None else plan_norm(between, (emitter.plan.columns,))
            if between is not None and norm is None:
                raise UnreadLayer(
                    f"the norm before its projection {emitter.plan.name!r} is a {type(between).__name__}, which "
                    "is no RMSNorm or LayerNorm"
                )
            made.append(
                Part(places, emitter.plan, rows, source, norm, functools.partial(float, features.factor))
            )
        return made

    def _normed(self, numbers: Tensor) -> tuple[nn.Module, float] | None:
        """The norm that is given some rows, and the factor on them there."""
        wanted = set(numbers.flatten().tolist())
        for call, (norm, _) in enumerate(self.runs[0].normed):
            if any(len(run.normed) <= call or run.normed[call][0] is not norm for run in self.runs):
                continue
            with suppress(UnreadLayer):
                found = read_numbers([run.normed[call][1] for run in self.runs], "its features")
                if wanted & set(found.rows.flatten().tolist()):
                    return norm, found.factor
        return None

    def _norm_of(self, numbers: Tensor) -> nn.Module | None:
        if self.elements is not None:
            if self.runs[0].normed and self._is_normed_behind():
                raise UnreadLayer("a norm stands behind projections that are bare parameters")
            return None
        found = self._normed(numbers)
        return None if found is None else found[0]

    def _is_normed_behind(self) -> bool:
        """Whether a norm acts on what bare parameters make: on something else than the layer's input."""
        inputs = list(self.trial.given.values())
        return not all(
            any(given.shape == own.shape and torch.equal(given, own) for own in inputs)
            for _, given in self.runs[0].normed
        )

    def factor_at(self, norm: nn.Module | None, numbers: Numbers) -> float:
        """The factor on rows where a norm takes them, which it divides out; 1 without a norm."""
        if norm is None:
            return 1.0
        found = self._normed(numbers.rows)
        return 1.0 if found is None else found[1]


def read_numbers(seen: list[Tensor], what: str) -> Numbers:
    """Read the numbers of rows from what the layer made of zeros, of ones, and of their digits."""
    if any(tensor.shape != seen[0].shape for tensor in seen):
        raise UnreadLayer(f"{what} change their shape from run to run")
    zero, one, *digits = (tensor.double() for tensor in seen)
    factor = one - zero
    scale = float(factor.abs().max()) if factor.numel() else 0.0
    tolerance = row_tolerance(seen[0])
    if not (scale > 0 and float((factor - factor.flatten()[0]).abs().max()) <= tolerance * scale):
        raise UnreadLayer(f"{what} are not rows of its projections alone, each with one factor")
    if not float(zero.abs().max()) <= tolerance * scale:
        raise UnreadLayer(f"{what} have something added to them behind the projections")
    rows = torch.zeros(seen[0].shape, dtype=torch.long, device=seen[0].device)
    for place, digit in enumerate(digits):
        value = digit * _BASE / factor
        rounded = value.round()
        whole = float((value - rounded).abs().max()) <= 0.25
        if not (whole and float(rounded.min()) >= 0 and float(rounded.max()) < _BASE):
            raise UnreadLayer(
                f"{what} mix rows of its projections: they are sums of several (an adapter by hand, say) or "
                "another function of them"
            )
        rows += rounded.long() * _BASE**place
    return Numbers(rows, float(factor.flatten()[0]))


def _digits(size: int) -> int:
    """How many digits the numbers below a size have."""
    count = 1
    while _BASE**count < size:
        count += 1
    return count


def head_pairs(query: Tensor, key: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rows of every head's queries and keys.

    Heads are distinguished by their rows, wherever they are among batch and tokens.
    """
    try:
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    except RuntimeError:
        raise UnreadLayer("its queries and keys do not have as many heads as each other") from None
    query = query.expand(*batch, *query.shape[-2:]).reshape(-1, *query.shape[-2:]).cpu()
    key = key.expand(*batch, *key.shape[-2:]).reshape(-1, *key.shape[-2:]).cpu()
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for queries, keys in zip(query, key, strict=True):
        own = {tuple(row) for row in keys.tolist()}
        for row in queries.unique(dim=0).tolist() if len(queries) > 64 else queries.tolist():
            found.setdefault(tuple(row), set()).update(own)
    if any(len(keys) != 1 for keys in found.values()):
        raise UnreadLayer("its heads multiply with several sets of keys each")
    if any(len(set(row)) == 1 < len(row) for row in found):
        raise UnreadLayer("its products are sums over the same row again and again: over tokens, perhaps")
    return [(row, next(iter(keys))) for row, keys in found.items()]


def grouped(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Tensor, Tensor]:
    """Rows of every head, (heads, d_head), and of every key head, (kv_heads, d_head).

    Where heads that share keys do not follow each other, the keys are given once for each head.
    """
    of_head = [key for _, key in pairs]
    distinct = list(dict.fromkeys(of_head))
    group = len(of_head) // len(distinct)
    if [row for row in distinct for _ in range(group)] != of_head:
        distinct = of_head
    return torch.tensor([query for query, _ in pairs]), torch.tensor(distinct)


def _common(numbers: Tensor) -> int:
    """How many rows, the last ones of each head, all heads have in common."""
    if len(numbers) < 2:
        return 0
    return int((numbers == numbers[0]).all(0).flip(0).int().cumprod(0).sum())


def _features(emitter: Emitter, runs: list[Seen]) -> Numbers | None:
    """The rows that a projection's input consists of, (columns,); None where it consists of something else."""
    if any(emitter not in run.sources for run in runs):
        return None
    try:
        numbers = read_numbers([run.sources[emitter] for run in runs], "its features")
    except UnreadLayer:
        return None
    rows = numbers.rows.reshape(-1, numbers.rows.shape[-1]).cpu()
    return Numbers(rows[0], numbers.factor) if bool((rows == rows[0]).all()) else None


def varied_values(parameter: Tensor, place: int) -> Tensor:
    """Other values of a parameter, of the same size."""
    plain = whole(parameter).detach()
    wave = torch.arange(plain.numel(), device=plain.device, dtype=torch.float32)
    wave = torch.cos(wave * (1.3 + 0.1 * place) + 1.0).view(plain.shape).to(plain.dtype)
    return plain * (1 + 0.3 * wave) + 0.2 * wave + 0.1


def row_tolerance(tensor: Tensor) -> float:
    """Relative error that a type's rounding explains."""
    return 1e-4 if tensor.dtype in (torch.float32, torch.float64) else 2e-2
