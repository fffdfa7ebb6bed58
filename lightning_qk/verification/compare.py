"""Compare what was read of a layer's weights with the queries and keys that its attention received.

Nothing here knows layouts or names. Tensors that entered the layer are projected with the weights that were
read, and the result is looked for among the received vectors:

- equal up to one positive number, where nothing lies in between;
- equal up to one positive number a token, head and segment, behind a norm of queries and keys;
- rotated by position as it was read; or, where positions are not 0, 1, …, or the rotation is of another kind,
  under a rotation that is the same for queries and keys of one position, so that ``q·q``, ``k·k`` and ``q·k`` of
  each token are those of the projections: those three make the spectrum at distance 0. Behind norms, which decide
  the lengths, these are cosines, and those of neighbouring heads, which tell queries from keys.

Tokens are compared in their order, and where that fails as a set: windows, packing and moved axes reorder them.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.position import NONE
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.verification.vectors import (
    Along,
    Equal,
    Likeness,
    Measure,
    chosen,
    cosines,
    fitted,
    lengthened,
    likely_factors,
    nearest,
    nearest_of_heads,
    products,
    relative,
    repeated,
    rotated,
    segments,
    tolerance,
)

# Numbers in the largest set that is searched.
_SEARCHED = 2**24
# Numbers in a vector that are enough to identify it.
_FEATURES = 4


class Match(NamedTuple):
    """How received vectors are explained.

    Attributes:
        query: largest relative error of a query head.
        key: largest relative error of a key head.
        factor: received over read, of queries times keys; None where a norm leaves it open.
        sources: which of the inputs queries and keys are projections of; -1 for keys of another layer.
    """

    query: float
    key: float
    factor: float | None
    sources: tuple[int, int]

    @property
    def error(self) -> float:
        """The larger error."""
        return max(self.query, self.key)


class Added(NamedTuple):
    """What the norm of one side does besides what is folded into the weights.

    Attributes:
        offset: what it adds, ``(heads, d_head)``, or None.
        gain: its gain, where it stands behind the rotation, ``(heads, d_head)``; None elsewhere.
    """

    offset: Tensor | None = None
    gain: Tensor | None = None


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


class _Side(NamedTuple):
    """Queries or keys of a layer: as they were read, and as they were received.

    Attributes:
        weight: ``(heads, d_head, d_in)``.
        bias: ``(heads, d_head)``, or None.
        added: what a norm behind the projection does besides.
        tokens: what they may be computed from; nothing for the keys of another layer.
        received: ``(tokens, heads, d_head)``, in every way that their axes allow.
    """

    weight: Tensor
    bias: Tensor | None
    added: Added
    tokens: list[_Tokens]
    received: list[Tensor]

    def project(self, tokens: Tensor) -> Tensor:
        """``(tokens, d_in)`` to ``(tokens, heads, d_head)``, without a gain that comes behind the rotation."""
        out = torch.einsum("td,hed->the", at_least_float32(tokens), at_least_float32(self.weight))
        return self.before_gain(out if self.bias is None else out + at_least_float32(self.bias))

    def before_gain(self, vectors: Tensor) -> Tensor:
        """Vectors ``(tokens, heads, d_head)`` without that gain."""
        gain = self.added.gain
        return vectors if gain is None else vectors / repeated(gain, vectors.shape[1])


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
        tokens = [
            [form for place, x in enumerate(inputs) for form in _as_tokens(place, x, width)]
            for width in read.width
        ]
        if read.key_layer is not None:
            tokens[1] = []  # computed from the input of another layer
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
        sides = (
            _Side(read.query, read.query_bias, added[0], tokens[0], received[0]),
            _Side(read.key, read.key_bias, added[1], tokens[1], received[1]),
        )
        good = tolerance(query.dtype)
        # What costs little and explains nearly all layers comes first: searches through sets of tokens take long.
        best = _direct(read, sides, ways=("",))
        if best.error <= good:
            return best
        found = None if read.position == NONE else _rotated(read, sides)
        if found is not None and found.error <= good:
            return found
        best = _direct(read, sides)
        if best.error <= good:
            return best
        return found if found is not None and found.error < best.error else best


def beyond(read: HeadProjections, inputs: Sequence[Tensor], match: Match) -> tuple[float, float]:
    """Which share of the numbers in queries and keys, as read, a clamp to ``read.clip`` changes.

    Args:
        read: the layer's projections, with a bound.
        inputs: as for :func:`compare`.
        match: what it returned.
    """
    bound = math.inf if read.clip is None else read.clip

    def share(weight: Tensor, bias: Tensor | None, place: int) -> float:
        if place < 0:
            return 0.0
        tokens = next(_as_tokens(place, inputs[place], weight.shape[-1])).values
        made = _Side(weight, bias, Added(), [], []).project(tokens)
        return float((made.abs() > bound).double().mean())

    with torch.no_grad(), full_precision(inputs[0].device):
        return (
            share(read.query, read.query_bias, match.sources[0]),
            share(read.key, read.key_bias, match.sources[1]),
        )


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


_WAYS = ("", "tokens", "heads")


def _direct(read: HeadProjections, sides: tuple[_Side, _Side], ways: Sequence[str] = _WAYS) -> Match:
    """Each side on its own, where nothing turns its vectors; ``ways`` as ``searched`` of :func:`_pair`."""
    (first, by, place), (second, other, origin) = (
        min(_explained(read, side, ways), key=lambda one: one[0]) if side.tokens else (0.0, None, -1)
        for side in sides
    )
    factor = None if by is None or other is None else by * other
    return Match(first, second, factor, (place, origin))


def _explained(
    read: HeadProjections, side: _Side, ways: Sequence[str]
) -> Iterator[tuple[float, float | None, int]]:
    """Error, factor and input of every way to explain one side; stops at the first good one."""
    good = tolerance(side.received[0].dtype)
    measure = Along(read, side.added.offset) if read.qk_norm else Equal()
    for searched, form, got in itertools.product(ways, side.tokens, side.received):
        found = _pair(side, form.values, got, measure, searched=searched)
        if found is None:
            continue
        yield (*found, form.place)
        if found[0] <= good:
            return
    yield math.inf, None, side.tokens[0].place


def _pair(
    side: _Side, tokens: Tensor, received: Tensor, measure: Measure, *, searched: str
) -> Likeness | None:
    """Compare projected tokens with received ones; None where that cannot be done.

    ``searched`` is empty for tokens in their order, ``"tokens"`` for sets of tokens, ``"heads"`` for a set of
    tokens for each head, as where every head picks its own.
    """
    heads = received.shape[1]
    if not searched:
        if len(tokens) != len(received):
            return None
        some = chosen(len(tokens), tokens.device)
        tokens, received = tokens[some], received[some]
    elif max(len(tokens), len(received)) * received[0].numel() > _SEARCHED:
        return None
    want = measure.features(repeated(side.project(tokens), heads, 1), is_received=False)
    got = measure.features(at_least_float32(received), is_received=True)
    if not searched:
        return measure.error(want, got)
    if searched == "heads" and got.shape[-1] < _FEATURES:
        return None
    find = nearest if searched == "tokens" else nearest_of_heads
    errors = (measure.error(*find(want * factor, got)) for factor in likely_factors(want, got))
    return min(errors, key=lambda one: one[0])


def _rotated(read: HeadProjections, sides: tuple[_Side, _Side]) -> Match | None:
    """Queries and keys of the same tokens under a rotation; each alone where they are not the same tokens."""
    best = _together(read, sides)
    if best is not None and best.error <= tolerance(sides[0].received[0].dtype):
        return best
    # Keys of other tokens besides, or of another layer: each side is paired with itself. What a rotation leaves of
    # one side says less, and is asked only where there are no pairs.
    query, key = (
        _together(read, (side, side), as_read=best is not None) if side.tokens else None for side in sides
    )
    if query is None or (key is None and sides[1].tokens):
        return best
    found = Match(query.query, 0.0, None, (query.sources[0], -1))
    if key is not None:
        found = Match(query.query, key.query, None, (query.sources[0], key.sources[0]))
    return found if best is None or found.error < best.error else best


def _together(read: HeadProjections, sides: tuple[_Side, _Side], *, as_read: bool = False) -> Match | None:
    """The best pair of arrangements that have as many queries as keys; None where there is none.

    With ``as_read`` only under the rotation that was read.
    """
    best: Match | None = None
    first, second = sides
    if as_read and read.rotary is None:
        return None
    for searched, form, source, query, key in itertools.product(
        (False, True), first.tokens, second.tokens, first.received, second.received
    ):
        if len(form.values) != len(source.values) or len(query) != len(key):
            continue
        found = _turned(read, sides, (form, source), (query, key), searched=searched, as_read=as_read)
        if found is not None and (best is None or found[0] < best.error):
            best = Match(found[0], *found, (form.place, source.place))
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
) -> Likeness | None:
    """One arrangement of queries and keys, in their order or ``searched`` as sets; None where it cannot be."""
    heads = max(vectors.shape[1] for vectors in received)
    count, device = len(tokens[0].values), received[0].device
    if searched:
        if max(count, len(received[0])) * received[0][0].numel() > _SEARCHED:
            return None
        some, taken = (torch.arange(size, device=device) for size in (count, len(received[0])))
    else:
        if count != len(received[0]):
            return None
        some = taken = chosen(count, device)
    want = [
        repeated(side.project(own.values[some]), heads, 1) for side, own in zip(sides, tokens, strict=True)
    ]
    got = [
        side.before_gain(repeated(at_least_float32(own[taken]), heads, 1))
        for side, own in zip(sides, received, strict=True)
    ]
    if read.rotary is not None:
        places = [own.positions[some] for own in tokens]
        known = _as_read(read, sides, want, got, places, searched=searched)
        if as_read or known[0] <= tolerance(received[0].dtype):
            return known
        if read.rotary.scale != 1.0:
            part = slice(read.rotary.start, read.rotary.start + 2 * read.rotary.inv_freq.numel())
            want = [vectors.clone() for vectors in want]
            for vectors in want:
                vectors[..., part] *= read.rotary.scale
    worst, factor = 0.0, None
    for part in segments(read):
        q, k, r, s = (vectors[..., part] for vectors in (*want, *got))
        if read.qk_norm:
            if not searched:
                q, k = (
                    _shifted(side, own, has, part)
                    for side, own, has in zip(sides, (q, k), (r, s), strict=True)
                )
            left, right = cosines(q, k), cosines(r, s)
            scales = [torch.ones(3, device=left.device, dtype=left.dtype)]
        else:
            left, right = products(q, k), products(r, s)
            scales = _scales(read, left, right) if searched else [fitted(left, right)]
        found = []
        for scale in scales:
            one, other = nearest(left * scale, right) if searched else (left * scale, right)
            # Products of a query and a key may be small: they are compared on the scale of the lengths.
            size = math.sqrt(len(other)) * torch.ones_like(other[0, :, 0])
            if not read.qk_norm:
                size = other[..., :2].norm(dim=(0, 2))
            found.append((relative((one - other).norm(dim=(0, 2)), size), float(scale[2])))
        error, by = min(found)
        worst, factor = max(worst, error), None if read.qk_norm else by
    return worst, factor


def _shifted(side: _Side, vectors: Tensor, received: Tensor, part: slice) -> Tensor:
    """Vectors behind what a norm adds to them, in the received lengths."""
    if side.added.offset is None:
        return vectors
    shift = repeated(at_least_float32(side.added.offset), vectors.shape[1])[..., part]
    return lengthened(vectors, shift, received)


def _as_read(
    read: HeadProjections,
    sides: tuple[_Side, _Side],
    want: list[Tensor],
    got: list[Tensor],
    positions: list[Tensor],
    *,
    searched: bool,
) -> Likeness:
    """Queries and keys that are rotated as was read, at positions that count from 0."""
    errors, factor = [], 1.0
    for side, vectors, own, places in zip(sides, want, got, positions, strict=True):
        if read.qk_norm and side.added.offset is not None:
            return math.inf, None  # the offset is rotated too
        measure = Along(read, None) if read.qk_norm else Equal()
        turned = measure.features(rotated(vectors, read, places), is_received=False)
        seen = measure.features(own, is_received=True)
        error, by = measure.error(*nearest(turned, seen)) if searched else measure.error(turned, seen)
        errors.append(error)
        factor = factor * by if by is not None else math.nan
    return max(errors), None if math.isnan(factor) else factor


def _scales(read: HeadProjections, want: Tensor, got: Tensor) -> list[Tensor]:
    """Factors that queries or keys are often multiplied by, for sets whose members do not follow each other."""
    half = read.scaling**0.5
    pairs = ((1.0, 1.0), (read.scaling, 1.0), (half, half))
    known = [torch.tensor([q * q, k * k, q * k]).to(got) for q, k in pairs]
    return [*known, fitted(want / len(want), got / len(got))]
