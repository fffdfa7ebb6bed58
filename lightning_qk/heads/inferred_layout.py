"""Find the rows that reach q and k without names: run the layer and follow numbers.

The layer's own forward is run on a copy in which every projection gives numbers of our choice in the place of its
output, one for each of its rows. At the product whose softmax is taken these numbers tell which row of which
projection each feature of q and k is, for all ways to split, order and repeat them. Norms are passed by, rotations
are given the angle zero. What was found is then compared with what the layer makes of random numbers, small and
large, in more than one token, and with its other parameters varied: what stands between projection and product is
seen in that.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.origin import is_known
from lightning_qk.architecture.products import Product
from lightning_qk.heads.composition import Composition, Part, composed
from lightning_qk.heads.dry_run import Trial, input_arguments, own_random_numbers, recorded_trials, trials
from lightning_qk.heads.norms import plan_norm
from lightning_qk.heads.projection import Projection
from lightning_qk.heads.projections import NotTokenAttention, UnreadLayer
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

# Rows are numbered by digits to this base, small enough that half precision keeps them apart.
_BASE = 32
_LARGE = 1e3


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


class Found(NamedTuple):
    """What a run tells of an attention layer.

    Attributes:
        query: side of the queries.
        key: side of the keys, each once: ``(kv_heads, d_head)``; once for each head where heads that share one
            do not follow each other.
        scaling: the factor on ``q · k`` as the projections give them (behind a norm: as the norms do), or None
            where it cannot be told.
        complete: the layer ran to its end.
        is_decided: whether queries and keys come from the same tokens is known; False where only a call tells,
            since the layer's forward takes several inputs.
        clip: the bound that q and k are clamped to between projection and product, or None.
        is_turned: they change with the token's place by what keeps their lengths, such as a rotation.
        is_added_to: something besides ``q · k`` is added to the logits, masks apart.
        is_capped: large logits are bounded.
        is_exclusive: queries and keys serve nothing but their product.
    """

    query: FoundSide
    key: FoundSide
    scaling: float | None
    complete: bool
    is_decided: bool = True
    clip: float | None = None
    is_turned: bool = False
    is_added_to: bool = False
    is_capped: bool = False
    is_exclusive: bool = True

    @property
    def crosses(self) -> bool:
        """Whether queries and keys were made from different inputs."""
        return self.query.given != self.key.given


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a layer's forward, by position and by name."""


def find_rows(
    module: nn.Module, config: Any = None, calls: Sequence[Call] = (), *, ways: Sequence[Trial] = ()
) -> Found:
    """Find the rows of a layer's projections that reach q and k, by running it alone.

    Nothing of the model is changed, no hook is called and the global generators are left as they were. Of a class
    that is not transformers', torch's or timm's, what was found is compared with runs on random numbers: it counts
    only if it explains them.

    Args:
        module: the attention layer.
        config: the nearest configuration, or None.
        calls: arguments that the layer's forward really got: it is run on tensors of those shapes then, with one
            tensor where it got one tensor, instead of on arguments guessed from its signature.
        ways: how it is called, where that was made from calls before.

    Raises:
        UnreadLayer: it cannot be run alone, reaches no softmax of a product, or its q and k are not rows of
            projections of its input.
        NotTokenAttention: its products run over tokens.
        InaccessibleWeights: the values of its weights are out of this process's reach.
    """
    kind = type(module).__name__
    own = module.__dict__.get("forward")
    if (
        own is not None
        and "_old_forward" not in module.__dict__
        and getattr(own, "__self__", None) is not module
    ):
        raise UnreadLayer(f"the forward of this {kind} was replaced by a function that runs the layer itself")
    is_strict = not is_known(module)
    bench = Bench(module)
    benches = [bench] if bench.emitters else []
    if is_strict:
        benches.append(Bench(module, is_bare=True))
    if not any(own.widths() for own in benches):
        raise UnreadLayer(f"{kind} has no projections that are affine in their input")
    # The first of each kind tells most: the likeliest way to call it.
    reasons: list[str] = []
    failures: list[str] = []
    device = bench.device()
    with torch.no_grad(), own_random_numbers(device):
        for bench in benches:
            bench.check_access()
            ways_of = ways or _ways(bench, config, calls, device)
            for trial in ways_of:
                search = _Search(bench, trial, is_strict=is_strict)
                try:
                    return search.read()
                except _NoProduct as failure:
                    failures.append(str(failure))
                except NotTokenAttention:
                    raise
                except _Rejected as reason:
                    first = 0 if bench is benches[0] else len(reasons)
                    reasons.insert(first, search.cause() or str(reason))
                    break
                except UnreadLayer as reason:
                    reasons.append(search.cause() or str(reason))
    if reasons:
        raise UnreadLayer(reasons[0])
    raise UnreadLayer(
        f"{kind} reaches no softmax of a product when it is run alone{failures[0] if failures else ''}"
    )


_REACHES: "weakref.WeakKeyDictionary[nn.Module, tuple[list[int], bool]]" = weakref.WeakKeyDictionary()
# Larger modules are networks, and no layers.
_MOST_PROJECTIONS = 24


def reaches_product(module: nn.Module) -> bool:
    """Whether a module, run alone, takes a softmax of a product both sides of which its projections change.

    Found out once for each module and what it contains.
    """
    parts = [id(own) for own in module.modules()]
    known = _REACHES.get(module)
    if known is None or known[0] != parts:
        known = _REACHES[module] = parts, _reaches_product(module)
    return known[1]


def _reaches_product(module: nn.Module) -> bool:
    try:
        bench = Bench(module)
        bench.check_access()
    except UnreadLayer:
        return False
    if len(bench.emitters) + len(bench.loose) < 2 or len(bench.emitters) > _MOST_PROJECTIONS:
        return False
    for own in (bench, Bench(module, is_bare=True)):
        device = own.device()
        with torch.no_grad(), own_random_numbers(device):
            for place, trial in enumerate(trials(module, None, own.widths()[:3], device)):
                if place >= 12:
                    break
                # Of bare parameters other values than their own, as they may be zero.
                given = [
                    {id(loose.parameter): scale * _varied(loose.parameter, place) for loose in own.loose}
                    for place, scale in ((0, 1.0), (1, 2.0))
                ]
                seen = [
                    own.run(trial, random(seed, 1.0), given[seed] if not own.emitters else None)
                    for seed in (0, 1)
                ]
                for first, second in zip(*(run.products for run in seen), strict=False):
                    sides = [(getattr(first, side), getattr(second, side)) for side in _SIDES]
                    if all(a.shape == b.shape and not torch.equal(a, b) for a, b in sides):
                        return True
    return False


def _ways(bench: Bench, config: Any, calls: Sequence[Call], device: torch.device) -> Any:
    if calls:
        return (trial for call in calls for trial in recorded_trials(bench.module, config, *call))
    return trials(bench.module, config, bench.widths()[:3], device)


def rows_at(places: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """What takes the rows at places (heads, d_head) from a tensor (out, ...): a view where they are regular."""
    heads, d_head = places.shape
    start = int(places[0, 0])
    step = int(places[1, 0]) - start if heads > 1 else d_head
    regular = start + step * torch.arange(heads)[:, None] + torch.arange(d_head)
    is_view = step >= d_head and torch.equal(places, regular)

    def take(rows: Tensor, sizes: Any) -> Tensor:
        if is_view:
            return rows[start : start + (heads - 1) * step + d_head].unfold(0, d_head, step).movedim(-1, 1)
        return rows[places.to(rows.device)]

    return take


class _NoProduct(Exception):
    """A run did not come to a softmax."""


class _Rejected(UnreadLayer):
    """What was found does not explain what the layer does, however else it may be called."""


class _Numbers(NamedTuple):
    """Which row each feature is, (..., tokens, d_head), and the factor on it."""

    rows: Tensor
    factor: float


class _Way(NamedTuple):
    """One product, and which rows its sides are."""

    place: int
    sides: tuple[_Numbers, _Numbers]
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]


class _Sample(NamedTuple):
    """A run on random numbers.

    Attributes:
        seen: what it shows.
        made: rows, by their numbers (d,), to what the projections gave for them, (tokens, d).
    """

    seen: Seen
    made: Callable[[Tensor], Tensor | None]


_SIDES = ("query", "key")
_NAMES = {"query": "its queries", "key": "its keys"}


class _Search:
    """Follows the numbers of rows through one way to call a layer."""

    def __init__(self, bench: Bench, trial: Trial, *, is_strict: bool) -> None:
        self.bench = bench
        self.trial = trial
        self.is_strict = is_strict
        self.runs: list[Seen] = []
        # Of bare parameters: how they are read, with the number of the first row of each.
        self.elements: ElementSearch | None = None
        # Projections that map what others give, and what they were found to be given.
        self._links: dict[Emitter, _Numbers] = {}
        # The arguments that projections map.
        self._sources: dict[Emitter, str] = {}
        self._biases: dict[tuple[int, str], Elements] = {}

    def read(self) -> Found:
        """What this way to call the layer tells.

        Raises:
            _NoProduct: it comes to no softmax of a product.
            UnreadLayer: its queries and keys are no rows of projections.
        """
        self._tell()
        self._check_channels()
        ways, scaling, is_swapped = self._explained()
        clip = None
        is_turned = is_capped = False
        if self.is_strict:
            clip, is_turned, is_capped = self._check(ways, scaling)
        pairs = [pair[::-1] if is_swapped else pair for way in ways for pair in way.pairs]
        rows_of_query, rows_of_key = _grouped(pairs)
        self._add_biases(ways)
        query = self._side(rows_of_query, "queries")
        key = self._side(rows_of_key, "keys")
        if scaling is not None:
            for own, numbers in zip((query, key), ways[0].sides[:: -1 if is_swapped else 1], strict=True):
                scaling *= numbers.factor / self._factor_at(own.norm, numbers)
        if not self.is_strict and (query.norm is not None or key.norm is not None):
            scaling = None
        is_decided = (
            not self.is_strict
            or self.trial.is_recorded
            or query.projection.columns != key.projection.columns
            or len(input_arguments(self.bench.module)) <= 1
        )
        complete = not any(run.failed for run in self.runs)
        found = Found(query, key, scaling, complete, is_decided, clip, is_turned, is_capped=is_capped)
        if not self.is_strict:
            return found
        return found._replace(
            is_added_to=self._is_added_to(ways),
            is_exclusive=self._is_exclusive(rows_of_query, rows_of_key),
        )

    # What the layer makes of the numbers of rows.

    def _tell(self) -> None:
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
                name = _source(emitter, self.trial)
                if name is not None:
                    self._sources[emitter] = name
            if not self.runs[-1].products or len(self.runs[-1].products) != len(self.runs[0].products):
                raise _NoProduct(self.runs[-1].failed)

    def _numbers(self, place: int, side: str) -> _Numbers:
        if self.elements is None:
            return _numbers([getattr(run.products[place], side) for run in self.runs], _NAMES[side])

        def reading(trial: Trial, given: dict[int, Tensor]) -> Tensor:
            seen = self.bench.run(trial, constant(torch.zeros(0)), given)
            if len(seen.products) != len(self.runs[0].products):
                raise UnreadLayer("it takes other products when its parameters change")
            return getattr(seen.products[place], side).double()

        found = self.elements.find(reading, _NAMES[side])
        self._biases[place, side] = found
        return _Numbers(found.numbers, found.factor)

    def _add_biases(self, ways: list[_Way]) -> None:
        if self.elements is not None:
            for way in ways:
                for side in _SIDES:
                    self.elements.add_biases(self._biases[way.place, side])

    def _explained(self) -> tuple[list[_Way], float | None, bool]:
        """The products whose sides are rows of projections, the factor on them, and whether keys come first."""
        if any(product.query.is_complex() or product.key.is_complex() for product in self.runs[0].products):
            raise _Rejected("its queries and keys are complex numbers")
        if self.is_strict and any(product.is_normed for product in self.runs[0].products):
            raise _Rejected("a norm stands between its products and their softmax")
        reason: UnreadLayer | None = None
        found: list[tuple[_Way, float | None, bool]] = []
        for place in range(len(self.runs[0].products)):
            try:
                sides = self._numbers(place, "query"), self._numbers(place, "key")
                way = _Way(place, sides, _pairs(sides[0].rows, sides[1].rows))
                if self.elements is None:
                    # Whether they are rows of projections of the layer's input.
                    for numbers, what in zip(_grouped(way.pairs), ("queries", "keys"), strict=True):
                        self._side(numbers, what)
                found.append((way, *self._softmax_of(way)))
            except _Rejected:
                raise
            except UnreadLayer as error:
                # The first product says most: later ones are with positions, or in layers behind.
                reason = reason or error
                continue
            if not self.is_strict:
                break
        if not found:
            assert reason is not None  # there is at least one product
            raise reason
        first, scaling, is_swapped = found[0]
        ways = [first]
        known = set(first.pairs)
        for way, own_scaling, own_swapped in found[1:]:
            if known.issuperset(way.pairs):
                continue
            logits = [self.runs[0].products[own.place].logits for own in (first, way)]
            if logits[0] is not None and logits[0] is logits[1]:
                raise _Rejected("its logits are sums of several products of queries and keys")
            same = own_swapped == is_swapped and len(way.pairs[0][0]) == len(first.pairs[0][0])
            if not same or not _is_close(own_scaling, scaling) or known.intersection(way.pairs):
                raise _Rejected("it takes several softmaxes, of products that differ in their scale or width")
            ways.append(way)
            known.update(way.pairs)
        return ways, scaling, is_swapped

    # Runs on random numbers.

    def _sample(
        self,
        seed: int,
        scale: float,
        *,
        trial: Trial | None = None,
        varied: Sequence[Loose] = (),
        shifted: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> _Sample:
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
        given = {id(loose.parameter): _varied(loose.parameter, place) for place, loose in enumerate(varied)}
        if self.elements is not None:
            return self._sample_bare(seed, scale, trial, given, shifted, factors)
        trial = trial._replace(given=_drawn_inputs(trial.given, seed))
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
                direct = [_is_input(own, trial) for own in emitter.given]
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

        return _Sample(seen, made)

    def _sample_bare(
        self,
        seed: int,
        scale: float,
        trial: Trial,
        given: dict[int, Tensor],
        shifted: Tensor | None,
        factors: Tensor | None,
    ) -> _Sample:
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
            [torch.zeros(0, dtype=torch.long), *(own.biases.flatten().cpu() for own in self._biases.values())]
        )
        if factors is not None:
            # Biases belong to rows too: without them products are as they were.
            places = torch.cat([found.biases.flatten().cpu() for found in self._biases.values()])
            biases[places[places >= 0]] = 0.0
        start = 0
        for loose in self.bench.loose:
            stop = start + loose.parameter.numel()
            if bool(((used >= start) & (used < stop)).any()):
                given[id(loose.parameter)] = (
                    biases[start:stop].view(loose.parameter.shape).to(loose.parameter)
                )
            start = stop
        inputs = {name: (scale * drawn(own.shape)).to(own) for name, own in _shared_storage(trial.given)}
        inputs = {name: inputs[first] for name, first in _first_names(trial.given).items()}
        seen = self.bench.run(trial._replace(given=inputs), constant(torch.zeros(0)), given)
        tokens = {name: own.flatten(0, -2).double() for name, own in inputs.items()}
        added = {
            int(number): int(bias)
            for own in self._biases.values()
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

        return _Sample(seen, made)

    def _softmax_of(self, way: _Way) -> tuple[float | None, bool]:
        """The factor between a product and what its softmax is taken of, and whether the keys are on its left.

        From how the logits change with one side. What is added, such as masks, biases and products of positions,
        does not change; a bound on the logits is flat where they are small.
        """
        shifted = way.sides[1].rows.unique().cpu()
        first = self._sample(1, 0.1)
        second = self._sample(1, 0.1, shifted=shifted)
        products = [
            own.seen.products[way.place] if len(own.seen.products) > way.place else None
            for own in (first, second)
        ]
        if products[0] is None or products[1] is None:
            return None, False
        return _softmax_of(products[0], products[1])

    # Whether what was found explains what the layer does.

    def _check_channels(self) -> None:
        """Refuse what attends over channels: the axis that its product sums over grows with the tokens."""
        wider = self.trial.wider
        if wider is None or not self.trial.tokens or self.trial.tokens == wider.tokens:
            return
        widths = {product.query.shape[-1] for product in self.runs[0].products}
        if widths != {self.trial.tokens}:
            return
        seen = self.bench.run(wider, constant(torch.zeros(self.bench.size)))
        if seen.products and {product.query.shape[-1] for product in seen.products} == {wider.tokens}:
            raise NotTokenAttention(
                "it attends over channels: its products are sums over tokens, and its softmax is over channels"
            )

    def _check(self, ways: list[_Way], scaling: float | None) -> tuple[float | None, bool, bool]:
        """Compare with runs on random numbers.

        Returns:
            The bound that queries and keys are clamped to, if any; whether they are turned by their places; and
            whether large logits are bounded.
        """
        self._check_norms()
        plain = self._sample(2, 1.0)
        for way in ways:
            for side, numbers in zip(_SIDES, way.sides, strict=True):
                if not self._is_made(plain, way, side, numbers):
                    raise _Rejected(
                        f"{_NAMES[side]} are not what its projections give, each with one factor: something that "
                        "is not linear, or other tokens, stand between them and the product"
                    )
        if self.elements is None:
            self._check_sources()
        if scaling is None:
            raise _Rejected(
                "its logits are not one factor times q · k: its heads have factors of their own, or something "
                "that is not linear stands between the product and the softmax"
            )
        self._check_parameters(ways, scaling)
        is_turned = self._check_wider(ways, scaling)
        return self._bound(ways), is_turned, self._is_capped(ways, scaling)

    def _check_norms(self) -> None:
        """Refuse what is called a norm and stands before the projections, but depends on its input's length."""
        for passed in self.runs[0].passed:
            if _is_input(passed.given, self.trial) and not passed.is_scale_free():
                raise _Rejected(
                    f"what stands before its projections is a {type(passed.norm).__name__}, which is no norm"
                )

    def _is_capped(self, ways: list[_Way], scaling: float) -> bool:
        """Whether large logits are bounded, as by a soft cap; other functions of them are refused."""
        is_capped = False
        for way in ways:
            shifted = way.sides[1].rows.unique().cpu()
            if len(self.runs[0].products) > way.place and self.runs[0].products[way.place].logits is None:
                continue
            samples = [self._sample(9, 10.0, shifted=part) for part in (None, shifted)]
            if any(len(own.seen.products) <= way.place for own in samples):
                continue
            factor, _ = _softmax_of(*(own.seen.products[way.place] for own in samples))
            if _is_close(factor, scaling):
                continue
            sizes = []
            for scale in (1e2, 1e3):
                products = self._sample(9, scale).seen.products
                logits = products[way.place].logits if len(products) > way.place else None
                kept = None if logits is None else logits[logits.isfinite() & (logits > -1e3)]
                sizes.append(math.inf if kept is None or not kept.numel() else float(kept.abs().max()))
            if not (math.isfinite(sizes[1]) and sizes[1] <= 1.01 * sizes[0]):
                raise _Rejected("its logits are no multiple of q · k where that is large, nor bounded")
            is_capped = True
        return is_capped

    def _is_added_to(self, ways: list[_Way]) -> bool:
        """Whether logits are something where all products are zero, whatever values parameters have."""
        zero = torch.zeros(self.bench.size)
        for varied in ((), self.bench.loose):
            if self.elements is not None:
                own = self._own_parameters()
                given = {id(other.parameter): torch.zeros_like(other.parameter) for other in self.bench.loose}
                if varied:
                    given |= {
                        id(other.parameter): _varied(other.parameter, place)
                        for place, other in enumerate(varied)
                        if id(other.parameter) not in own
                    }
            else:
                given = {
                    id(other.parameter): _varied(other.parameter, place) for place, other in enumerate(varied)
                }
            products = self.bench.run(self.trial, constant(zero), given).products
            for way in ways:
                logits = products[way.place].logits if len(products) > way.place else None
                if logits is not None:
                    kept = logits[logits.isfinite() & (logits > -1e3)]
                    # What is added to all logits of a row alike changes no softmax.
                    if kept.numel() and float(kept.max() - kept.min()) > 0:
                        return True
        return False

    def _is_exclusive(self, query: Tensor, key: Tensor) -> bool:
        """Whether the output stays as it is where queries are multiplied by a factor and keys divided by it."""
        queries, keys = query.unique(), key.unique()
        if bool(torch.isin(queries, keys).any()):
            return False
        factors = torch.ones(self._size())
        factors[queries], factors[keys] = 2.0, 0.5
        plain = torch.ones(self._size())
        first, second = (self._sample(10, 0.5, factors=own).seen for own in (plain, factors))
        # What comes to the projections behind counts too: their own output is given.
        before, after = ([*own.sources.values(), *_tensors(own.output)] for own in (first, second))
        if first.failed or second.failed or not before or len(before) != len(after):
            return False
        return all(
            one.shape == other.shape and bool(torch.allclose(one, other, rtol=1e-3, atol=1e-4))
            for one, other in zip(before, after, strict=True)
        )

    def _size(self) -> int:
        """How many rows there are in all."""
        if self.elements is None:
            return self.bench.size
        return sum(plan.rows for _, plan in self.elements.plans.values())

    def _is_made(
        self, sample: _Sample, way: _Way, side: str, numbers: _Numbers, bound: float = math.inf
    ) -> bool:
        """Whether each vector of a side is what its rows are for some token."""
        if len(sample.seen.products) <= way.place:
            return False
        got = getattr(sample.seen.products[way.place], side)
        if got.shape != numbers.rows.shape:
            return False
        tolerance = _tolerance(got)
        got = got.double().flatten(0, -2)
        rows = numbers.rows.flatten(0, -2).cpu()
        for own in rows.unique(dim=0):
            want = sample.made(own)
            if want is None:
                return False
            want = (numbers.factor * want.to(got.device)).clamp(-bound, bound)
            vectors = got[(rows == own).all(-1).to(got.device)]
            error = (vectors[:, None] - want[None]).abs().amax(-1).amin(1)
            if not float(error.max()) <= tolerance * float(want.abs().max()):
                return False
        return True

    def _check_sources(self) -> None:
        """What projections are given that map others' outputs is what those give, of either sign."""
        for scale in (1.0, _LARGE):
            sample = self._sample(3, scale)
            for emitter, features in self._links.items():
                if emitter not in sample.seen.sources:
                    continue
                want = sample.made(features.rows)
                got = sample.seen.sources[emitter].double().flatten(0, -2)
                if want is None:
                    continue
                # In any order, since projections may be called several times.
                error = (got[:, None] - features.factor * want[None]).abs().amax(-1).amin(1).max()
                if float(error) <= _tolerance(sample.seen.sources[emitter]) * float(want.abs().max()):
                    continue
                raise _Rejected(
                    f"something that is not linear stands before its projection {emitter.plan.name!r}"
                )

    def _check_parameters(self, ways: list[_Way], scaling: float) -> None:
        """Refuse layers whose other parameters change queries, keys or the factor on their products."""
        own = set() if self.elements is None else self._own_parameters()
        loose = [other for other in self.bench.loose if id(other.parameter) not in own]
        culprit = None
        if loose and not self._is_unchanged(ways, scaling, loose):
            culprit = next((one for one in loose if not self._is_unchanged(ways, scaling, [one])), loose[0])
        if culprit is not None:
            raise _Rejected(
                f"its learnt parameter {culprit.path!r} changes its queries, its keys or the factor "
                "on their product"
            )

    def _own_parameters(self) -> set[int]:
        """Parameters that are read as weights or biases."""
        assert self.elements is not None
        found = set(self.elements.plans)
        used = torch.cat([own.biases.flatten().cpu() for own in self._biases.values()])
        start = 0
        for loose in self.bench.loose:
            stop = start + loose.parameter.numel()
            if bool(((used >= start) & (used < stop)).any()):
                found.add(id(loose.parameter))
            start = stop
        return found

    def _is_unchanged(self, ways: list[_Way], scaling: float, loose: Sequence[Loose]) -> bool:
        sample = self._sample(4, 1.0, varied=loose)
        for way in ways:
            if not all(
                self._is_made(sample, way, side, numbers)
                for side, numbers in zip(_SIDES, way.sides, strict=True)
            ):
                return False
            shifted = way.sides[1].rows.unique().cpu()
            first, second = (self._sample(5, 0.1, varied=loose, shifted=part) for part in (None, shifted))
            if any(len(own.seen.products) <= way.place for own in (first, second)):
                return False
            factor, _ = _softmax_of(*(own.seen.products[way.place] for own in (first, second)))
            if not _is_close(factor, scaling):
                return False
        return True

    def _check_wider(self, ways: list[_Way], scaling: float) -> bool:
        """Refuse what mixes tokens or heads: in more tokens each vector is some rows of one, if turned.

        Returns:
            Whether they are turned.
        """
        wider = self.trial.wider
        if wider is None or any(given.dim() > 3 for given in wider.given.values()):
            return False
        is_turned = False
        first, second = (self._sample(seed, 1.0, trial=wider) for seed in (6, 7))
        for way in ways:
            if any(len(own.seen.products) <= way.place for own in (first, second)):
                if self.trial.tokens == 1:
                    raise _Rejected(
                        f"it runs alone on single tokens only{first.seen.failed}, which do not tell whether it "
                        "mixes them"
                    )
                return is_turned
            shifted = way.sides[1].rows.unique().cpu()
            small = [self._sample(1, 0.1, trial=wider, shifted=part) for part in (None, shifted)]
            if all(len(own.seen.products) > way.place for own in small):
                factor, _ = _softmax_of(*(own.seen.products[way.place] for own in small))
                if factor is not None and not _is_close(factor, scaling):
                    raise _Rejected("the factor on its products depends on how many tokens there are")
            heads: list[Tensor] = []
            for side, numbers in zip(_SIDES, way.sides, strict=True):
                got = [getattr(own.seen.products[way.place], side) for own in (first, second)]
                tolerance = _tolerance(got[0])
                rows = numbers.rows.flatten(0, -2).unique(dim=0).cpu()
                if any(tensor.shape[-1] != rows.shape[-1] for tensor in got):
                    raise _Rejected(f"{_NAMES[side]} change their width with the number of tokens")
                made = [[own.made(row) for row in rows] for own in (first, second)]
                if any(part is None for own in made for part in own):
                    raise _Rejected(f"{_NAMES[side]} are made otherwise of more tokens")
                want = [numbers.factor * torch.cat(own) for own in made]  # type: ignore[arg-type]
                vectors = [tensor.double().flatten(0, -2).cpu() for tensor in got]
                wanted = torch.stack([part.norm(dim=-1) for part in (*want, want[0] - want[1])], -1)
                lengths = torch.stack([part.norm(dim=-1) for part in (*vectors, vectors[0] - vectors[1])], -1)
                error, nearest = (lengths[:, None] - wanted.cpu()[None]).abs().amax(-1).min(1)
                heads.append((nearest // len(made[0][0])).view(*got[0].shape[:-1], 1))  # type: ignore[arg-type]
                if not float(error.max()) <= tolerance * float(wanted.max()):
                    raise _Rejected(
                        f"{_NAMES[side]} mix several tokens or heads, or depend on how many tokens there are"
                    )
                apart = (vectors[0][:, None] - want[0].cpu()[None]).abs().amax(-1).amin(1)
                is_turned = is_turned or not float(apart.max()) <= tolerance * float(want[0].abs().max())

            try:
                _pairs(*heads)
            except UnreadLayer:
                raise _Rejected("its products take vectors of several heads together") from None
        return is_turned

    def _bound(self, ways: list[_Way]) -> float | None:
        """The bound that large queries and keys are clamped to, or None."""
        large = self._sample(8, _LARGE)
        bounds: set[float] = set()
        for way in ways:
            for side, numbers in zip(_SIDES, way.sides, strict=True):
                if self._is_made(large, way, side, numbers):
                    continue
                bound = math.nan
                if len(large.seen.products) > way.place:
                    bound = float(getattr(large.seen.products[way.place], side).abs().max())
                if not math.isfinite(bound) or not self._is_made(large, way, side, numbers, bound):
                    raise _Rejected(f"large ones of {_NAMES[side]} are bounded, by no clamp to ± one number")
                bounds.add(bound / abs(numbers.factor))
        return min(bounds) if bounds else None

    def clamped(self) -> str | None:
        """That a clamp keeps the layer from being read, as a clause about it; None where none is seen.

        Queries of numbers that are all large are ± one number then, at a token that nothing turns, and small ones
        are smaller.
        """
        little = 1e-4
        emissions = (random(8, 1e6), constant(torch.full((self.bench.size,), little)))
        seen = [self.bench.run(self.trial, emission) for emission in emissions]
        if not self.bench.emitters or not all(own.products for own in seen):
            return None
        for side in _SIDES:
            large, small = (getattr(own.products[0], side).abs().double() for own in seen)
            bound, factor = float(large.max()), float(small.max()) / little
            share = (large >= (1 - 1e-3) * bound).double().movedim(-2, 0).flatten(1).mean(1).max()
            if float(share) > 0.99 and math.isfinite(bound) and 0 < factor * little < 0.5 * bound:
                return (
                    f"a clamp to ±{bound / factor:.3g} between projection and product changes {_NAMES[side]}"
                )
        return None

    def cause(self) -> str | None:
        """What keeps the layer from being read, as a clause about it: a clamp or a cosine; None for others."""
        return self.clamped() or self.normalized()

    def normalized(self) -> str | None:
        """That queries and keys are divided by their length.

        Those of larger numbers are the same then, those of other numbers are not, and all are of one length.
        """
        given = ((8, 1.0), (8, 16.0), (9, 1.0))
        seen = [self.bench.run(self.trial, random(seed, scale)) for seed, scale in given]
        if not all(own.products for own in seen):
            return None
        for side in _SIDES:
            first, larger, other = (getattr(own.products[0], side).double() for own in seen)
            if not first.shape == larger.shape == other.shape or not float(first.abs().sum()) > 0:
                return None
            allowed = 1e-3 * float(first.abs().max())
            lengths = first.norm(dim=-1)
            is_one = float(lengths.max() - lengths.min()) <= 1e-3 * float(lengths.max())
            is_same, is_fixed = (float((first - own).abs().max()) <= allowed for own in (larger, other))
            if not is_one or not is_same or is_fixed:
                return None
        return (
            "its queries and keys are divided by their length in its own forward, as for a cosine similarity"
        )

    # Where rows come from.

    def _side(self, numbers: Tensor, what: str) -> FoundSide:
        norm = self._norm_of(numbers)
        if self.elements is not None:
            return self._bare_side(numbers, norm, what)
        given: set[str] = set()
        first, *others = self._owners(numbers)
        direct = None if others else self._sources.get(first)
        if direct is not None:
            return FoundSide(first.plan, numbers - first.first, norm, direct, normed=False)
        whole_map = composed(self._compose(numbers.flatten(), given, depth=3))
        if len(given) != 1:
            raise UnreadLayer(f"its {what} are made of several inputs ({', '.join(sorted(given)) or 'none'})")
        rows = torch.arange(numbers.numel()).view(numbers.shape)
        return FoundSide(whole_map, rows, norm, given.pop(), whole_map.normed, _common(numbers))

    def _bare_side(self, numbers: Tensor, norm: nn.Module | None, what: str) -> FoundSide:
        """A side that bare parameters make; its input is the one whose tokens explain it."""
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
        firsts = _first_names(self.trial.given)
        for name in dict.fromkeys(firsts[own] for own in names):
            given = {
                own: value + 1.0 if firsts[own] == name else value for own, value in self.trial.given.items()
            }
            seen = self.bench.run(self.trial._replace(given=given), constant(torch.zeros(0)))
            for (place, side), own in self._biases.items():
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
            name = self._sources.get(emitter)
            if name is not None:
                given.add(name)
                made.append(Part(places, emitter.plan, rows))
                continue
            features = _features(emitter, self.runs)
            if features is None or depth == 0:
                raise UnreadLayer(
                    f"its projection {emitter.plan.name!r} maps something else than the layer's input"
                )
            self._links[emitter] = features
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
                found = _numbers([run.normed[call][1] for run in self.runs], "its features")
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

    def _factor_at(self, norm: nn.Module | None, numbers: _Numbers) -> float:
        """The factor on rows where a norm takes them, which it divides out; 1 without a norm."""
        if norm is None:
            return 1.0
        found = self._normed(numbers.rows)
        return 1.0 if found is None else found[1]


def _numbers(seen: list[Tensor], what: str) -> _Numbers:
    """Read the numbers of rows from what the layer made of zeros, of ones, and of their digits."""
    if any(tensor.shape != seen[0].shape for tensor in seen):
        raise UnreadLayer(f"{what} change their shape from run to run")
    zero, one, *digits = (tensor.double() for tensor in seen)
    factor = one - zero
    scale = float(factor.abs().max()) if factor.numel() else 0.0
    tolerance = _tolerance(seen[0])
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
    return _Numbers(rows, float(factor.flatten()[0]))


def _digits(size: int) -> int:
    """How many digits the numbers below a size have."""
    count = 1
    while _BASE**count < size:
        count += 1
    return count


def _pairs(query: Tensor, key: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rows of every head's queries and keys.

    Heads are told by the rows that they are made of, wherever they stand among batch and tokens.
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


def _grouped(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Tensor, Tensor]:
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


def _features(emitter: Emitter, runs: list[Seen]) -> _Numbers | None:
    """The rows that a projection's input is made of, (columns,); None where it is made otherwise."""
    if any(emitter not in run.sources for run in runs):
        return None
    try:
        numbers = _numbers([run.sources[emitter] for run in runs], "its features")
    except UnreadLayer:
        return None
    rows = numbers.rows.reshape(-1, numbers.rows.shape[-1]).cpu()
    return _Numbers(rows[0], numbers.factor) if bool((rows == rows[0]).all()) else None


def _source(emitter: Emitter, trial: Trial) -> str | None:
    """The argument whose tokens a projection maps, as they are, in the last call in which it maps any."""
    return next((name for own in emitter.given[::-1] if (name := _input_name(own, trial)) is not None), None)


def _is_input(tensor: Tensor, trial: Trial) -> bool:
    return _input_name(tensor, trial) is not None


def _input_name(tensor: Tensor, trial: Trial) -> str | None:
    """The argument whose tokens a tensor holds, as they are."""
    tokens = tensor.flatten(0, -2)
    for name, given in trial.given.items():
        for known in (given, given.movedim(1, -1)):
            if known.shape[-1] != tokens.shape[-1]:
                continue
            known = known.flatten(0, -2)
            if bool((tokens[:, None] == known[None]).all(-1).any(1).all()):
                return name
    return None


def _drawn_inputs(given: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Other inputs, those that were one tensor one again; with a mean of either sign, which a forward may ask."""
    generator = torch.Generator().manual_seed(seed)
    shift = 0.5 if seed % 2 else -0.5
    drawn = {
        name: (torch.randn(own.shape, generator=generator) + shift).to(own)
        for name, own in _shared_storage(given)
    }
    return {name: drawn[first] for name, first in _first_names(given).items()}


def _first_names(given: dict[str, Tensor]) -> dict[str, str]:
    """For each input the first that is the same tensor."""
    return {
        name: next(other for other, own in given.items() if own is tensor) for name, tensor in given.items()
    }


def _shared_storage(given: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Inputs, each tensor once, under the first of its names."""
    firsts = _first_names(given)
    return [(name, tensor) for name, tensor in given.items() if firsts[name] == name]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _varied(parameter: Tensor, place: int) -> Tensor:
    """Other values of a parameter, of the same size."""
    plain = whole(parameter).detach()
    wave = torch.arange(plain.numel(), device=plain.device, dtype=torch.float32)
    wave = torch.cos(wave * (1.3 + 0.1 * place) + 1.0).view(plain.shape).to(plain.dtype)
    return plain * (1 + 0.3 * wave) + 0.2 * wave + 0.1


def _tolerance(tensor: Tensor) -> float:
    return 1e-4 if tensor.dtype in (torch.float32, torch.float64) else 2e-2


def _is_close(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=1e-3)


def _softmax_of(first: Product, second: Product) -> tuple[float | None, bool]:
    """The factor of two products' logits on the change of the products, and whether keys are on the left."""
    if first.logits is None or second.logits is None:
        return first.scaling, False
    assert first.dots is not None  # where there are logits
    assert second.dots is not None
    if first.logits.shape != second.logits.shape or first.dots.shape != second.dots.shape:
        return None, False
    change = second.dots.double() - first.dots.double()
    before, after = (own.logits.double().movedim(own.dim, -1) for own in (first, second))  # type: ignore[union-attr]
    # What is masked is some large negative number.
    kept = before.isfinite() & after.isfinite() & (before > -1e3) & (after > -1e3)
    outcome = after - before
    tolerance = 1e-3 if first.logits.dtype in (torch.float32, torch.float64) else 3e-2
    for is_left, axis in ((False, change), (True, change.mT)):
        own, own_kept = outcome, kept
        if own.shape[-1] > axis.shape[-1]:
            # Learnt sinks stand behind the logits.
            own, own_kept = own[..., : axis.shape[-1]], own_kept[..., : axis.shape[-1]]
        if own.numel() != axis.numel():
            continue
        factor = _proportion(axis.flatten()[own_kept.flatten()], own.flatten()[own_kept.flatten()], tolerance)
        if factor is not None:
            return factor, is_left != first.keys_first
    # In another order of heads and tokens, which their sums tell.
    canonical = [product.query.double() @ product.key.double().mT for product in (first, second)]
    change = canonical[1] - canonical[0]
    if not bool(kept.all()) or change.numel() != outcome.numel():
        return None, False
    for is_left, axis in ((False, change), (True, change.mT)):
        sums, wanted = (part.abs().sum(-1).flatten().sort().values for part in (axis, outcome))
        if sums.shape != wanted.shape:
            continue
        factor = _proportion(sums, wanted, tolerance)
        if factor is not None:
            ordered = axis.flatten().sort().values, outcome.flatten().sort().values
            signed = _proportion(*ordered, tolerance)
            return signed, is_left
    return None, False


def _proportion(change: Tensor, outcome: Tensor, tolerance: float) -> float | None:
    """The number other than 0 that makes one change the other; None where there is none."""
    if not change.numel() or not float(change.abs().max()) > 0:
        return None
    factor = float(change @ outcome / change.square().sum())
    left = float((outcome - factor * change).abs().max())
    return factor if factor and left <= tolerance * float(outcome.abs().max()) else None
