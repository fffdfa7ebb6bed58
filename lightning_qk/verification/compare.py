"""Compare what was read of a layer's weights with the queries and keys that its attention received.

Nothing here knows layouts or names. Tensors that entered the layer are projected with the weights that were
read, and the result is looked for among the received vectors:

- equal up to one positive number, where nothing stands in between;
- equal up to one positive number a token, head and segment, behind a norm of queries and keys;
- rotated by position as it was read; or, where positions are not 0, 1, …, or the rotation is of another kind,
  under a rotation that is the same for queries and keys of one position, so that ``q·q``, ``k·k`` and ``q·k`` of
  each token are those of the projections: those three make the spectrum at distance 0. Behind norms, which decide
  the lengths, these are cosines, and those of neighbouring heads, which tell queries from keys.

Tokens are compared in their order, and where that fails as a set: windows, packing and moved axes reorder them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.position import NONE
from lightning_qk.heads.projections import HeadProjections

# Largest relative error of a head's vectors that rounding explains, by the coarsest type that takes part. Products
# in float32 may be carried out in TF32, which has ten bits.
_TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 5e-2}
# Tokens that are compared.
_SAMPLES = 48
# Numbers in the largest set that is searched.
_SEARCHED = 2**24
# Numbers in a vector that are enough for it to be told from all others.
_FEATURES = 4
# A head whose vectors are shorter than this share of the others' is compared on the scale of the others.
_SHORT = 1e-2


class _Tokens(NamedTuple):
    """One input as tokens.

    Attributes:
        place: which of the inputs it is.
        values: ``(tokens, width)``.
        positions: ``(tokens,)``, counted from 0 in each sequence.
    """

    place: int
    values: Tensor
    positions: Tensor


class Match(NamedTuple):
    """How received vectors are explained.

    Attributes:
        query: largest relative error of a query head.
        key: largest relative error of a key head.
        factor: received over read, of queries times keys; None where a norm leaves it open.
        sources: which of the inputs queries and keys are projections of.
    """

    query: float
    key: float
    factor: float | None
    sources: tuple[int, int]

    @property
    def error(self) -> float:
        """The larger error."""
        return max(self.query, self.key)


def tolerance(*dtypes: torch.dtype) -> float:
    """The largest relative error that rounding explains.

    Args:
        dtypes: of what takes part: vectors, weights, autocast.
    """
    return max((_TOLERANCE[dtype] for dtype in dtypes if dtype in _TOLERANCE), default=5e-2)


class _Side(NamedTuple):
    """One side of a layer as it was read.

    Attributes:
        weight: ``(heads, d_head, d_in)``.
        bias: ``(heads, d_head)``, or None.
        offset: what a norm adds behind the projection, ``(heads, d_head)``, or None.
        gain: by what a norm behind the rotation multiplies, ``(heads, d_head)``, or None.
    """

    weight: Tensor
    bias: Tensor | None
    offset: Tensor | None
    gain: Tensor | None

    def project(self, tokens: Tensor) -> Tensor:
        """``(tokens, d_in)`` to ``(tokens, heads, d_head)``."""
        out = torch.einsum("td,hed->the", at_least_float32(tokens), at_least_float32(self.weight))
        out = out if self.bias is None else out + at_least_float32(self.bias)
        return self.before_gain(out)

    def before_gain(self, vectors: Tensor) -> Tensor:
        """Vectors ``(tokens, heads, d_head)`` without the gain that comes behind the rotation."""
        return vectors if self.gain is None else vectors / _for_heads(self.gain, vectors.shape[1])


class Added(NamedTuple):
    """What the norm of one side does besides what is folded into the weights.

    Attributes:
        offset: what it adds, ``(heads, d_head)``, or None.
        gain: its gain, where it stands behind the rotation, ``(heads, d_head)``; None elsewhere.
    """

    offset: Tensor | None = None
    gain: Tensor | None = None


def compare(
    read: HeadProjections,
    inputs: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    added: tuple[Added, Added] = (Added(), Added()),
) -> Match | None:
    """Explain the vectors that attention received by what was read.

    Args:
        read: the layer's projections.
        inputs: tensors that entered the layer or its parts; those of another width are passed over.
        query: ``(..., n, d_head)`` as it was multiplied, with heads and sequences in any axes before.
        key: ``(..., m, d_head)``.
        added: what norms of queries and of keys do besides.

    Returns:
        The best explanation, good or not; None where nothing can be compared: no input has the width of the
        weights.
    """
    with torch.no_grad(), full_precision(query.device):
        sides = (
            _Side(read.query, read.query_bias, *added[0]),
            _Side(read.key, read.key_bias, *added[1]),
        )
        tokens = [
            [form for place, x in enumerate(inputs) for form in _as_tokens(place, x, width)]
            for width in read.width
        ]
        if read.key_layer is not None:
            tokens[1] = []  # the keys of another layer, made of what entered that one
        elif not tokens[1]:
            return None
        if not tokens[0]:
            return None
        received = (
            list(_by_token(query, (read.heads,), read.d_head)),
            list(_by_token(key, (read.kv_heads, read.heads), read.d_head)),
        )
        if not all(received):
            return Match(math.inf, math.inf, None, (tokens[0][0].place, tokens[0][0].place))
        best = _direct(read, sides, tokens, received)
        if best.error <= tolerance(query.dtype) or read.position == NONE:
            return best
        rotated = _rotated(read, sides, tokens, received)
        return rotated if rotated is not None and rotated.error < best.error else best


def beyond(read: HeadProjections, inputs: Sequence[Tensor], match: Match) -> tuple[float, float]:
    """Which share of the numbers in queries and keys, as read, a clamp to ``read.clip`` changes.

    Args:
        read: the layer's projections, with a bound.
        inputs: as for :func:`compare`.
        match: what it returned.
    """
    bound = math.inf if read.clip is None else read.clip
    shares = []
    with torch.no_grad(), full_precision(inputs[0].device):
        for weight, bias, place in (
            (read.query, read.query_bias, match.sources[0]),
            (read.key, read.key_bias, match.sources[1]),
        ):
            if place < 0:  # the keys of another layer
                shares.append(0.0)
                continue
            tokens = next(_as_tokens(place, inputs[place], weight.shape[-1])).values
            made = _Side(weight, bias, None, None).project(tokens)
            shares.append(float((made.abs() > bound).double().mean()))
    return shares[0], shares[1]


def _as_tokens(place: int, x: Tensor, width: int) -> Iterator[_Tokens]:
    """A tensor as tokens, in the orders that are usual."""

    def tokens(x: Tensor) -> _Tokens:
        values = x.reshape(-1, width)
        return _Tokens(place, values, torch.arange(len(values), device=x.device) % x.shape[-2])

    if x.shape[-1] == width:
        yield tokens(x)
        if x.dim() == 3 and 1 not in x.shape[:2]:
            yield tokens(x.transpose(0, 1))
    elif x.dim() > 2 and x.shape[1] == width:
        yield tokens(x.movedim(1, -1))


def _by_token(vectors: Tensor, heads: Sequence[int], d_head: int) -> Iterator[Tensor]:
    """Vectors as (tokens, heads, d_head), in every way that the axes allow."""
    if vectors.dim() < 2 or vectors.shape[-1] != d_head:
        return
    leading = vectors.shape[:-2]
    for count in dict.fromkeys(heads):
        if count == 1:
            yield vectors.reshape(-1, 1, d_head)
            continue
        for axis, size in enumerate(leading):
            if size == count:
                yield vectors.movedim(axis, -2).reshape(-1, count, d_head)
            if axis + 1 < len(leading) and size != count and size * leading[axis + 1] == count:
                yield vectors.flatten(axis, axis + 1).movedim(axis, -2).reshape(-1, count, d_head)
        # Batch and heads in one axis.
        for axis, size in enumerate(leading):
            if size > count and size % count == 0:
                for shape, own in (((-1, count), axis + 1), ((count, -1), axis)):
                    yield vectors.unflatten(axis, shape).movedim(own, -2).reshape(-1, count, d_head)


def _direct(
    read: HeadProjections,
    sides: tuple[_Side, _Side],
    tokens: Sequence[Sequence[_Tokens]],
    received: tuple[list[Tensor], list[Tensor]],
) -> Match:
    """Each side on its own, where nothing turns its vectors."""
    found: list[tuple[float, float | None, int]] = []
    for side, own, given in zip(sides, tokens, received, strict=True):
        if not own:  # the keys of another layer
            found.append((0.0, None, -1))
            continue
        found.append(min(_explained(read, side, own, given), key=lambda one: one[0]))
    (first, by, place), (second, other, origin) = found
    factor = None if by is None or other is None else by * other
    return Match(first, second, factor, (place, origin))


def _explained(
    read: HeadProjections,
    side: _Side,
    tokens: Sequence[_Tokens],
    received: list[Tensor],
) -> Iterator[tuple[float, float | None, int]]:
    """Error, factor and input of every way to explain one side; stops at the first good one."""
    good = tolerance(received[0].dtype)
    measure = _Along(read, side.offset) if read.qk_norm else _Equal()
    for searched in ("", "tokens", "heads"):
        for form in tokens:
            for got in received:
                found = _pair(side, form.values, got, measure, searched=searched)
                if found is None:
                    continue
                yield (*found, form.place)
                if found[0] <= good:
                    return
    yield math.inf, None, tokens[0].place


class _Equal:
    """Equal up to one positive number."""

    def features(self, vectors: Tensor, *, is_received: bool) -> Tensor:
        """What is compared, ``(tokens, heads, numbers)``."""
        return vectors

    def error(self, want: Tensor, got: Tensor) -> tuple[float, float | None]:
        """Largest relative error of a head, and the factor."""
        square = want.square().sum()
        factor = float((want * got).sum() / square) if square > 0 else 1.0
        if factor <= 0:
            return math.inf, None
        return _relative((got - factor * want).norm(dim=(0, 2)), got.norm(dim=(0, 2))), factor


class _Along:
    """Equal up to one positive number a token, head and segment, behind what a norm adds."""

    def __init__(self, read: HeadProjections, offset: Tensor | None) -> None:
        self._parts = _segments(read)
        self._offset = offset

    def features(self, vectors: Tensor, *, is_received: bool) -> Tensor:
        """Directions of the segments."""
        if is_received and self._offset is not None:
            vectors = vectors - _for_heads(at_least_float32(self._offset), vectors.shape[1])
        return torch.cat([_unit(vectors[..., part]) for part in self._parts], dim=-1)

    def error(self, want: Tensor, got: Tensor) -> tuple[float, float | None]:
        """Largest relative error of a head's directions; no factor."""
        return _relative((got - want).norm(dim=(0, 2)), got.norm(dim=(0, 2))), None


def _pair(
    side: _Side, tokens: Tensor, received: Tensor, measure: "_Equal | _Along", *, searched: str
) -> tuple[float, float | None] | None:
    """Compare projected tokens with received ones; None where that cannot be done.

    Args:
        side: queries or keys.
        tokens: ``(tokens, width)``.
        received: ``(tokens, heads, d_head)``.
        measure: when two vectors are equal.
        searched: ``""`` for tokens in their order, ``"tokens"`` for sets of tokens, ``"heads"`` for a set of
            tokens for each head, as where every head picks its own.
    """
    if not searched:
        if len(tokens) != len(received):
            return None
        chosen = _chosen(len(tokens), tokens.device)
        want = _expanded(side.project(tokens[chosen]), received.shape[1])
        got = at_least_float32(received[chosen])
        return measure.error(
            measure.features(want, is_received=False), measure.features(got, is_received=True)
        )
    if max(len(tokens), len(received)) * received[0].numel() > _SEARCHED:
        return None
    want = measure.features(_expanded(side.project(tokens), received.shape[1]), is_received=False)
    got = measure.features(at_least_float32(received), is_received=True)
    if searched == "heads" and got.shape[-1] < _FEATURES:
        return None
    find = _nearest if searched == "tokens" else _nearest_of_heads
    return min(
        (measure.error(*find(want * factor, got)) for factor in _factors(want, got)),
        key=lambda one: one[0],
    )


def _factors(want: Tensor, got: Tensor) -> list[float]:
    """Numbers that queries or keys are often multiplied by, and the ratio of the sets' sizes."""
    d_head = got.shape[-1]
    mean = float(got.square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30))
    return [1.0, mean, d_head**-0.5, d_head**-0.25]


def _nearest(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Some members of the smaller set, each with the nearest one of the larger."""
    from_received = len(got) <= len(want)
    smaller, larger = (got, want) if from_received else (want, got)
    some = smaller[_chosen(len(smaller), smaller.device)]
    nearest = larger[torch.cdist(some.flatten(1), larger.flatten(1)).argmin(1)]
    return (nearest, some) if from_received else (some, nearest)


def _nearest_of_heads(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_nearest`, for each head by itself."""
    pairs = [_nearest(want[:, head, None], got[:, head, None]) for head in range(got.shape[1])]
    return torch.cat([one for one, _ in pairs], dim=1), torch.cat([other for _, other in pairs], dim=1)


def _rotated(
    read: HeadProjections,
    sides: tuple[_Side, _Side],
    tokens: Sequence[Sequence[_Tokens]],
    received: tuple[list[Tensor], list[Tensor]],
) -> Match | None:
    """Queries and keys of the same tokens under a rotation; each alone where they are not the same tokens."""
    best = _together(read, sides, tokens, received)
    if best is not None and best.error <= tolerance(received[0][0].dtype):
        return best
    # Keys of other tokens besides, or of another layer: each side is paired with itself. What a rotation leaves of
    # one side says less, and is asked only where there are no pairs.
    alone = [
        _together(read, (side, side), (own, own), (given, given), as_read=best is not None) if own else None
        for side, own, given in zip(sides, tokens, received, strict=True)
    ]
    query, key = alone
    if query is None or (key is None and tokens[1]):
        return best
    found = Match(query.query, 0.0, None, (query.sources[0], -1))
    if key is not None:
        found = Match(query.query, key.query, None, (query.sources[0], key.sources[0]))
    return found if best is None or found.error < best.error else best


def _together(
    read: HeadProjections,
    sides: tuple[_Side, _Side],
    tokens: Sequence[Sequence[_Tokens]],
    received: Sequence[list[Tensor]],
    *,
    as_read: bool = False,
) -> Match | None:
    """The best pair of arrangements that have as many queries as keys; None where there is none.

    Args:
        read: the layer's projections.
        sides: of them.
        tokens: what queries and keys may be made of.
        received: arrangements of both.
        as_read: only under the rotation that was read.
    """
    best: Match | None = None
    for searched in (False, True):
        for form in tokens[0]:
            for source in tokens[1]:
                if len(form.values) != len(source.values):
                    continue
                for query in received[0]:
                    for key in received[1]:
                        if query.shape[0] != key.shape[0]:
                            continue
                        pair = (form, source), (query, key)
                        error = _turned(read, sides, *pair, searched=searched, as_read=as_read)
                        if error is not None and (best is None or error[0] < best.error):
                            best = Match(error[0], error[0], error[1], (form.place, source.place))
                            if best.error <= tolerance(query.dtype):
                                return best
    return best


def _turned(
    read: HeadProjections,
    sides: tuple[_Side, _Side],
    tokens: tuple[_Tokens, _Tokens],
    received: tuple[Tensor, Tensor],
    *,
    searched: bool,
    as_read: bool,
) -> tuple[float, float | None] | None:
    """Error and factor of one arrangement of queries and keys; None where it cannot be compared.

    Args:
        read: the layer's projections.
        sides: of them.
        tokens: what queries and keys are made of.
        received: both, ``(tokens, heads, d_head)``.
        searched: compare as sets.
        as_read: only under the rotation that was read.
    """
    if as_read and read.rotary is None:
        return None
    heads = max(vectors.shape[1] for vectors in received)
    given, device = [own.values for own in tokens], received[0].device
    if searched:
        if max(len(given[0]), len(received[0])) * received[0][0].numel() > _SEARCHED:
            return None
        chosen, taken = (
            torch.arange(len(given[0]), device=device),
            torch.arange(len(received[0]), device=device),
        )
    else:
        if len(given[0]) != len(received[0]):
            return None
        chosen = taken = _chosen(len(given[0]), device)
    want = [_expanded(side.project(own[chosen]), heads) for side, own in zip(sides, given, strict=True)]
    got = [
        side.before_gain(_expanded(at_least_float32(own[taken]), heads))
        for side, own in zip(sides, received, strict=True)
    ]
    if read.rotary is not None:
        places = [own.positions[chosen] for own in tokens]
        known = _as_read(read, sides, want, got, places, searched=searched)
        if as_read or known[0] <= tolerance(received[0].dtype):
            return known
    if read.rotary is not None and read.rotary.scale != 1.0:
        want = [_stretched(vectors, read) for vectors in want]
    worst, factor = 0.0, None
    for part in _segments(read):
        q, k = (vectors[..., part] for vectors in want)
        r, s = (vectors[..., part] for vectors in got)
        if read.qk_norm:
            shifts = [
                None if side.offset is None else _for_heads(at_least_float32(side.offset), heads)[..., part]
                for side in sides
            ]
            left, right = _cosines(q, k, (r, s), shifts if not searched else [None, None])
            scales = [torch.ones(3, device=left.device, dtype=left.dtype)]
        else:
            left, right = _products(q, k), _products(r, s)
            scales = _scales(read, left, right) if searched else [_fitted(left, right)]
        found = []
        for scale in scales:
            want_part, got_part = _nearest(left * scale, right) if searched else (left * scale, right)
            # Products of a query and a key may be small: they are compared on the scale of the lengths.
            size = math.sqrt(len(got_part)) * torch.ones_like(got_part[0, :, 0])
            if not read.qk_norm:
                size = got_part[..., :2].norm(dim=(0, 2))
            found.append((_relative((want_part - got_part).norm(dim=(0, 2)), size), float(scale[2])))
        error, by = min(found)
        worst, factor = max(worst, error), None if read.qk_norm else by
    return worst, factor


def _as_read(
    read: HeadProjections,
    sides: tuple[_Side, _Side],
    want: list[Tensor],
    got: list[Tensor],
    positions: list[Tensor],
    *,
    searched: bool,
) -> tuple[float, float | None]:
    """Error and factor of queries and keys that are rotated as was read, at positions that count from 0."""
    errors, factor = [], 1.0
    for side, vectors, own, places in zip(sides, want, got, positions, strict=True):
        if read.qk_norm and side.offset is not None:
            return math.inf, None  # the offset is rotated too
        measure = _Along(read, None) if read.qk_norm else _Equal()
        turned = measure.features(_at(vectors, read, places), is_received=False)
        seen = measure.features(own, is_received=True)
        error, by = measure.error(*_nearest(turned, seen)) if searched else measure.error(turned, seen)
        errors.append(error)
        factor = factor * by if by is not None else math.nan
    return max(errors), None if math.isnan(factor) else factor


def _at(vectors: Tensor, read: HeadProjections, positions: Tensor) -> Tensor:
    """Vectors ``(tokens, heads, d_head)`` rotated to their positions ``(tokens,)``."""
    assert read.rotary is not None
    by_token = vectors.movedim(0, -1)  # one column a token
    angles = positions.to(vectors.dtype)[:, None] * read.rotary.inv_freq.to(vectors)
    start, pairs = read.rotary.start, read.rotary.inv_freq.numel()
    part = by_token[:, start : start + 2 * pairs]
    if read.rotary.interleaved:
        first, second = part[:, 0::2], part[:, 1::2]
    else:
        first, second = part[:, :pairs], part[:, pairs:]
    cos, sin = angles.cos().T, angles.sin().T
    turned = (first * cos - second * sin, first * sin + second * cos)
    both = torch.stack(turned, dim=2).flatten(1, 2) if read.rotary.interleaved else torch.cat(turned, dim=1)
    out = by_token.clone()
    out[:, start : start + 2 * pairs] = both * read.rotary.scale
    return out.movedim(-1, 0)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """``q·q``, ``k·k`` and ``q·k`` of every token and head."""
    pairs = ((query, query), (key, key), (query, key))
    return torch.stack([(one * other).sum(-1) for one, other in pairs], dim=-1)


def _fitted(want: Tensor, got: Tensor) -> Tensor:
    """The factors on ``q·q``, ``k·k`` and ``q·k`` that fit best."""
    by = (got[..., :2].sum((0, 1)) / want[..., :2].sum((0, 1)).clamp_min(1e-30)).clamp_min(0)
    return torch.stack([by[0], by[1], (by[0] * by[1]).sqrt()])


def _scales(read: HeadProjections, want: Tensor, got: Tensor) -> list[Tensor]:
    """Factors that queries or keys are often multiplied by, for sets whose members do not follow each other."""
    half = read.scaling**0.5
    pairs = ((1.0, 1.0), (read.scaling, 1.0), (half, half))
    known = [torch.tensor([q * q, k * k, q * k]).to(got) for q, k in pairs]
    return [*known, _fitted(want / len(want), got / len(got))]


def _cosines(
    query: Tensor,
    key: Tensor,
    received: tuple[Tensor, Tensor],
    shifts: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Cosines of queries and keys, as read and as received, where a norm decides the lengths.

    Of every token and head: of its query and key, and of each with that of the next head.
    """
    want = [
        own if shift is None else _lengthened(own, shift, got)
        for own, shift, got in zip((query, key), shifts, received, strict=True)
    ]
    return _neighbours(*want), _neighbours(*received)


def _neighbours(query: Tensor, key: Tensor) -> Tensor:
    query, key = _unit(query), _unit(key)
    pairs = ((query, key), (query, query.roll(1, 1)), (key, key.roll(1, 1)))
    return torch.stack([(one * other).sum(-1) for one, other in pairs], dim=-1)


def _lengthened(vectors: Tensor, shift: Tensor, received: Tensor) -> Tensor:
    """``a v + shift`` with the positive a that gives the received length."""
    square = vectors.square().sum(-1).clamp_min(1e-30)
    half = (vectors * shift).sum(-1)
    rest = shift.square().sum(-1) - received.square().sum(-1)
    root = (half.square() - square * rest).clamp_min(0).sqrt()
    return vectors * ((root - half) / square).clamp_min(0)[..., None] + shift


def _stretched(vectors: Tensor, read: HeadProjections) -> Tensor:
    """With the factor that the layer's rotation multiplies by."""
    assert read.rotary is not None
    vectors = vectors.clone()
    start = read.rotary.start
    vectors[..., start : start + 2 * read.rotary.inv_freq.numel()] *= read.rotary.scale
    return vectors


def _segments(read: HeadProjections) -> list[slice]:
    """Parts of a head whose lengths norms decide apart."""
    start = read.d_head - read.shared
    return (
        [slice(0, start), slice(start, read.d_head)] if 0 < start < read.d_head else [slice(0, read.d_head)]
    )


def _expanded(vectors: Tensor, heads: int) -> Tensor:
    """Key heads once for each of their query heads."""
    own = vectors.shape[1]
    return vectors if own == heads or heads % own else vectors.repeat_interleave(heads // own, 1)


def _for_heads(values: Tensor, heads: int) -> Tensor:
    own = values.shape[0]
    return values if own in (1, heads) else values.repeat_interleave(heads // own, 0)


def _chosen(count: int, device: torch.device) -> Tensor:
    """Some tokens, evenly over all of them."""
    return torch.linspace(0, count - 1, min(count, _SAMPLES), device=device).round().long()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def _relative(error: Tensor, size: Tensor) -> float:
    """Largest error of a head over its size; heads that are all but zero on the scale of the others."""
    floor = _SHORT * float(size.square().mean().sqrt())
    if floor == 0:
        return 0.0 if float(error.max()) == 0 else math.inf
    worst = float((error / size.clamp_min(floor)).max())
    return math.inf if math.isnan(worst) else worst
