"""Queries and keys before rotation, as they are at the attention calls of a running model."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.capture import CapturedCall, UnsupportedCallError
from lightning_qk.capture.hooks.modules import Handle, hook_before
from lightning_qk.functional import AttentionLogits, Rotary
from lightning_qk.functional.chunks import sample_rows, take_rows
from lightning_qk.functional.logits import MASKED_BELOW
from lightning_qk.functional.precision import at_least_float32
from lightning_qk.functional.token_moments import rotate_tokens
from lightning_qk.heads import HeadProjections

# Relative error of directions that rounding explains, float32 and bfloat16 alike.
_TOLERANCE = 5e-2
_SAMPLES = 32
# Largest deviation of what is added to logits from a function of the relative position.
_BIAS_TOLERANCE = 1e-2


class Tokens(NamedTuple):
    """Tokens of one call.

    Attributes:
        query: before rotation, after norms, scaled for the layer's factor, ``(batch, heads, n, d_head)``.
        key: ``(batch, kv_heads, m, d_head)``.
        query_weight: how many tokens of its sequence each stands for, ``(batch, n)``; 0 for padding.
        key_weight: likewise, ``(batch, m)``.
        query_place: positions counted from the first token that counts, ``(batch, n)``.
        key_place: likewise, ``(batch, m)``.
        logits: of the call.
    """

    query: Tensor
    key: Tensor
    query_weight: Tensor
    key_weight: Tensor
    query_place: Tensor
    key_place: Tensor
    logits: AttentionLogits


class TokenCalls:
    """Reads the queries and keys of calls before rotation, and checks that a rotation was undone.

    Args:
        heads: layer name → its projections; of the weights only shapes are used.
        weights: gives a layer's projections as they are now; asked only for layers that rotate.

    Attributes:
        position: of the tokens, ``(batch|1, n)``, where the caller knows them; None: what the layer was given, or
            0, 1, ….
    """

    def __init__(
        self, heads: Mapping[str, HeadProjections], weights: Callable[[str], HeadProjections]
    ) -> None:
        self._heads = heads
        self._weights = weights
        # What entered a layer: shapes, and a few tokens of the first sequence.
        self._entered: dict[str, list[tuple[torch.Size, Tensor]]] = {}
        self._given: dict[str, Tensor] = {}
        self.position: Tensor | None = None

    def enter(self, name: str, *values: Tensor) -> None:
        """Keep a few tokens of what enters a layer, until its call."""
        width = self._heads[name].width[0]
        self._entered[name] = [
            (value.shape, value[0, _some(value.shape[1], value.device)].detach())
            for value in values
            if value.dim() == 3 and value.shape[-1] == width and len(value)
        ]

    def hook_positions(self, name: str, module: nn.Module) -> Handle:
        """Keep the positions that a layer is given, outside of compiled graphs."""

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            given = kwargs.get("position_ids")
            if isinstance(given, Tensor) and given.dim() == 2:
                self._given[name] = given
            else:
                self._given.pop(name, None)

        return hook_before(module, keep)

    def clear(self) -> None:
        """Free what was kept."""
        self._entered.clear()
        self._given.clear()

    @torch.no_grad()
    def read(
        self,
        name: str,
        call: CapturedCall,
        *,
        tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tokens:
        """The tokens of a call.

        Args:
            name: the layer.
            call: one of its calls.
            tokens: how many to draw of each sequence besides its first one, at random; None for all.
            generator: where they are drawn from.

        Raises:
            UnsupportedCallError: queries and keys before rotation cannot be had.
        """
        head = self._heads[name]
        query, key = _operands(call, head)
        logits = call.logits(self_attention=head.self_attention, heads=head.heads)
        counted = logits.counted()
        rows, keys = counted.rows, counted.keys
        if keys is None:
            keys = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        if head.self_attention:
            rows = keys = rows & keys if keys.shape == rows.shape else rows
        query, picked = _picked(query, rows, tokens, generator, first_apart=head.self_attention)
        other = picked if head.self_attention else None
        key, chosen = _picked(key, keys, tokens, generator, first_apart=True, like=other)
        if head.rotary is not None:
            query, key = self._unrotated(name, head, call, query, key, picked.rows)
        elif head.position not in ("none", "alibi", "relative bias", "relative product"):
            raise UnsupportedCallError(
                "its rotation by position is not known"
                if head.position
                else "how positions act on its queries and keys is not known"
            )
        return Tokens(query, key, picked.weight, chosen.weight, picked.place, chosen.place, logits)

    def _unrotated(
        self,
        name: str,
        head: HeadProjections,
        call: CapturedCall,
        query: Tensor,
        key: Tensor,
        index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys before rotation, after a few of them were compared with projections of what entered."""
        rotary = head.rotary
        assert rotary is not None  # the caller looks
        if not head.self_attention:
            raise UnsupportedCallError("it rotates queries and keys of different sequences")
        entered = self._entered.pop(name, [])
        whole = _operands(call, head)
        batch, n = whole[0].shape[0], whole[0].shape[2]
        own = [x for shape, x in entered if tuple(shape[:2]) == (batch, n)]
        if not own:
            raise UnsupportedCallError(
                "its rotation could not be checked: no hidden states were seen to enter the layer"
            )
        some = _some(n, query.device)
        few = [at_least_float32(part[:1, :, some]) for part in whole]
        weights = self._weights(name)
        for position in self._positions(name, batch, n, query.device):
            for reorder in (False, True) if rotary.interleaved else (False,):

                def undone(vectors: Tensor, place: Tensor, reorder: bool = reorder) -> Tensor:
                    vectors = _reordered(vectors, rotary) if reorder else vectors
                    return rotate_tokens(vectors, rotary, place, undo=True)

                found = [undone(part, position[:1, some]) for part in few]
                sides = [(found[0], weights.query, weights.query_bias)]
                if head.key_layer is None:
                    sides.append((found[1], weights.key, weights.key_bias))
                if any(bool(torch.stack([_agree(x, *side, rotary) for side in sides]).all()) for x in own):
                    place = position if index is None else position.expand(batch, -1).gather(1, index)
                    return undone(at_least_float32(query), place), undone(at_least_float32(key), place)
        raise UnsupportedCallError(
            "its rotation could not be undone: what is left are not the projections of what entered the layer"
        )

    def _positions(self, name: str, batch: int, n: int, device: torch.device) -> Iterator[Tensor]:
        for given in (self.position, self._given.get(name)):
            if given is not None and given.dim() == 2 and given.shape[1] == n and len(given) in (1, batch):
                yield given.to(device)
        yield torch.arange(n, device=device)[None]


def call_facts(
    tokens: Tokens, call: CapturedCall, head: HeadProjections, *, longest: int | None = None
) -> dict[str, Any]:
    """What a call says of its logits besides queries and keys: fields of :class:`TokenMoments` by name.

    Args:
        tokens: from :meth:`TokenCalls.read`.
        call: the same call.
        head: the layer's projections.
        longest: at most so many tokens are looked at for what is added by position.

    Raises:
        UnsupportedCallError: the factor on the products is not known.
    """
    logits = tokens.logits
    bias, unexplained = _added(logits, call, head, longest)
    if unexplained is not None and call.scaling is None:
        raise UnsupportedCallError(f"the factor on its products is not known, and {unexplained}")
    return {
        "softcap": getattr(logits, "softcap", None),
        "sliding_window": _window(logits),
        "sinks": None if logits.sinks is None else logits.sinks.detach().clone(),
        "offset_bias": bias,
        "unexplained": unexplained,
    }


def sees_itself_last(logits: AttentionLogits) -> bool:
    """Whether none of the first rows of a call sees a key behind its own: attention is causal."""
    one = logits.sequences(slice(0, 1))
    n, m = one.shape[2:]
    if n != m or n < 2 or not one.self_attention:
        return False
    rows = min(n - 1, _SAMPLES)
    chunk = one.chunk(slice(0, rows), one.buffer(rows))
    if chunk.shown is None:
        return chunk.logits.shape[-1] == 1
    column = chunk.edge + torch.arange(chunk.shown.shape[-1], device=chunk.shown.device)
    behind = column > chunk.position[..., None]
    return chunk.edge <= 1 and not bool(((chunk.shown > 0) & behind[:, None]).any())


class _Picked(NamedTuple):
    weight: Tensor
    place: Tensor
    rows: Tensor | None


def _picked(
    vectors: Tensor,
    valid: Tensor,
    tokens: int | None,
    generator: torch.Generator | None,
    *,
    first_apart: bool,
    like: _Picked | None = None,
) -> tuple[Tensor, _Picked]:
    """Some tokens, how many of the valid ones each stands for, and their places; ``like`` takes the same ones."""
    if like is not None:
        return (vectors if like.rows is None else take_rows(vectors, like.rows)), like
    place = (valid.long().cumsum(1) - 1).clamp_min(0)
    if tokens is None or tokens + 1 >= valid.shape[1]:
        return vectors, _Picked(valid.double(), place, None)
    first = valid & (place == 0) & first_apart
    rest = valid & ~first
    index = sample_rows(rest, tokens, generator)
    drawn = rest.gather(1, index).double()
    weight = drawn * (rest.sum(1, keepdim=True) / drawn.sum(1, keepdim=True).clamp_min(1))
    if first_apart:
        index = torch.cat([valid.long().argmax(1, keepdim=True), index], 1)
        weight = torch.cat([valid.any(1, keepdim=True).double(), weight], 1)
    return take_rows(vectors, index), _Picked(weight, place.gather(1, index), index)


def _some(n: int, device: torch.device) -> Tensor:
    return torch.linspace(0, n - 1, min(n, _SAMPLES), device=device).long()


def _operands(call: CapturedCall, head: HeadProjections) -> tuple[Tensor, Tensor]:
    """Queries ``(batch, heads, n, d_head)``, scaled for the factor of ``head``, and keys of each group once."""
    operands, scaling = call.operands, _scaling(call, head)
    if operands is None:
        raise UnsupportedCallError("its queries and keys are not seen")
    query, key = (
        part.reshape(-1, count, *part.shape[1:]) if part.dim() == 3 and len(part) % count == 0 else part
        for part, count in zip(operands, (head.heads, head.kv_heads), strict=True)
    )
    if query.dim() != 4 or key.dim() != 4 or query.shape[1] != head.heads or query.shape[3] != head.d_head:
        raise UnsupportedCallError(
            f"its queries are {tuple(query.shape)}, no (batch, {head.heads}, n, {head.d_head})"
        )
    if key.shape[1] == head.heads != head.kv_heads:
        key = key[:, :: head.heads // head.kv_heads]
    if key.shape[1] != head.kv_heads or key.shape[3] != head.d_head:
        raise UnsupportedCallError(
            f"its keys are {tuple(key.shape)}, no (batch, {head.kv_heads}, m, {head.d_head})"
        )
    if head.self_attention and key.shape[2] != query.shape[2]:
        raise UnsupportedCallError("it has other keys than its queries' tokens, such as those of a cache")
    if scaling != head.scaling:
        query = query * (scaling / head.scaling)
    return query, key


def _scaling(call: CapturedCall, head: HeadProjections) -> float:
    """The factor on the products: the call's, or else the layer's, which is checked where a bias is added."""
    scaling = call.scaling
    if scaling is None and head.position in ("none", "rotary"):
        raise UnsupportedCallError("the factor between its queries, keys and logits is not known")
    return head.scaling if scaling is None else float(scaling)


def _reordered(vectors: Tensor, rotary: Rotary) -> Tensor:
    """Interleaved order of coordinates that a layer brought into half-split order."""
    pairs = rotary.inv_freq.numel()
    stop = rotary.start + 2 * pairs
    middle = vectors[..., rotary.start : stop].unflatten(-1, (2, pairs)).transpose(-1, -2).flatten(-2)
    return torch.cat([vectors[..., : rotary.start], middle, vectors[..., stop:]], -1)


def _agree(x: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor | None, rotary: Rotary) -> Tensor:
    """Boolean: are rotated coordinates ``(1, heads, n, d_head)`` along projections of tokens ``(n, width)``?"""
    part = slice(rotary.start, rotary.start + 2 * rotary.inv_freq.numel())
    want = torch.einsum("td,hed->hte", x.float(), weight.detach().float())
    if bias is not None:
        want = want + bias.detach().float()[:, None]
    want, got = want[..., part], vectors[0][..., part].float()
    want = want * ((want * got).sum(-1) / want.square().sum(-1).clamp_min(1e-30))[..., None]
    return (got - want).norm() <= _TOLERANCE * got.norm()


def _window(logits: AttentionLogits) -> int | None:
    """The sliding window of a call, from how far the last two rows of its first sequence reach."""
    window: int | None = getattr(logits, "sliding_window", None)
    n, m = logits.shape[2:]
    if window is not None or n < 3 or n != m or not logits.self_attention:
        return window
    one = logits.sequences(slice(0, 1))
    first = one.chunk(slice(n - 2, n), one.buffer(2)).first
    if first is None:
        return None
    reach = torch.arange(n - 2, n, device=first.device) - first[0, 0]
    return int(reach[1]) + 1 if int(reach[0]) == int(reach[1]) else None


def _added(
    logits: AttentionLogits, call: CapturedCall, head: HeadProjections, longest: int | None = None
) -> tuple[Tensor | None, str | None]:
    """What is added to ``scaling q·k``, by relative position, and why that is not all, of the first sequence."""
    if head.position in ("none", "rotary") and getattr(logits, "bias", None) is None:
        return None, None
    if not head.self_attention and getattr(logits, "bias", None) is None:
        return None, None
    if getattr(logits, "softcap", None) is not None:
        return None, "a bias stands beside a soft cap"
    query, key = _operands(call, head)  # scaled for the factor of head
    one = logits.sequences(slice(0, 1))
    if longest is not None and one.shape[2] > longest and one.shape[2] == one.shape[3]:
        one = one.tokens(slice(0, longest))
        query, key = query[:, :, :longest], key[:, :, :longest]
    _, heads, n, m = one.shape
    chunk = one.chunk(slice(0, n), torch.empty(heads * n * m, dtype=one.dtype, device=one.device))
    query, key = (part[:1].to(chunk.logits.dtype) for part in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)[:, :, : chunk.logits.shape[-1]]
    added = (chunk.logits - head.scaling * query @ key.mT)[0].double()
    seen = added > MASKED_BELOW
    if chunk.shown is not None:
        shown = chunk.shown.expand(1, *chunk.shown.shape[1:])[0] > 0
        seen[..., chunk.edge :] &= shown
    width = added.shape[-1]
    offset = torch.arange(width, device=added.device)[None] - torch.arange(n, device=added.device)[:, None]
    size = max(n, width)
    reason = "what is added to its logits is no function of the relative position alone"
    own = added.diagonal(dim1=-2, dim2=-1)
    for centre in (torch.zeros_like(added[..., :1]), own[..., None] if own.shape[-1] == n else None):
        if centre is None:
            continue
        values = torch.where(seen, added - centre, 0.0)
        index = (offset + size - 1).expand(heads, -1, -1).reshape(heads, -1)
        total = values.new_zeros(heads, 2 * size - 1).scatter_add_(1, index, values.reshape(heads, -1))
        count = torch.zeros_like(total).scatter_add_(1, index, seen.double().reshape(heads, -1))
        mean = total / count.clamp_min(1)
        left = torch.where(seen, values - mean.gather(1, index).view_as(values), 0.0)
        if bool(left.abs().amax() <= _BIAS_TOLERANCE * mean.abs().amax().clamp_min(1.0)):
            return mean, None
    return None, reason
