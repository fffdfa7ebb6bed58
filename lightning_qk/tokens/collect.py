"""Stream the moments of a model's queries and keys from its attention calls."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.capture import AttentionCapture, CapturedCall, UnsupportedCallError
from lightning_qk.functional import AttentionLogits, Rotary
from lightning_qk.functional.logits import MASKED_BELOW
from lightning_qk.functional.token_moments import TokenMoments, rotate_tokens
from lightning_qk.heads import HeadProjections, ProjectionReader, find_attention

__all__ = ["TokenMoments", "TokenMomentsWarning", "token_moments"]

# Relative error of directions that rounding explains, float32 and bfloat16 alike.
_TOLERANCE = 5e-2
_SAMPLES = 32
# Largest deviation of what is added to logits from a function of the relative position.
_BIAS_TOLERANCE = 1e-2


class TokenMomentsWarning(UserWarning):
    """A layer is left out; the message names it and says why."""


def token_moments(model: nn.Module, batches: Iterable[Any]) -> dict[str, TokenMoments]:
    """Moments of the queries and keys of every layer's tokens before rotation, the first token apart.

    The model runs in evaluation mode without gradients and is left as it was. Queries and keys are those that
    attention multiplies, after norms; a known rotation is undone position by position, and compared with the
    projections of what entered the layer. Padding is left out. ``position_ids`` of a batch are heeded.

    Args:
        model: any module that contains attention.
        batches: what the model is called with: mappings by name, lists and tuples by position, else the only
            argument; a tensor is passed as ``input_ids`` where the model takes those.

    Returns:
        Qualified layer name → moments, in the model's order. Layers whose queries and keys before rotation
        cannot be had are named in a :class:`~lightning_qk.tokens.TokenMomentsWarning`.

    Raises:
        ValueError: no batch, or no layer that can be read.
    """
    reader = ProjectionReader(model)
    modules = {name: module for name, module in find_attention(model).items() if name in reader}
    collector = _Collector({name: reader[name] for name in modules}, modules)
    capture = AttentionCapture(
        {module: name for name, module in modules.items()},
        collector.hear,
        model=model,
        eager=True,
        operands=True,
    )
    ran = False
    with _quiet(model), collector.inputs():
        capture.install()
        try:
            capture.enabled = True
            for batch in batches:
                ran = True
                collector.position = batch.get("position_ids") if isinstance(batch, Mapping) else None
                _call(model, batch)
        finally:
            capture.remove()
    if not ran:
        raise ValueError("expected at least one batch to take moments of, got none: pass some of the data")
    left_out = dict(reader.unread) | capture.problems
    for name in modules:
        if name not in collector.found:
            left_out.setdefault(name, "no attention call of it was seen")
    for name, reason in left_out.items():
        warnings.warn(f"{name} left out of token moments: {reason}", TokenMomentsWarning, stacklevel=2)
    out = {
        name: collector.found[name] for name in modules if name in collector.found and name not in left_out
    }
    if not out:
        raise ValueError(
            f"expected a layer of {type(model).__name__} whose queries and keys can be had, got none of "
            f"{len(left_out)} ({next(iter(left_out.items()))}): see the layers' reasons"
        )
    return out


def _call(model: nn.Module, batch: Any) -> None:
    device = next((parameter.device for parameter in model.parameters()), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: moved(value) for name, value in batch.items()})
    elif isinstance(batch, list | tuple):
        model(*map(moved, batch))
    else:
        model(moved(batch))


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"}
    stance = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)), stance:
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


class _Collector:
    """Moments of each layer over calls."""

    def __init__(self, heads: dict[str, HeadProjections], modules: dict[str, nn.Module]) -> None:
        self._heads = heads
        self._modules = modules
        self._entered: dict[str, list[Tensor]] = {}
        self.found: dict[str, TokenMoments] = {}
        self.position: Tensor | None = None

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """Keep what enters the layers that rotate, until their call."""
        handles = [
            module.register_forward_pre_hook(self._keep(name), with_kwargs=True)
            for name, module in self._modules.items()
            if self._heads[name].rotary is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        width = self._heads[name].width[0]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entered[name] = [
                value.detach()
                for value in (*args, *kwargs.values())
                if isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] == width
            ]

        return hook

    @torch.no_grad()
    def hear(self, name: str, call: CapturedCall) -> None:
        """Add one call; what it raises leaves the layer out."""
        head = self._heads[name]
        query, key = _operands(call, head)
        logits = call.logits(self_attention=head.self_attention, heads=head.heads)
        if head.rotary is not None:
            query, key = self._unrotated(name, head, query, key)
        elif head.position not in ("none", "alibi", "relative bias", "relative product"):
            raise UnsupportedCallError(
                "its rotation by position is not known" if head.position else "what positions do is not known"
            )
        counted = logits.counted()
        rows, keys = counted.rows, counted.keys
        if head.self_attention and keys is not None and keys.shape == rows.shape:
            rows = rows & keys
        moments = TokenMoments.of(
            query,
            key,
            query_mask=rows,
            key_mask=keys,
            self_attention=head.self_attention,
            known=self.found.get(name),
        )
        bias, unexplained = _added(logits, call, head)
        if unexplained is not None and call.scaling is None:
            raise UnsupportedCallError(f"the factor on its products cannot be told, and {unexplained}")
        moments = dataclasses.replace(
            moments,
            softcap=getattr(logits, "softcap", None),
            sliding_window=_window(logits),
            sinks=None if logits.sinks is None else logits.sinks.detach().clone(),
            offset_bias=bias,
            unexplained=unexplained,
        )
        before = self.found.get(name)
        self.found[name] = moments if before is None else before + moments

    def _unrotated(
        self, name: str, head: HeadProjections, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys before rotation, compared with projections of what entered the layer."""
        rotary = head.rotary
        assert rotary is not None  # the caller looks
        position = self.position
        if position is None or position.dim() != 2 or position.shape[1] != query.shape[2]:
            position = torch.arange(query.shape[2])[None]
        position = position.to(query.device)
        entered = self._entered.pop(name, [])
        for reorder in (False, True) if rotary.interleaved else (False,):
            found = []
            for vectors in (query, key):
                own = _reordered(vectors, rotary) if reorder else vectors
                found.append(rotate_tokens(own, rotary, position, undo=True))
            sides = [(found[0], head.query, head.query_bias)]
            if head.key_layer is None and head.self_attention:
                sides.append((found[1], head.key, head.key_bias))
            if any(all(_agree(x, *side, rotary) for side in sides) for x in entered):
                return found[0], found[1]
        raise UnsupportedCallError(
            "its rotation could not be undone: what is left are not the projections of what entered the layer"
            if entered
            else "its rotation could not be checked: no hidden states were seen to enter the layer"
        )


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
        raise UnsupportedCallError("the factor between its queries, keys and logits cannot be told")
    return head.scaling if scaling is None else float(scaling)


def _reordered(vectors: Tensor, rotary: Rotary) -> Tensor:
    """Interleaved order of coordinates that a layer brought into half-split order."""
    pairs = rotary.inv_freq.numel()
    stop = rotary.start + 2 * pairs
    middle = vectors[..., rotary.start : stop].unflatten(-1, (2, pairs)).transpose(-1, -2).flatten(-2)
    return torch.cat([vectors[..., : rotary.start], middle, vectors[..., stop:]], -1)


def _agree(x: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor | None, rotary: Rotary) -> bool:
    """Whether rotated coordinates are along the projections of some tokens of the first sequence."""
    n = vectors.shape[2]
    if x.shape[0] != vectors.shape[0] or x.shape[1] != n:
        return False
    some = torch.linspace(0, n - 1, min(n, _SAMPLES), device=x.device).long()
    part = slice(rotary.start, rotary.start + 2 * rotary.inv_freq.numel())
    want = torch.einsum("td,hed->hte", x[0, some].float(), weight.detach().float())
    if bias is not None:
        want = want + bias.detach().float()[:, None]
    want, got = want[..., part], vectors[0][:, some][..., part].float()
    want = want * ((want * got).sum(-1) / want.square().sum(-1).clamp_min(1e-30))[..., None]
    return bool((got - want).norm() <= _TOLERANCE * got.norm())


def _window(logits: AttentionLogits) -> int | None:
    """The sliding window of a call, told by how far the last two rows of its first sequence reach."""
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
    logits: AttentionLogits, call: CapturedCall, head: HeadProjections
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
