"""When vectors ``(tokens, heads, d_head)`` of queries or keys are the same: up to factors, lengths, order."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_qk.functional.precision import at_least_float32
from lightning_qk.heads.projections import HeadProjections

# Largest relative error of a head's vectors that rounding explains, by the coarsest type that takes part. Products
# in float32 may be carried out in TF32, which has ten bits.
_TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 5e-2}
# Tokens that are compared.
_SAMPLES = 48
# A head whose vectors are shorter than this share of the others' is compared on the scale of the others.
_SHORT = 1e-2

Likeness = tuple[float, float | None]
"""The largest relative error of a head, and the factor of one set of vectors on the other where it is known."""


def tolerance(*dtypes: torch.dtype) -> float:
    """The largest relative error that rounding explains.

    Args:
        dtypes: of what takes part: vectors, weights, autocast.
    """
    return max((_TOLERANCE[dtype] for dtype in dtypes if dtype in _TOLERANCE), default=5e-2)


class Measure(ABC):
    """When two sets of vectors are equal."""

    @abstractmethod
    def features(self, vectors: Tensor, *, is_received: bool) -> Tensor:
        """What is compared, ``(tokens, heads, numbers)``."""

    @abstractmethod
    def error(self, want: Tensor, got: Tensor) -> Likeness:
        """How alike features are."""


class Equal(Measure):
    """Equal up to one positive number."""

    def features(self, vectors: Tensor, *, is_received: bool) -> Tensor:
        """The vectors."""
        return vectors

    def error(self, want: Tensor, got: Tensor) -> Likeness:
        """Largest relative error of a head, and the factor."""
        square = want.square().sum()
        factor = float((want * got).sum() / square) if square > 0 else 1.0
        if factor <= 0:
            return math.inf, None
        return relative((got - factor * want).norm(dim=(0, 2)), got.norm(dim=(0, 2))), factor


class Along(Measure):
    """Equal up to one positive number a token, head and segment, behind what a norm adds."""

    def __init__(self, read: HeadProjections, offset: Tensor | None) -> None:
        self._parts = segments(read)
        self._offset = offset

    def features(self, vectors: Tensor, *, is_received: bool) -> Tensor:
        """Directions of the segments."""
        if is_received and self._offset is not None:
            vectors = vectors - repeated(at_least_float32(self._offset), vectors.shape[1])
        return torch.cat([_unit(vectors[..., part]) for part in self._parts], dim=-1)

    def error(self, want: Tensor, got: Tensor) -> Likeness:
        """Largest relative error of a head's directions; no factor."""
        return relative((got - want).norm(dim=(0, 2)), got.norm(dim=(0, 2))), None


def segments(read: HeadProjections) -> list[slice]:
    """Parts of a head whose lengths norms decide apart."""
    start = read.d_head - read.shared
    if not 0 < start < read.d_head:
        return [slice(0, read.d_head)]
    return [slice(0, start), slice(start, read.d_head)]


def likely_factors(want: Tensor, got: Tensor) -> list[float]:
    """Numbers that queries or keys are often multiplied by, and the ratio of the sets' sizes."""
    d_head = got.shape[-1]
    mean = float(got.square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30))
    return [1.0, mean, d_head**-0.5, d_head**-0.25]


def nearest(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Some members of the smaller set, each with the nearest one of the larger."""
    one, other = nearest_of_heads(want.flatten(1)[:, None], got.flatten(1)[:, None])
    return one.reshape(-1, *want.shape[1:]), other.reshape(-1, *got.shape[1:])


def nearest_of_heads(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`nearest`, for each head by itself."""
    from_received = len(got) <= len(want)
    smaller, larger = (got, want) if from_received else (want, got)
    some, larger = smaller[chosen(len(smaller), smaller.device)], larger.transpose(0, 1)
    place = torch.cdist(some.transpose(0, 1), larger).argmin(2)
    found = larger.gather(1, place[..., None].expand(-1, -1, larger.shape[2])).transpose(0, 1)
    return (found, some) if from_received else (some, found)


def products(query: Tensor, key: Tensor) -> Tensor:
    """``q·q``, ``k·k`` and ``q·k`` of every token and head."""
    pairs = ((query, query), (key, key), (query, key))
    return torch.stack([(one * other).sum(-1) for one, other in pairs], dim=-1)


def fitted(want: Tensor, got: Tensor) -> Tensor:
    """The factors on ``q·q``, ``k·k`` and ``q·k`` that fit best."""
    by = (got[..., :2].sum((0, 1)) / want[..., :2].sum((0, 1)).clamp_min(1e-30)).clamp_min(0)
    return torch.stack([by[0], by[1], (by[0] * by[1]).sqrt()])


def cosines(query: Tensor, key: Tensor) -> Tensor:
    """Cosines of every token and head: of its query and key, and of each with that of the next head."""
    query, key = _unit(query), _unit(key)
    pairs = ((query, key), (query, query.roll(1, 1)), (key, key.roll(1, 1)))
    return torch.stack([(one * other).sum(-1) for one, other in pairs], dim=-1)


def lengthened(vectors: Tensor, shift: Tensor, received: Tensor) -> Tensor:
    """``a v + shift`` with the positive a that gives the received length."""
    square = vectors.square().sum(-1).clamp_min(1e-30)
    half = (vectors * shift).sum(-1)
    rest = shift.square().sum(-1) - received.square().sum(-1)
    root = (half.square() - square * rest).clamp_min(0).sqrt()
    return vectors * ((root - half) / square).clamp_min(0)[..., None] + shift


def rotated(vectors: Tensor, read: HeadProjections, positions: Tensor) -> Tensor:
    """Vectors rotated to their positions ``(tokens,)``."""
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


def repeated(values: Tensor, heads: int, dim: int = 0) -> Tensor:
    """Values of key heads once for each of their query heads."""
    own = values.shape[dim]
    return values if own == heads or heads % own else values.repeat_interleave(heads // own, dim)


def chosen(count: int, device: torch.device) -> Tensor:
    """Some tokens, evenly over all of them."""
    return torch.linspace(0, count - 1, min(count, _SAMPLES), device=device).round().long()


def relative(error: Tensor, size: Tensor) -> float:
    """Largest error of a head over its size; heads that are all but zero on the scale of the others."""
    floor = _SHORT * float(size.square().mean().sqrt())
    if floor == 0:
        return 0.0 if float(error.max()) == 0 else math.inf
    worst = float((error / size.clamp_min(floor)).max())
    return math.inf if math.isnan(worst) else worst


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
