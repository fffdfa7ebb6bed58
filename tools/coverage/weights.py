"""Check what was read from the weights against the q and k that a forward's attention really received.

The check knows nothing of layouts or names. It projects every tensor that entered the layer (or came out of one
of its parts) with the weights that were read, and looks for the result where the trace says attention took its
operands:

- elsewhere only moved or scaled by one number: they must be equal;
- rotated in between: some tensor on the way must equal the projection (or the operand does at one position, where
  nothing is rotated), and at every position the rotation must be one orthogonal map, the same for all heads and
  sequences: all their inner products are those of the projections;
- normalized in between (``qk_norm``): the same up to one positive number a token, head and segment.

What attention received may also be a part of the projection (one sequence of a packed batch) or contain it
(further keys are none of the layer's own), or be a multiple of it by one positive number a token. Where a gain is
said to come behind the rotation, it is undone with the values that the trace saw.

Where each head or each sequence is rotated by a map of its own, lengths must be kept, and queries and keys must be
turned alike: those of one position must have the products that the projections have. The projection must lie
on the way as it is, or some heads arrive so and each of the others turned by one map a token.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.heads.position import NONE
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.verification.trace import MOVES, SCALINGS, Event, Node, Product
from tools.coverage.steps import ancestors, earlier

TOLERANCE = 1e-4
_MAX_PAIRS, _SOME = 5e7, 64


class Verdict(NamedTuple):
    """Whether a reading is what the model computes, and if not, what is wrong."""

    verified: bool
    reason: str = ""


class _Match(NamedTuple):
    """A projection found on the way to an operand.

    Attributes:
        predicted: ``(batch, n, heads, d_head)``.
        received: the operand, likewise, or None where it is a rearrangement that was not followed.
        factor: operand over projection where all that happened is a scaling; None otherwise.
        apart: each head or sequence is turned by a map of its own.
    """

    predicted: Tensor
    received: Tensor | None
    factor: float | None
    apart: bool = False


def verify_weights(read: HeadProjections, events: list[Event]) -> Verdict:
    """Compare one layer's projections with the attentions that ran inside of it.

    Returns:
        Verified if every product of some attention is explained; else the failure that came nearest.
    """
    worst = Verdict(False, "its attention was not seen")
    failed: list[tuple[Event, Verdict]] = []
    explained: set[tuple[int, int]] = set()
    for event in events:
        verdict = Verdict(False, "no product of its logits is that of the q and k that were read")
        for product in event.products:
            verdict = _verify_product(read, event, product)
            if verdict.verified:
                worst = verdict
                explained |= _sides(product)
                break
        if not verdict.verified:
            failed.append((event, verdict))
    for event, verdict in failed:
        # Two sides that attend to each other by one product have two softmaxes of it, and one q and k.
        back = {side[::-1] for product in event.products for side in _sides(product)}
        if back.isdisjoint(explained):
            return verdict
    return worst


def _sides(product: Product) -> set[tuple[int, int]]:
    """Tensors from which query and key were computed; empty where unknown."""
    if product.query_node is None or product.key_node is None:
        return set()
    return {(id(product.query_node), id(product.key_node))}


def _verify_product(read: HeadProjections, event: Event, product: Product) -> Verdict:
    inputs = _inputs(event)
    with torch.no_grad():
        query = _find(read.query, read.query_bias, inputs, product.query, product.query_node, read)
        if query is None:
            return Verdict(False, "its queries are not W x + b of anything that entered the layer")
        # Of keys of more tokens than those of the queries, only the latter's are the layer's own.
        own = product.query.shape[-2] if read.self_attention else None
        key = _find(read.key, read.key_bias, inputs, product.key, product.key_node, read, read.heads, own)
        if key is None:
            return Verdict(False, "its keys are not W x + b of anything that entered the layer")
        if (query.apart or key.apart) and not _turned_alike(query, key):
            return Verdict(False, "its queries and keys are not turned alike")
        return _scaling(read, product, query, key)


def _turned_alike(query: _Match, key: _Match) -> bool:
    """Whether the products of the queries and keys of one position are those of the projections."""
    if query.received is None or key.received is None or query.predicted.shape[:2] != key.predicted.shape[:2]:
        return False
    groups = query.predicted.shape[2] // key.predicted.shape[2]
    want = (query.predicted * key.predicted.repeat_interleave(groups, 2)).sum(-1)
    got = (query.received * key.received.repeat_interleave(groups, 2)).sum(-1)
    return _factor(want, got) is not None


def _scaling(read: HeadProjections, product: Product, query: _Match, key: _Match) -> Verdict:
    if product.scale is None or query.factor is None or key.factor is None:
        return Verdict(True)
    scaling = product.scale * query.factor * key.factor
    if abs(scaling - read.scaling) > 1e-3 * abs(scaling):
        return Verdict(False, f"its logits are scaled by {scaling:.4g}, which was read as {read.scaling:.4g}")
    return Verdict(True)


def _inputs(event: Event) -> list[Tensor]:
    """Tensors that went into the innermost modules around the attention, nearest first."""
    found: dict[tuple[float, ...], Tensor] = {}
    for frame in reversed(event.frames[-4:]):
        for tensor in frame.tensors:
            # Views and copies of one tensor project alike; the same numbers in another order do not.
            values = tensor.double().flatten()
            ramp = torch.arange(1, len(values) + 1, dtype=values.dtype)
            key = (*tensor.shape, float(values.sum()), float(values.abs().sum()), float(values @ ramp))
            found.setdefault(key, tensor)
    return list(found.values())


def _find(
    weight: Tensor,
    bias: Tensor | None,
    inputs: list[Tensor],
    operand: Tensor,
    node: Node | None,
    read: HeadProjections,
    heads: int | None = None,
    own: int | None = None,
) -> _Match | None:
    heads = heads or weight.shape[0]
    projected = [_project(weight, bias, given) for x in inputs for given in _as_tokens(x, weight.shape[-1])]
    for predicted in projected:
        match = _compare(predicted, operand, node, read, heads)
        if match is not None:
            return match
    for source in earlier(node, weight.shape[1], with_gain=_is_gain_last(read)):
        for predicted in projected:
            if operand.shape[-2] > predicted.shape[1] != own:
                continue
            want = predicted if source.gain is None else predicted / source.gain
            match = _compare(want, source.node.tensor, source.node, read, heads)
            if match is not None:
                both = None if match.factor is None or source.factor is None else match.factor * source.factor
                return match._replace(factor=both)
    return None


def _is_gain_last(read: HeadProjections) -> bool:
    """Whether a reading says that a norm's gain comes behind the rotation."""
    return read.qk_norm and read.rotary is None and (read.position or "").startswith("rotary")


def _as_tokens(x: Tensor, width: int) -> Iterator[Tensor]:
    """A tensor as (batch, tokens, width), in the ways that are usual."""
    if x.shape[-1] == width:
        if x.dim() == 2:
            yield x[None]
        elif x.dim() == 3:
            yield x
            yield x.transpose(0, 1)
        else:
            yield x.reshape(-1, x.shape[-2], width)
            yield x.reshape(x.shape[0], -1, width)
    if x.dim() == 4 and x.shape[1] == width:
        yield x.flatten(2).transpose(1, 2)
    if x.dim() == 3 and x.shape[1] == width:
        yield x.transpose(1, 2)


def _project(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out = torch.einsum("bnd,hed->bnhe", x.double(), weight.double())
    return out if bias is None else out + bias.double()


def _compare(
    predicted: Tensor, operand: Tensor, node: Node | None, read: HeadProjections, heads: int
) -> _Match | None:
    received = list(_arrangements(operand, predicted, heads))
    # A key head that several query heads share may be received once for each of them.
    for arranged, expected in received:
        factor = _factor(expected, arranged)
        if factor is not None:
            return _Match(expected, arranged, factor)
    if read.rotary is None and not read.qk_norm:
        for former in ancestors(node, MOVES, is_through=_is_multiple):
            if not _is_move(former):
                continue
            for arranged, expected in _arrangements(former.tensor, predicted, heads, flat=True):
                factor = _factor(expected, arranged)
                if factor is not None:
                    later = _later_factor(node, former)
                    return _Match(expected, None, None if later is None else factor * later)
    before = [found for found in ancestors(node) if found.tensor.is_floating_point()]
    anchors: dict[tuple[int, int], list[Tensor]] = {}
    for arranged, expected in received:
        expected = _stretched(expected, read)
        if all(
            _is_explained(expected, arranged, part, before, read.qk_norm, anchors)
            for part in _segments(read, expected.shape[-1])
        ):
            return _Match(expected, arranged, None if read.qk_norm else _isometry(expected, arranged))
    if read.rotary is None and not read.qk_norm and read.position != NONE:
        for arranged, expected in received:
            factor = _factor(expected.norm(dim=-1), arranged.norm(dim=-1))
            if factor is not None and (
                any(_factor(own, found) is not None for own, found in _candidates(expected, before))
                or _are_some_turned(expected, arranged, factor)
            ):
                return _Match(expected, arranged, factor, apart=True)
    return None


def _are_some_turned(expected: Tensor, received: Tensor, factor: float) -> bool:
    """Whether some heads were received as they are, and each other one turned by one map a token."""
    own = list(zip((expected * factor).unbind(2), received.unbind(2), strict=True))
    equal = [bool((got - want).norm() <= TOLERANCE * want.norm()) for want, got in own]
    return any(equal) and all(
        is_equal or _isometry(want.unsqueeze(2), got.unsqueeze(2)) is not None
        for is_equal, (want, got) in zip(equal, own, strict=True)
    )


def _stretched(expected: Tensor, read: HeadProjections) -> Tensor:
    """What is expected with the factor that the layer's rotation multiplies by, where that is part of it."""
    scale = 1.0 if read.rotary is None else read.rotary.scale
    if scale == 1.0:
        return expected
    assert read.rotary is not None
    expected = expected.clone()
    expected[..., read.rotary.start : read.rotary.start + 2 * read.rotary.inv_freq.numel()] *= scale
    return expected


def _is_explained(
    expected: Tensor,
    received: Tensor,
    part: slice,
    formers: list[Node],
    normalized: bool,
    known: dict[tuple[int, int], list[Tensor]],
) -> bool:
    """Whether a segment of the received is the expected but for a rotation and, where asked, norms."""
    whole, expected, received = expected, expected[..., part], received[..., part]
    if normalized and _is_normalized(expected, received):
        return True
    want, got = (_unit(expected), _unit(received)) if normalized else (expected, received)
    factor = _isometry(want, got)
    if factor is not None and _has_anchor(want * factor, got):
        return True
    if not normalized and factor is None:
        return False
    # What lies before the rotation is the same whichever way the operand is arranged.
    key = whole.shape[2], part.start
    if key not in known:
        is_same = _is_normalized if normalized else lambda own, before: _factor(own, before) is not None
        one = expected[:, :, :1]
        # All heads may share it.
        wanted = one if torch.allclose(one.expand_as(expected), expected) else expected
        known[key] = [
            before.expand_as(expected) for own, before in _candidates(wanted, formers) if is_same(own, before)
        ]
        if wanted is one:
            known[key] += [before for own, before in _candidates(expected, formers) if is_same(own, before)]
    return any(
        before.shape == received.shape and _isometry(before, received) is not None for before in known[key]
    )


def _candidates(expected: Tensor, formers: list[Node]) -> Iterator[tuple[Tensor, Tensor]]:
    for node in formers:
        for before, own in _arrangements(node.tensor, expected, expected.shape[2], flat=True):
            yield own, before


def _unit(values: Tensor) -> Tensor:
    return values / values.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def _is_multiple(node: Node) -> bool:
    """Whether a result is a positive multiple of one tensor: the same for all, or one for each token or head."""
    number = node.factor()
    if number is not None:
        return number > 0
    by = [value for value in node.args if isinstance(value, Tensor) and value.shape[-1:] in ((), (1,))]
    return node.name in SCALINGS and len(by) == 1 and bool((by[0] > 0).all())


def _is_move(node: Node) -> bool:
    return node.tensor.is_floating_point()


def _later_factor(node: Node | None, former: Node) -> float | None:
    """The number that scales what came of a node on its way to an operand."""
    scale, current = 1.0, node
    for _ in range(60):
        if current is None or current is former:
            return scale
        own = current.factor()
        if own is not None:
            scale *= own
        elif current.name not in MOVES:
            return None
        current = current.parents[0] if current.parents else None
    return None


def _arrangements(
    tensor: Tensor, like: Tensor, heads: int, *, flat: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """A tensor's vectors as (batch, n, heads, d_head), in the usual ways, each with what is expected there."""
    batch, n, own, width = like.shape
    count = tensor.numel() // max(width * batch, 1)
    if (
        flat is False
        and tensor.dim() >= 3
        and tensor.shape[-1] == width
        and tensor.shape[-2] < n
        and count in (own * tensor.shape[-2], heads * tensor.shape[-2])
    ):
        # Several sequences in a row, each with an attention of its own.
        like = _part(tensor, like, count // tensor.shape[-2])
        batch, n, own, width = like.shape
    expected = [like]
    if heads != own and heads % own == 0:
        expected.append(like.repeat_interleave(heads // own, 2))
    for wanted in expected:
        count = wanted.shape[2]
        if tensor.numel() != wanted.numel():
            continue
        if tensor.shape[-1] == width or (flat and tensor.shape[-1] == count * width):
            values = tensor.double()
            for shape, order in (
                ((batch, count, n, width), (0, 2, 1, 3)),
                ((batch, n, count, width), (0, 1, 2, 3)),
                ((count, batch, n, width), (1, 2, 0, 3)),
                ((n, batch, count, width), (1, 0, 2, 3)),
                ((count, n, batch, width), (2, 1, 0, 3)),
                ((n, count, batch, width), (2, 0, 1, 3)),
            ):
                yield values.reshape(shape).permute(order), wanted
        elif tensor.dim() >= 2 and tensor.shape[-2] == width:
            values = tensor.transpose(-1, -2).double()
            yield values.reshape(batch, count, n, width).permute(0, 2, 1, 3), wanted


def _part(tensor: Tensor, like: Tensor, count: int) -> Tensor:
    """The tokens of a projection that a tensor has, by the lengths of their vectors, which rotations leave."""
    tokens = tensor.shape[-2]
    got = tensor.double().reshape(like.shape[0], count, tokens, -1).square().sum((0, 3)).sqrt().mean(0)
    want = like.square().sum((0, 3)).sqrt().mean(1)
    windows = want.unfold(0, tokens, 1)
    cosine = (windows @ got) / (windows.norm(dim=-1) * got.norm()).clamp_min(1e-30)
    start = int(cosine.argmax())
    return like[:, start : start + tokens]


def _factor(expected: Tensor, received: Tensor) -> float | None:
    """The positive number that makes the expected the received, to the tolerance; None where there is none."""
    square = expected.square().sum()
    if square == 0 or not torch.isfinite(received).all():
        return None
    factor = float((expected * received).sum() / square)
    if factor <= 0:
        return None
    error = (received - factor * expected).norm() / received.norm()
    return factor if error <= TOLERANCE else None


def _segments(read: HeadProjections, width: int) -> list[slice]:
    """Parts of a head that are normalized apart."""
    start = width - read.shared if read.shared else 0
    return [slice(0, start), slice(start, width)] if 0 < start < width else [slice(0, width)]


def _isometry(expected: Tensor, received: Tensor) -> float | None:
    """The number by which the received are, at each position, an orthogonal map of the expected, or None."""
    want, got = expected, received
    if _factor(want.square().sum((0, 2, 3)), got.square().sum((0, 2, 3))) is None:
        return None  # lengths alone rule out most wrong arrangements
    batch, n, heads, _ = want.shape
    if n * (batch * heads) ** 2 > _MAX_PAIRS:
        want, got = want[:, :_SOME], got[:, :_SOME]
    want, got = (values.permute(1, 0, 2, 3).flatten(1, 2) for values in (want, got))
    square = _factor(want @ want.transpose(1, 2), got @ got.transpose(1, 2))
    return None if square is None else square**0.5


def _is_normalized(expected: Tensor, received: Tensor) -> bool:
    """Whether the received are the expected times a positive number of each token and head.

    Plus, as a LayerNorm adds it, one vector of each head: it is found by least squares. With u expected and y
    received, the part of y − offset across u must vanish for all tokens.
    """
    want, got = (values.permute(2, 0, 1, 3).flatten(1, 2) for values in (expected, received))
    # One head rules out most wrong arrangements, at a fraction of the work.
    return _is_norm_of(want[:1], got[:1]) and (len(want) == 1 or _is_norm_of(want, got))


def _is_norm_of(want: Tensor, got: Tensor) -> bool:
    along = _unit(want)
    if _is_along(along, got):
        return True
    tokens, width = want.shape[1:]
    if tokens <= 2:
        return False  # an offset would explain anything
    across = torch.eye(width, dtype=want.dtype) * tokens - along.transpose(1, 2) @ along
    rest = (got - along * (along * got).sum(-1, keepdim=True)).sum(1)
    offset = torch.linalg.lstsq(across, rest[..., None], driver="gelsd").solution.squeeze(-1)
    return bool(offset.isfinite().all()) and _is_along(along, got - offset[:, None])


def _is_along(along: Tensor, vectors: Tensor) -> bool:
    lengths = (along * vectors).sum(-1)
    error = (vectors - along * lengths[..., None]).norm() / vectors.norm()
    return bool(error <= TOLERANCE) and bool((lengths >= 0).all())


def _has_anchor(expected: Tensor, received: Tensor) -> bool:
    """Whether some position was not rotated."""
    error = (expected - received).square().sum((0, 2, 3)).sqrt()
    return bool((error <= TOLERANCE * expected.square().sum((0, 2, 3)).sqrt()).any())
