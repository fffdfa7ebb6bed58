"""Checks that what runs showed of a layer explains what the layer does, whatever it is given."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.architecture.products import Product, softmax_factor, tensors_in
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.row_numbers import NAMES, SIDES, Numbers, RowFollower, Sample, head_pairs
from lightning_qk.heads.running import Bench, Loose, constant, random, tolerance
from lightning_qk.heads.trials import Trial

_LARGE = 1e3


class Rejected(UnreadLayer):
    """What was found does not explain what the layer does, however else it may be called."""


class Way(NamedTuple):
    """One product, and which rows its sides are."""

    place: int
    sides: tuple[Numbers, Numbers]
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]


def logit_factor(
    rows: RowFollower,
    way: Way,
    seed: int,
    scale: float,
    *,
    trial: Trial | None = None,
    varied: Sequence[Loose] = (),
) -> tuple[float | None, bool] | None:
    """The factor between a product and what its softmax is taken of, and whether the keys are on its left.

    From how the logits change with one side. What is added, such as masks, biases and products of positions,
    does not change; a bound on the logits is flat where they are small. None where a run has no such product.
    """
    keys = way.sides[1].rows.unique().cpu()
    products: list[Product] = []
    for shifted in (None, keys):
        sample = rows.sample(seed, scale, trial=trial, varied=varied, shifted=shifted)
        product = sample.seen.product(way.place)
        if product is None:
            return None
        products.append(product)
    return softmax_factor(*products)


class LayoutCheck:
    """What was found of a layer is compared with what the layer makes of random numbers.

    Numbers are small and large, in more than one token, and with the layer's other parameters varied: that shows
    what stands between projection and product.

    Args:
        rows: of one way to call the layer.
        ways: the products that its softmaxes are taken of, and which rows their sides are.
        scaling: the factor on these products, or None where there is no single one.

    Attributes:
        bound: what queries and keys are clamped to, or None.
        is_turned: they are turned by their places.
        is_capped: large logits are bounded.

    Raises:
        Rejected: what was found does not explain what the layer does.
    """

    def __init__(self, rows: RowFollower, ways: list[Way], scaling: float | None) -> None:
        self._rows, self._ways = rows, ways
        self._check_sides()
        if scaling is None:
            raise Rejected(
                "its logits are not one factor times q · k: its heads have factors of their own, or something "
                "that is not linear stands between the product and the softmax"
            )
        self._scaling = scaling
        self._check_parameters()
        self.is_turned = self._check_wider()
        self.bound = self._bound()
        self.is_capped = self._is_capped()

    def _check_sides(self) -> None:
        """Refuse sides that are not what projections give, or projections of something else than is given."""
        for passed in self._rows.runs[0].passed:
            if self._rows.trial.name_of(passed.given) is not None and not passed.is_scale_free():
                raise Rejected(f"its projections are fed by a {type(passed.norm).__name__}, which is no norm")
        plain = self._rows.sample(2, 1.0)
        for way in self._ways:
            for side, numbers in zip(SIDES, way.sides, strict=True):
                if not self._is_made(plain, way, side, numbers):
                    raise Rejected(
                        f"{NAMES[side]} are not what its projections give, each with one factor: something that "
                        "is not linear, or other tokens, stand between them and the product"
                    )
        self._check_sources()

    def _is_capped(self) -> bool:
        """Whether large logits are bounded, as by a soft cap; other functions of them are refused."""
        is_capped = False
        for way in self._ways:
            product = self._rows.runs[0].product(way.place)
            found = (
                None if product is None or product.logits is None else logit_factor(self._rows, way, 9, 10.0)
            )
            if found is None or is_close(found[0], self._scaling):
                continue
            sizes = []
            for scale in (1e2, 1e3):
                logits = _shown(self._rows.sample(9, scale).seen.product(way.place))
                sizes.append(float(logits.abs().max()) if logits.numel() else math.inf)
            if not (math.isfinite(sizes[1]) and sizes[1] <= 1.01 * sizes[0]):
                raise Rejected("its logits are no multiple of q · k where that is large, nor bounded")
            is_capped = True
        return is_capped

    def is_added_to(self) -> bool:
        """Whether logits are something where all products are zero, whatever values parameters have."""
        for varied in ((), self._rows.bench.loose):
            seen = self._rows.run_on_zeros(varied)
            for way in self._ways:
                logits = _shown(seen.product(way.place))
                # What is added to all logits of a row alike changes no softmax.
                if logits.numel() and float(logits.max() - logits.min()) > 0:
                    return True
        return False

    def is_exclusive(self, query: Tensor, key: Tensor) -> bool:
        """Whether the output stays as it is where queries are multiplied by a factor and keys divided by it."""
        queries, keys = query.unique(), key.unique()
        if bool(torch.isin(queries, keys).any()):
            return False
        plain = torch.ones(self._rows.size)
        factors = plain.clone()
        factors[queries], factors[keys] = 2.0, 0.5
        first, second = (self._rows.sample(10, 0.5, factors=own).seen for own in (plain, factors))
        # What comes to the projections behind counts too: their own output is given.
        before, after = ([*own.sources.values(), *tensors_in(own.output)] for own in (first, second))
        if first.failed or second.failed or not before or len(before) != len(after):
            return False
        return all(
            one.shape == other.shape and bool(torch.allclose(one, other, rtol=1e-3, atol=1e-4))
            for one, other in zip(before, after, strict=True)
        )

    def _is_made(
        self, sample: Sample, way: Way, side: str, numbers: Numbers, bound: float = math.inf
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
            sample = self._rows.sample(3, scale)
            for emitter, features in self._rows.links.items():
                got = sample.seen.sources.get(emitter)
                want = sample.made(features.rows)
                if got is None or want is None:
                    continue
                # In any order, since projections may be called several times.
                given = got.double().flatten(0, -2)
                error = (given[:, None] - features.factor * want[None]).abs().amax(-1).amin(1).max()
                if not float(error) <= tolerance(got) * float(want.abs().max()):
                    raise Rejected(
                        f"something that is not linear precedes its projection {emitter.plan.name!r}"
                    )

    def _check_parameters(self) -> None:
        """Refuse layers in which other parameters change queries, keys or the factor on their products."""
        own = self._rows.own_parameters()
        loose = [other for other in self._rows.bench.loose if id(other.parameter) not in own]
        culprit = None
        if loose and not self._is_unchanged(loose):
            culprit = next((one for one in loose if not self._is_unchanged([one])), loose[0])
        if culprit is not None:
            raise Rejected(
                f"its learnt parameter {culprit.path!r} changes its queries, its keys or the factor "
                "on their product"
            )

    def _is_unchanged(self, loose: Sequence[Loose]) -> bool:
        sample = self._rows.sample(4, 1.0, varied=loose)
        for way in self._ways:
            sides = zip(SIDES, way.sides, strict=True)
            if not all(self._is_made(sample, way, side, numbers) for side, numbers in sides):
                return False
            found = logit_factor(self._rows, way, 5, 0.1, varied=loose)
            if found is None or not is_close(found[0], self._scaling):
                return False
        return True

    def _check_wider(self) -> bool:
        """Raises where tokens or heads are mixed: with more tokens each vector is some rows of one, if turned.

        Returns:
            Whether they are turned.
        """
        wider = self._rows.trial.wider
        if wider is None or any(given.dim() > 3 for given in wider.given.values()):
            return False
        is_turned = False
        samples = [self._rows.sample(seed, 1.0, trial=wider) for seed in (6, 7)]
        for way in self._ways:
            products = [own.seen.product(way.place) for own in samples]
            if any(product is None for product in products):
                if self._rows.trial.tokens == 1:
                    raise Rejected(
                        f"it runs alone on single tokens only{samples[0].seen.failed}, which do not tell whether "
                        "it mixes them"
                    )
                return is_turned
            found = logit_factor(self._rows, way, 1, 0.1, trial=wider)
            if found is not None and found[0] is not None and not is_close(found[0], self._scaling):
                raise Rejected("the factor on its products depends on how many tokens there are")
            heads: list[Tensor] = []
            for side, numbers in zip(SIDES, way.sides, strict=True):
                got = [getattr(product, side) for product in products]
                rows = numbers.rows.flatten(0, -2).unique(dim=0).cpu()
                if any(tensor.shape[-1] != rows.shape[-1] for tensor in got):
                    raise Rejected(f"{NAMES[side]} change their width with the number of tokens")
                made = [[part for row in rows if (part := own.made(row)) is not None] for own in samples]
                if any(len(own) < len(rows) for own in made):
                    raise Rejected(f"{NAMES[side]} are made otherwise of more tokens")
                want = [numbers.factor * torch.cat(own) for own in made]
                vectors = [tensor.double().flatten(0, -2).cpu() for tensor in got]
                wanted = torch.stack([part.norm(dim=-1) for part in (*want, want[0] - want[1])], -1)
                lengths = torch.stack([part.norm(dim=-1) for part in (*vectors, vectors[0] - vectors[1])], -1)
                error, nearest = (lengths[:, None] - wanted.cpu()[None]).abs().amax(-1).min(1)
                heads.append((nearest // len(made[0][0])).view(*got[0].shape[:-1], 1))
                allowed = tolerance(got[0])
                if not float(error.max()) <= allowed * float(wanted.max()):
                    raise Rejected(
                        f"{NAMES[side]} mix several tokens or heads, or depend on how many tokens there are"
                    )
                apart = (vectors[0][:, None] - want[0].cpu()[None]).abs().amax(-1).amin(1)
                is_turned = is_turned or not float(apart.max()) <= allowed * float(want[0].abs().max())
            try:
                head_pairs(*heads)
            except UnreadLayer:
                raise Rejected("its products take vectors of several heads together") from None
        return is_turned

    def _bound(self) -> float | None:
        """The bound that large queries and keys are clamped to, or None."""
        large = self._rows.sample(8, _LARGE)
        bounds: set[float] = set()
        for way in self._ways:
            for side, numbers in zip(SIDES, way.sides, strict=True):
                if self._is_made(large, way, side, numbers):
                    continue
                product = large.seen.product(way.place)
                bound = math.nan if product is None else float(getattr(product, side).abs().max())
                if not math.isfinite(bound) or not self._is_made(large, way, side, numbers, bound):
                    raise Rejected(f"large ones of {NAMES[side]} are bounded, by no clamp to ± one number")
                bounds.add(bound / abs(numbers.factor))
        return min(bounds) if bounds else None


def _clamped(bench: Bench, trial: Trial) -> str | None:
    """That a clamp keeps the layer from being read, as a clause about it; None where none is seen.

    Queries of numbers that are all large are ± one number then, at a token that nothing turns, and small ones
    are smaller.
    """
    little = 1e-4
    emissions = (random(8, 1e6), constant(torch.full((bench.size,), little)))
    seen = [bench.run(trial, emission) for emission in emissions]
    if not bench.emitters or not all(own.products for own in seen):
        return None
    for side in SIDES:
        large, small = (getattr(own.products[0], side).abs().double() for own in seen)
        bound, factor = float(large.max()), float(small.max()) / little
        share = (large >= (1 - 1e-3) * bound).double().movedim(-2, 0).flatten(1).mean(1).max()
        if float(share) > 0.99 and math.isfinite(bound) and 0 < factor * little < 0.5 * bound:
            return f"a clamp to ±{bound / factor:.3g} between projection and product changes {NAMES[side]}"
    return None


def cause(bench: Bench, trial: Trial) -> str | None:
    """What keeps the layer from being read, as a clause about it: a clamp or a cosine; None for others."""
    return _clamped(bench, trial) or _normalized(bench, trial)


def _normalized(bench: Bench, trial: Trial) -> str | None:
    """That queries and keys are divided by their length.

    Those of larger numbers are the same then, those of other numbers are not, and all are of one length.
    """
    given = ((8, 1.0), (8, 16.0), (9, 1.0))
    seen = [bench.run(trial, random(seed, scale)) for seed, scale in given]
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
    return "its queries and keys are divided by their length in its own forward, as for a cosine similarity"


def is_close(first: float | None, second: float | None) -> bool:
    """Whether two factors are the same but for rounding; None is its own equal."""
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=1e-3)


def _shown(product: Product | None) -> Tensor:
    """The logits of a product that no mask hides, flat; none without logits."""
    if product is None or product.logits is None:
        return torch.zeros(0)
    return product.logits[product.logits.isfinite() & (product.logits > -1e3)]
