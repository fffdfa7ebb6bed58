"""Follows the numbers of rows through a layer: which row of which projection each feature of q and k is.

The layer runs on a copy in which every projection gives numbers of our choice in the place of its output, one for
each of its rows. At the product whose softmax is taken these numbers show which row of which projection each
feature of q and k is, for all ways to split, order and repeat them. Norms are passed by, rotations are given the
angle zero.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.norms import plan_norm
from lightning_qk.heads.projection import Composition, Part, Projection, composed
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.running import (
    Bench,
    Emitter,
    Loose,
    Passed,
    Seen,
    constant,
    random,
    tolerance,
    varied_parameters,
)
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
        shared: how many coordinates, the last ones of each head, all heads have in common.
    """

    projection: Projection
    rows: Tensor
    norm: nn.Module | None
    given: str
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
        links: projections that map what others give, and what they were found to be given.
        sources: the arguments that projections map.
    """

    def __init__(self, bench: Bench, trial: Trial) -> None:
        self.bench, self.trial = bench, trial
        self.runs: list[Seen] = []
        self.links: dict[Emitter, Numbers] = {}
        self.sources: dict[Emitter, str] = {}

    @property
    def size(self) -> int:
        """How many rows there are in all."""
        return self.bench.size

    def own_parameters(self) -> set[int]:
        """Parameters that are read as weights or biases, by id: none, where projections are."""
        return set()

    def number_rows(self) -> None:
        """Run the layer on zeros, on ones and on the digits of its rows' numbers.

        Raises:
            NoProduct: a run comes to no softmax of a product.
        """
        numbers = torch.arange(self.bench.size)
        # No larger than one, where bounds are flat.
        digits = [(numbers // _BASE**place % _BASE) / _BASE for place in range(_digits(self.bench.size))]
        for values in (torch.zeros(self.bench.size), torch.ones(self.bench.size), *digits):
            self._run(values)

    def _run(self, values: Tensor) -> None:
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
        return read_numbers([getattr(run.products[place], side) for run in self.runs], NAMES[side])

    def add_biases(self, place: int) -> None:
        """Set what is added to the rows that make a product: projections know it themselves."""

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
        """Run the layer on random numbers, in the place of its projections' output and of its own input.

        Args:
            seed: of the numbers.
            scale: their size.
            trial: how it is called, where not in its own way.
            varied: parameters that get other values.
            shifted: numbers of rows that get other values than without.
            factors: on what every row gives, (rows,).
        """
        trial = (trial or self.trial).drawn(seed)
        first, second = random(seed, scale), random(seed + 100, scale)
        mask = torch.zeros(self.bench.size)
        if shifted is not None:
            mask[shifted] = 1.0

        def emission(own: Emitter, shape: tuple[int, ...]) -> Tensor:
            out = first(own, shape)
            if shifted is not None:
                out = out + mask[own.rows] * second(own, shape)
            return out if factors is None else out * factors[own.rows]

        seen = self.bench.run(trial, emission, varied_parameters(varied))
        # Of a projection that is called several times only what it makes of the layer's input, where it does.
        gave = {}
        for emitter in self.bench.emitters.values():
            if emitter.gave:
                direct = [(trial.name_of(own) is not None) for own in emitter.given]
                outs = [out for out, own in zip(emitter.gave, direct, strict=True) if own or not any(direct)]
                gave[emitter] = torch.cat([out.flatten(0, -2) for out in outs])

        def made(numbers: Tensor) -> Tensor | None:
            owners = self._owners(numbers)
            if any(emitter not in gave for emitter in owners):
                return None
            if len({len(gave[emitter]) for emitter in owners}) != 1:
                return None
            out = gave[owners[0]].new_zeros(len(gave[owners[0]]), len(numbers), dtype=torch.float64)
            for emitter in owners:
                mine = emitter.owns(numbers)
                out[:, mine] = gave[emitter].double()[:, numbers[mine] - emitter.first]
            return out

        return Sample(seen, made)

    def run_on_zeros(self, varied: Iterable[Loose] = ()) -> Seen:
        """Run the layer such that all queries and keys are zero, with other values for some parameters."""
        return self.bench.run(self.trial, constant(torch.zeros(self.bench.size)), varied_parameters(varied))

    def side(self, numbers: Tensor, what: str) -> FoundSide:
        """The projection that makes some rows of q or k, (heads, d_head).

        Raises:
            UnreadLayer: it maps something else than one of the layer's inputs.
        """
        found = self._normed(numbers)
        norm = None if found is None else found[0]
        first, *others = self._owners(numbers)
        direct = None if others else self.sources.get(first)
        if direct is not None:
            return FoundSide(first.plan, numbers - first.first, norm, direct)
        given: set[str] = set()
        whole_map = composed(self._compose(numbers.flatten(), given, depth=3))
        if len(given) != 1:
            raise UnreadLayer(
                f"its {what} are computed from several inputs ({', '.join(sorted(given)) or 'none'})"
            )
        rows = torch.arange(numbers.numel()).view(numbers.shape)
        return FoundSide(whole_map, rows, norm, given.pop(), common_rows(numbers))

    def check_rows(self, numbers: Tensor, what: str) -> None:
        """Make sure that rows are those of projections of the layer's input; arguments as for :meth:`side`."""
        self.side(numbers, what)

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
            between = self._normed(features.rows)
            norm = None if between is None else plan_norm(between[0], (emitter.plan.columns,))
            if between is not None and norm is None:
                raise UnreadLayer(
                    f"the norm before its projection {emitter.plan.name!r} is a {type(between[0]).__name__}, "
                    "which is no RMSNorm or LayerNorm"
                )
            made.append(
                Part(places, emitter.plan, rows, source, norm, functools.partial(float, features.factor))
            )
        return made

    def _normed(self, numbers: Tensor) -> tuple[nn.Module, float] | None:
        """The norm that is given some rows, and the factor on them there."""
        wanted = set(numbers.flatten().tolist())
        for place, passed in enumerate(self.runs[0].passed):
            calls: list[Passed | None] = [next(iter(run.passed[place:]), None) for run in self.runs]
            given = [call.given for call in calls if call is not None and call.norm is passed.norm]
            if len(given) < len(self.runs):
                continue
            with suppress(UnreadLayer):
                found = read_numbers(given, "its features")
                if wanted & set(found.rows.flatten().tolist()):
                    return passed.norm, found.factor
        return None

    def factor_at(self, norm: nn.Module | None, numbers: Numbers) -> float:
        """The factor on rows where a norm takes them, which it divides out; 1 without a norm."""
        found = None if norm is None else self._normed(numbers.rows)
        return 1.0 if found is None else found[1]


def read_numbers(seen: list[Tensor], what: str) -> Numbers:
    """Read the numbers of rows from what the layer returned for zeros, for ones, and for their digits."""
    if any(tensor.shape != seen[0].shape for tensor in seen):
        raise UnreadLayer(f"{what} change their shape from run to run")
    zero, one, *digits = (tensor.double() for tensor in seen)
    factor = one - zero
    scale = float(factor.abs().max()) if factor.numel() else 0.0
    allowed = tolerance(seen[0])
    if not (scale > 0 and float((factor - factor.flatten()[0]).abs().max()) <= allowed * scale):
        raise UnreadLayer(f"{what} are not rows of its projections alone, each with one factor")
    if not float(zero.abs().max()) <= allowed * scale:
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


def common_rows(numbers: Tensor) -> int:
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
