"""Entropy over a context that was encoded in parts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import evaluated
from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.metrics.collector import AttentionCollector
from lightning_qk.probes._attention import Attention, attention_of, entropy, is_causal, rows_at
from lightning_qk.probes._output import read_output
from lightning_qk.probes.run import last_tokens, one_sequence, over_tokens, parameters, results

# Implementations whose mask is a tensor of four axes.
_IMPLEMENTATIONS = ("eager", "sdpa")
# Relative difference of outputs that another order of operations explains, by precision.
_SAME = {torch.float64: 1e-6, torch.float32: 1e-3}
_SAME_IN_HALF = 5e-2


class ParallelContextEntropy(NamedTuple):
    """Entropies of the asking rows by layer, each ``(heads,)``, nats.

    Attributes:
        whole: over the context encoded in one piece.
        parts: over the same context encoded in parts.
        ratio: parts over whole.
    """

    whole: dict[str, Tensor]
    parts: dict[str, Tensor]
    ratio: dict[str, Tensor]


class _Plan(NamedTuple):
    """The part that each token belongs to, its place in it, and whether it asks; all ``(batch, n)``."""

    part: Tensor
    place: Tensor
    asks: Tensor
    valid: Tensor


def parallel_context_entropy(
    model: nn.Module, batch: Mapping[str, Any], *, parts: int = 4, rows: int = 1
) -> ParallelContextEntropy:
    r"""Entropy of query rows over a context encoded whole, against the same context encoded in parts.

    The last ``rows`` tokens of each sequence ask; the tokens before them are the context. Once it is encoded
    whole, and once it is cut into parts of equal length, up to one token, that do not see each other and each
    begin at the first position; the asking tokens then see all of it and come after the longest part. After
    arXiv 2412.16545 [S: the entropy of the query grows with the number of parts, and goes with the loss of
    quality, r ≈ 0.95].

    The context never sees the asking tokens, in a bidirectional model neither, so that the two differ in nothing
    but the cut.

    Costs 4 forward passes, two of them of one sequence: they check that the model takes a mask of four axes and
    positions, and gives the same output with its own ones spelled out. The model is run in evaluation mode without
    gradients and left as it was.

    Args:
        model: a transformers model of one sequence with ``attention_mask`` and ``position_ids`` among the
            arguments of its forward, in the implementation eager or sdpa.
        batch: its keyword arguments, with ``input_ids`` or ``inputs_embeds``; padding on either side.
        parts: how many.
        rows: how many tokens ask.

    Returns:
        Three dicts, layer → ``(heads,)``, means over the asking rows of all sequences.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: the model takes no mask of four axes and positions, or its output changes when they are
            given; a sequence has fewer context tokens than parts; or an argument is out of range.
    """
    if parts < 1 or rows < 1:
        raise ValueError(f"expected parts and rows of at least 1, got {parts} and {rows}")
    batch, valid = one_sequence(model, batch, "parallel-context entropy")
    _check_model(model)
    context = int(valid.sum(1).amin()) - rows
    if context < parts:
        raise ValueError(
            f"expected at least {parts} tokens of context, one a part, before the {rows} that ask, got a sequence "
            f"with {context}: pass longer sequences or fewer parts"
        )
    with evaluated(model):
        offset, causal = _checked_positions(model, batch, valid)
        collector = AttentionCollector(model, eager=True)
        entropies = []
        for count in (1, parts):
            plan = _plan(valid, count, rows)
            entropies.append(_entropies(collector, batch, plan, causal, offset, rows))
    whole, split = entropies
    ratio = {layer: split[layer] / whole[layer] for layer in split}
    return ParallelContextEntropy(*(results(collector, values) for values in (whole, split, ratio)))


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    missing = {"attention_mask", "position_ids"} - parameters(model)
    if missing:
        raise ValueError(
            f"expected a model whose forward takes attention_mask and position_ids, by which parts of a context "
            f"are kept apart, got {kind} without {' and '.join(sorted(missing))}: it has no such probe"
        )
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"expected {kind} in an attention implementation that takes a mask of four axes, eager or sdpa, got "
            f'{implementation!r}: load it with attn_implementation="sdpa"'
        )


def _plan(valid: Tensor, count: int, rows: int) -> _Plan:
    rank = valid.long().cumsum(1) - 1
    context = valid.sum(1, keepdim=True) - rows
    asks = valid & (rank >= context)
    part = (rank * count).div(context, rounding_mode="floor").clamp(0, count - 1)
    # The first token of part p is the first whose rank times the count reaches p times the context.
    start = -(-part * context).div(count, rounding_mode="floor")
    longest = -(-context).div(count, rounding_mode="floor")
    place = torch.where(asks, rank - context + longest, rank - start)
    return _Plan(part, torch.where(valid, place, 0), asks, valid)


def _visible(plan: _Plan, causal: bool) -> Tensor:
    """Which token sees which, ``(batch, 1, n, n)``: the mask that the model takes has this size."""
    n = plan.part.shape[1]
    same = plan.part[:, :, None] == plan.part[:, None, :]
    asks = plan.asks[:, :, None]
    # Context tokens see those of their part; asking tokens see all.
    visible = (same & ~plan.asks[:, None, :]) | asks
    if causal:
        visible &= torch.ones(n, n, dtype=torch.bool, device=visible.device).tril()
    visible &= plan.valid[:, None, :] & plan.valid[:, :, None]
    # Padding sees itself: a row that sees nothing is NaN in some implementations.
    return (visible | torch.eye(n, dtype=torch.bool, device=visible.device))[:, None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    # Eager attention adds its mask, and sdpa takes it likewise.
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return hidden.masked_fill(~visible, torch.finfo(dtype).min)


def _entropies(
    collector: AttentionCollector, batch: Mapping[str, Any], plan: _Plan, causal: bool, offset: int, rows: int
) -> dict[str, Tensor]:
    visible = _visible(plan, causal)
    asking = last_tokens(plan.valid, rows)
    found: dict[str, list[Tensor]] = {}

    def measure(layer: str, call: CapturedCall) -> None:
        attention = attention_of(call)
        over_tokens(attention, plan.valid.shape)
        if not _sees(attention, visible):
            raise UnsupportedCallError(
                "it did not see what its mask shows (a window of its own, say), so that parts of a context cannot "
                "be kept apart"
            )
        found.setdefault(layer, []).append(entropy(rows_at(attention, asking)).mean((0, 2)))

    given = {
        "attention_mask": _additive(visible, _dtype(collector.model)),
        "position_ids": plan.place + offset,
    }
    collector.run({**batch, **given}, measure)
    return {layer: torch.stack(calls).mean(0) for layer, calls in found.items()}


def _dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the computation: sdpa wants a mask in the type of its queries."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _sees(attention: Attention, expected: Tensor) -> bool:
    """Whether the rows see exactly the expected keys."""
    source, (_, _, n, m) = attention.source, attention.shape
    for rows in source.chunks(n):
        visible = source.visible(rows, source.positions(rows), slice(0, m))
        want = expected[:, :, rows].to(source.device)
        if not bool((want if visible is None else visible == want).all()):
            return False
    return True


def _checked_positions(model: nn.Module, batch: Mapping[str, Any], valid: Tensor) -> tuple[int, bool]:
    """The number of the model's first position, and whether it is causal.

    The longest sequence is run without padding: as the model masks and numbers it, and with both spelled out.
    """
    longest = int(valid.sum(1).argmax())
    one = _cropped(batch, longest, valid)
    one.pop("attention_mask", None)
    one.pop("position_ids", None)
    count = int(valid[longest].sum())
    ones = torch.ones(1, count, dtype=torch.bool, device=valid.device)
    causal: list[bool] = []
    collector = AttentionCollector(model, eager=True)
    output = collector.run(one, lambda layer, call: causal.append(is_causal(attention_of(call))))
    if not causal:
        return 0, False  # no layer is captured, which the result reports
    own = read_output(model, output, ones, "all")
    plan = _plan(ones, 1, 1)._replace(asks=torch.zeros_like(ones))
    mask = _additive(_visible(plan, causal[0]), _dtype(model))
    places = torch.arange(count, device=valid.device)[None]
    tolerance = _SAME.get(own.values.dtype, _SAME_IN_HALF)
    for offset in _offsets(model):
        try:
            output = model(**one, attention_mask=mask, position_ids=places + offset)
        except (IndexError, RuntimeError, ValueError):
            continue
        with_mask = read_output(model, output, ones, "all")
        difference = (with_mask.values.double() - own.values.double()).norm()
        if bool(difference <= tolerance * own.values.double().norm()):
            return offset, causal[0]
    raise ValueError(
        f"expected {type(model).__name__} to give its own output when its mask and positions are spelled out as "
        "attention_mask (batch, 1, n, n) and position_ids, got another: it masks or numbers tokens in its own way "
        "and has no such probe; where it has sliding windows, shorter sequences will do"
    )


def _offsets(model: nn.Module) -> list[int]:
    """Where positions may begin: RoBERTa and similar models number them from behind their padding."""
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    return [0] if not isinstance(padding, int) or padding < 0 else [0, padding + 1]


def _cropped(batch: Mapping[str, Any], sequence: int, valid: Tensor) -> dict[str, Any]:
    """One sequence without its padding."""
    keep = valid[sequence]
    out = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == valid.shape:
            value = value[sequence : sequence + 1, keep.to(value.device)]
        elif isinstance(value, Tensor) and value.dim() and len(value) == len(valid):
            value = value[sequence : sequence + 1]
        out[name] = value
    return out
