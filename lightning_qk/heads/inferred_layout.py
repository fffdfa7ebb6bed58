"""Infer where the weights of a layer lie without names: run the layer alone and follow numbers.

:mod:`~lightning_qk.heads.row_numbers` finds which rows reach q and k. What was found is then compared with what
the layer makes of random numbers, small and large, in more than one token, and with its other parameters varied:
that shows what is between projection and product.
"""

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import quietly
from lightning_qk.architecture.products import Product, softmax_factor, tensors_in
from lightning_qk.architecture.source_code import is_known, uses_interface
from lightning_qk.heads.bare_weights import BareFollower
from lightning_qk.heads.projections import NotTokenAttention, UnreadLayer
from lightning_qk.heads.row_numbers import (
    NAMES,
    SIDES,
    FoundSide,
    NoProduct,
    Numbers,
    RowFollower,
    Sample,
    grouped,
    head_pairs,
)
from lightning_qk.heads.running import Bench, Loose, Seen, constant, random, tolerance
from lightning_qk.heads.sharding import device_of
from lightning_qk.heads.trials import Trial, input_arguments, recorded_trials, trials

_CHANNELS = "it attends over channels: its products are sums over tokens, and its softmax is over channels"
_LARGE = 1e3


class Found(NamedTuple):
    """What a run shows of an attention layer.

    Attributes:
        query: side of the queries.
        key: side of the keys, each once: ``(kv_heads, d_head)``; once for each head where heads that share one
            do not follow each other.
        scaling: the factor on ``q · k`` as the projections give them (behind a norm: as the norms do), or None
            where it is unknown.
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
    with quietly(module):
        for bench in benches:
            bench.check_access()
            ways_of = ways or _ways(bench, config, calls)
            for trial in ways_of:
                search = _Inference(bench, trial, is_strict=is_strict)
                try:
                    return search.read()
                except NoProduct as failure:
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


def _ways(bench: Bench, config: Any, calls: Sequence[Call]) -> Iterator[Trial]:
    if calls:
        return (trial for call in calls for trial in recorded_trials(bench.module, config, *call))
    return trials(bench.module, config, bench.widths()[:3])


_KNOWN: "weakref.WeakKeyDictionary[type, bool]" = weakref.WeakKeyDictionary()


def check_tokens(module: nn.Module, config: Any = None) -> None:
    """Refuse a layer whose products sum over an axis that grows with the number of tokens.

    Seen from a run of the layer alone, once for each class; one that cannot be run passes.

    Raises:
        NotTokenAttention: it attends over channels.
    """
    kind: Any = type(module)
    if uses_interface(module) or isinstance(module, nn.MultiheadAttention):
        return
    if kind not in _KNOWN:
        _KNOWN[kind] = _sums_over_tokens(module, config)
    if _KNOWN[kind]:
        raise NotTokenAttention(_CHANNELS)


def _sums_over_tokens(module: nn.Module, config: Any) -> bool:
    try:
        bench = Bench(module)
    except UnreadLayer:
        return False
    if device_of(module).type == "meta" or not bench.emitters:
        return False
    with quietly(module):
        for trial in itertools.islice(trials(module, config, bench.widths()[:1]), 7):
            found = None if trial.tokens == 1 else bench.sums_over_tokens(trial)
            if found is not None:
                return found
    return False


class _Rejected(UnreadLayer):
    """What was found does not explain what the layer does, however else it may be called."""


class _Way(NamedTuple):
    """One product, and which rows its sides are."""

    place: int
    sides: tuple[Numbers, Numbers]
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]


class _Inference:
    """Infers a layout from one way to call a layer, and checks that it explains what the layer does."""

    def __init__(self, bench: Bench, trial: Trial, *, is_strict: bool) -> None:
        self.bench, self.trial, self.is_strict = bench, trial, is_strict
        self.rows: RowFollower = (RowFollower if bench.emitters else BareFollower)(bench, trial)

    @property
    def _first(self) -> Seen:
        return self.rows.runs[0]

    def read(self) -> Found:
        """What this way to call the layer shows.

        Raises:
            NoProduct: it comes to no softmax of a product.
            UnreadLayer: its queries and keys are no rows of projections.
        """
        self.rows.number_rows()
        # The axis that its product sums over grows with the tokens.
        widths = {product.query.shape[-1] for product in self._first.products}
        if widths == {self.trial.tokens} and self.bench.sums_over_tokens(self.trial):
            raise NotTokenAttention(_CHANNELS)
        ways, scaling, is_swapped = self._explained()
        clip = None
        is_turned = is_capped = False
        if self.is_strict:
            clip, is_turned, is_capped = self._check(ways, scaling)
        pairs = [pair[::-1] if is_swapped else pair for way in ways for pair in way.pairs]
        rows_of_query, rows_of_key = grouped(pairs)
        for way in ways:
            self.rows.add_biases(way.place)
        query = self.rows.side(rows_of_query, "queries")
        key = self.rows.side(rows_of_key, "keys")
        if scaling is not None:
            for own, numbers in zip((query, key), ways[0].sides[:: -1 if is_swapped else 1], strict=True):
                scaling *= numbers.factor / self.rows.factor_at(own.norm, numbers)
        if not self.is_strict and (query.norm is not None or key.norm is not None):
            scaling = None
        is_decided = (
            not self.is_strict
            or self.trial.is_recorded
            or query.projection.columns != key.projection.columns
            or len(input_arguments(self.bench.module)) <= 1
        )
        complete = not any(run.failed for run in self.rows.runs)
        found = Found(query, key, scaling, complete, is_decided, clip, is_turned, is_capped=is_capped)
        if not self.is_strict:
            return found
        return found._replace(
            is_added_to=self._is_added_to(ways),
            is_exclusive=self._is_exclusive(rows_of_query, rows_of_key),
        )

    def _explained(self) -> tuple[list[_Way], float | None, bool]:
        """The products whose sides are rows of projections, the factor on them, and whether keys come first."""
        if any(product.query.is_complex() or product.key.is_complex() for product in self._first.products):
            raise _Rejected("its queries and keys are complex numbers")
        if self.is_strict and any(product.is_normed for product in self._first.products):
            raise _Rejected("a norm stands between its products and their softmax")
        reason: UnreadLayer | None = None
        found: list[tuple[_Way, float | None, bool]] = []
        for place in range(len(self._first.products)):
            try:
                sides = self.rows.numbers_of(place, "query"), self.rows.numbers_of(place, "key")
                way = _Way(place, sides, head_pairs(sides[0].rows, sides[1].rows))
                for numbers, what in zip(grouped(way.pairs), ("queries", "keys"), strict=True):
                    self.rows.check_rows(numbers, what)
                found.append((way, *(self._factor(way, 1, 0.1) or (None, False))))
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
            logits = [self._first.products[own.place].logits for own in (first, way)]
            if logits[0] is not None and logits[0] is logits[1]:
                raise _Rejected("its logits are sums of several products of queries and keys")
            same = own_swapped == is_swapped and len(way.pairs[0][0]) == len(first.pairs[0][0])
            if not same or not _is_close(own_scaling, scaling) or known.intersection(way.pairs):
                raise _Rejected("it takes several softmaxes, of products that differ in their scale or width")
            ways.append(way)
            known.update(way.pairs)
        return ways, scaling, is_swapped

    def _factor(
        self, way: _Way, seed: int, scale: float, *, trial: Trial | None = None, varied: Sequence[Loose] = ()
    ) -> tuple[float | None, bool] | None:
        """The factor between a product and what its softmax is taken of, and whether the keys are on its left.

        From how the logits change with one side. What is added, such as masks, biases and products of positions,
        does not change; a bound on the logits is flat where they are small. None where a run has no such product.
        """
        keys = way.sides[1].rows.unique().cpu()
        products: list[Product] = []
        for shifted in (None, keys):
            sample = self.rows.sample(seed, scale, trial=trial, varied=varied, shifted=shifted)
            product = sample.seen.product(way.place)
            if product is None:
                return None
            products.append(product)
        return softmax_factor(*products)

    def _check(self, ways: list[_Way], scaling: float | None) -> tuple[float | None, bool, bool]:
        """Compare with runs on random numbers.

        Returns:
            The bound that queries and keys are clamped to, if any; whether they are turned by their places; and
            whether large logits are bounded.
        """
        for passed in self._first.passed:
            if self.trial.name_of(passed.given) is not None and not passed.is_scale_free():
                raise _Rejected(
                    f"what stands before its projections is a {type(passed.norm).__name__}, which is no norm"
                )
        plain = self.rows.sample(2, 1.0)
        for way in ways:
            for side, numbers in zip(SIDES, way.sides, strict=True):
                if not self._is_made(plain, way, side, numbers):
                    raise _Rejected(
                        f"{NAMES[side]} are not what its projections give, each with one factor: something that "
                        "is not linear, or other tokens, stand between them and the product"
                    )
        self._check_sources()
        if scaling is None:
            raise _Rejected(
                "its logits are not one factor times q · k: its heads have factors of their own, or something "
                "that is not linear stands between the product and the softmax"
            )
        self._check_parameters(ways, scaling)
        is_turned = self._check_wider(ways, scaling)
        return self._bound(ways), is_turned, self._is_capped(ways, scaling)

    def _is_capped(self, ways: list[_Way], scaling: float) -> bool:
        """Whether large logits are bounded, as by a soft cap; other functions of them are refused."""
        is_capped = False
        for way in ways:
            product = self._first.product(way.place)
            found = None if product is None or product.logits is None else self._factor(way, 9, 10.0)
            if found is None or _is_close(found[0], scaling):
                continue
            sizes = []
            for scale in (1e2, 1e3):
                logits = _shown(self.rows.sample(9, scale).seen.product(way.place))
                sizes.append(float(logits.abs().max()) if logits.numel() else math.inf)
            if not (math.isfinite(sizes[1]) and sizes[1] <= 1.01 * sizes[0]):
                raise _Rejected("its logits are no multiple of q · k where that is large, nor bounded")
            is_capped = True
        return is_capped

    def _is_added_to(self, ways: list[_Way]) -> bool:
        """Whether logits are something where all products are zero, whatever values parameters have."""
        for varied in ((), self.bench.loose):
            seen = self.rows.run_on_zeros(varied)
            for way in ways:
                logits = _shown(seen.product(way.place))
                # What is added to all logits of a row alike changes no softmax.
                if logits.numel() and float(logits.max() - logits.min()) > 0:
                    return True
        return False

    def _is_exclusive(self, query: Tensor, key: Tensor) -> bool:
        """Whether the output stays as it is where queries are multiplied by a factor and keys divided by it."""
        queries, keys = query.unique(), key.unique()
        if bool(torch.isin(queries, keys).any()):
            return False
        plain = torch.ones(self.rows.size)
        factors = plain.clone()
        factors[queries], factors[keys] = 2.0, 0.5
        first, second = (self.rows.sample(10, 0.5, factors=own).seen for own in (plain, factors))
        # What comes to the projections behind counts too: their own output is given.
        before, after = ([*own.sources.values(), *tensors_in(own.output)] for own in (first, second))
        if first.failed or second.failed or not before or len(before) != len(after):
            return False
        return all(
            one.shape == other.shape and bool(torch.allclose(one, other, rtol=1e-3, atol=1e-4))
            for one, other in zip(before, after, strict=True)
        )

    def _is_made(
        self, sample: Sample, way: _Way, side: str, numbers: Numbers, bound: float = math.inf
    ) -> bool:
        """Whether each vector of a side is what its rows are for some token."""
        product = sample.seen.product(way.place)
        got = None if product is None else getattr(product, side)
        if got is None or got.shape != numbers.rows.shape:
            return False
        allowed = tolerance(got)
        got = got.double().flatten(0, -2)
        rows = numbers.rows.flatten(0, -2).cpu()
        for own in rows.unique(dim=0):
            want = sample.made(own)
            if want is None:
                return False
            want = (numbers.factor * want.to(got.device)).clamp(-bound, bound)
            vectors = got[(rows == own).all(-1).to(got.device)]
            error = (vectors[:, None] - want[None]).abs().amax(-1).amin(1)
            if not float(error.max()) <= allowed * float(want.abs().max()):
                return False
        return True

    def _check_sources(self) -> None:
        """What projections are given that map others' outputs is what those give, of either sign."""
        for scale in (1.0, _LARGE):
            sample = self.rows.sample(3, scale)
            for emitter, features in self.rows.links.items():
                got = sample.seen.sources.get(emitter)
                want = sample.made(features.rows)
                if got is None or want is None:
                    continue
                # In any order, since projections may be called several times.
                given = got.double().flatten(0, -2)
                error = (given[:, None] - features.factor * want[None]).abs().amax(-1).amin(1).max()
                if not float(error) <= tolerance(got) * float(want.abs().max()):
                    raise _Rejected(
                        f"something that is not linear stands before its projection {emitter.plan.name!r}"
                    )

    def _check_parameters(self, ways: list[_Way], scaling: float) -> None:
        """Refuse layers in which other parameters change queries, keys or the factor on their products."""
        own = self.rows.own_parameters()
        loose = [other for other in self.bench.loose if id(other.parameter) not in own]
        culprit = None
        if loose and not self._is_unchanged(ways, scaling, loose):
            culprit = next((one for one in loose if not self._is_unchanged(ways, scaling, [one])), loose[0])
        if culprit is not None:
            raise _Rejected(
                f"its learnt parameter {culprit.path!r} changes its queries, its keys or the factor "
                "on their product"
            )

    def _is_unchanged(self, ways: list[_Way], scaling: float, loose: Sequence[Loose]) -> bool:
        sample = self.rows.sample(4, 1.0, varied=loose)
        for way in ways:
            sides = zip(SIDES, way.sides, strict=True)
            if not all(self._is_made(sample, way, side, numbers) for side, numbers in sides):
                return False
            found = self._factor(way, 5, 0.1, varied=loose)
            if found is None or not _is_close(found[0], scaling):
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
        samples = [self.rows.sample(seed, 1.0, trial=wider) for seed in (6, 7)]
        for way in ways:
            products = [own.seen.product(way.place) for own in samples]
            if any(product is None for product in products):
                if self.trial.tokens == 1:
                    raise _Rejected(
                        f"it runs alone on single tokens only{samples[0].seen.failed}, which do not tell whether "
                        "it mixes them"
                    )
                return is_turned
            found = self._factor(way, 1, 0.1, trial=wider)
            if found is not None and found[0] is not None and not _is_close(found[0], scaling):
                raise _Rejected("the factor on its products depends on how many tokens there are")
            heads: list[Tensor] = []
            for side, numbers in zip(SIDES, way.sides, strict=True):
                got = [getattr(product, side) for product in products]
                rows = numbers.rows.flatten(0, -2).unique(dim=0).cpu()
                if any(tensor.shape[-1] != rows.shape[-1] for tensor in got):
                    raise _Rejected(f"{NAMES[side]} change their width with the number of tokens")
                made = [[part for row in rows if (part := own.made(row)) is not None] for own in samples]
                if any(len(own) < len(rows) for own in made):
                    raise _Rejected(f"{NAMES[side]} are made otherwise of more tokens")
                want = [numbers.factor * torch.cat(own) for own in made]
                vectors = [tensor.double().flatten(0, -2).cpu() for tensor in got]
                wanted = torch.stack([part.norm(dim=-1) for part in (*want, want[0] - want[1])], -1)
                lengths = torch.stack([part.norm(dim=-1) for part in (*vectors, vectors[0] - vectors[1])], -1)
                error, nearest = (lengths[:, None] - wanted.cpu()[None]).abs().amax(-1).min(1)
                heads.append((nearest // len(made[0][0])).view(*got[0].shape[:-1], 1))
                allowed = tolerance(got[0])
                if not float(error.max()) <= allowed * float(wanted.max()):
                    raise _Rejected(
                        f"{NAMES[side]} mix several tokens or heads, or depend on how many tokens there are"
                    )
                apart = (vectors[0][:, None] - want[0].cpu()[None]).abs().amax(-1).amin(1)
                is_turned = is_turned or not float(apart.max()) <= allowed * float(want[0].abs().max())
            try:
                head_pairs(*heads)
            except UnreadLayer:
                raise _Rejected("its products take vectors of several heads together") from None
        return is_turned

    def _bound(self, ways: list[_Way]) -> float | None:
        """The bound that large queries and keys are clamped to, or None."""
        large = self.rows.sample(8, _LARGE)
        bounds: set[float] = set()
        for way in ways:
            for side, numbers in zip(SIDES, way.sides, strict=True):
                if self._is_made(large, way, side, numbers):
                    continue
                product = large.seen.product(way.place)
                bound = math.nan if product is None else float(getattr(product, side).abs().max())
                if not math.isfinite(bound) or not self._is_made(large, way, side, numbers, bound):
                    raise _Rejected(f"large ones of {NAMES[side]} are bounded, by no clamp to ± one number")
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
        for side in SIDES:
            large, small = (getattr(own.products[0], side).abs().double() for own in seen)
            bound, factor = float(large.max()), float(small.max()) / little
            share = (large >= (1 - 1e-3) * bound).double().movedim(-2, 0).flatten(1).mean(1).max()
            if float(share) > 0.99 and math.isfinite(bound) and 0 < factor * little < 0.5 * bound:
                return (
                    f"a clamp to ±{bound / factor:.3g} between projection and product changes {NAMES[side]}"
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
        for side in SIDES:
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


def _is_close(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=1e-3)


def _shown(product: Product | None) -> Tensor:
    """The logits of a product that no mask hides, flat; none without logits."""
    if product is None or product.logits is None:
        return torch.zeros(0)
    return product.logits[product.logits.isfinite() & (product.logits > -1e3)]
