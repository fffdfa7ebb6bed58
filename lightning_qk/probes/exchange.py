"""Whether a head takes its context as a set."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import evaluated
from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.metrics.collector import AttentionCollector
from lightning_qk.probes._attention import attention_of, rows_at, weighted_values
from lightning_qk.probes.run import (
    check_marks,
    last_tokens,
    one_sequence,
    over_tokens,
    own_generator,
    results,
)

# What belongs to a token and moves with it; positions stay.
_OF_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids")


def exchangeability(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    permutations: int = 4,
    rows: int = 1,
    of: Literal["output", "attention"] = "output",
    keep: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Relative change of each head's output when the context's tokens change places.

    The last ``rows`` tokens of each sequence ask, and stay; the tokens before them are permuted, while positions
    stay where they are. A head that takes its context as a set does not change: 0. With the outputs o of the head
    at the asking rows, attention times values before the output projection, and o′ after the permutation, the
    change is :math:`\lVert o' - o \rVert / \lVert o \rVert`, mean over permutations and sequences; it may be
    greater than 1. After arXiv 2212.14852 [S: exchangeability of the context; R: this form].

    The tokens are permuted where they enter the model, so that a head of a deeper layer also changes because
    layers before it do: causal ones show each token other tokens before it.

    Costs ``permutations`` + 1 forward passes. The model is run in evaluation mode without gradients and left as
    it was.

    Args:
        model: a transformers model of one sequence, or a module that is called like one.
        batch: its keyword arguments, with ``input_ids`` or ``inputs_embeds``.
        permutations: how many to draw for each sequence.
        rows: how many tokens ask. Of a model that is causal each sees those before it.
        of: ``"output"`` as above, or ``"attention"``: the total variation between the rows' attention before and
            after, each token's followed to where it went, in [0, 1]. It needs no values.
        keep: tokens that stay in any case, boolean ``(batch, tokens)``: special ones, say. Padding always stays.
        generator: where permutations are drawn from; None: the same ones at every call.

    Returns:
        Layer → change of each head, ``(heads,)``; NaN where no sequence has two tokens to exchange.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: an encoder-decoder, a batch without tokens, no attention that can be captured, or an argument
            out of range.
    """
    if permutations < 1 or rows < 1:
        raise ValueError(f"expected permutations and rows of at least 1, got {permutations} and {rows}")
    if of not in ("output", "attention"):
        raise ValueError(f"expected of to be 'output' or 'attention', got {of!r}")
    batch, valid = one_sequence(model, batch, "exchangeability")
    check_marks(keep, valid.shape, "keep")
    asking = last_tokens(valid, rows)
    movable = valid.scatter(1, asking, False)
    if keep is not None:
        movable &= ~keep.to(movable.device)
    generator = own_generator(generator)
    is_moved = movable.sum(1) > 1

    def output(call: CapturedCall) -> Tensor:
        """Output of the asking rows, or their attention, ``(batch, heads, rows, width)``."""
        attention = attention_of(call)
        over_tokens(attention, valid.shape)
        probabilities = rows_at(attention, asking)
        if of == "attention":
            return probabilities
        if attention.value is None:
            raise UnsupportedCallError(
                "its values are not known, only its softmax: ask for of='attention', which needs none"
            )
        return weighted_values(probabilities, attention.value)

    def run(batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        outputs: dict[str, list[Tensor]] = {}
        collector.run(batch, lambda layer, call: outputs.setdefault(layer, []).append(output(call)))
        return outputs

    changes: dict[str, list[Tensor]] = {}
    with evaluated(model):
        collector = AttentionCollector(model, eager=True)
        before = run(batch)
        for _ in range(permutations):
            source = _permutation(movable, generator)
            after = run(_permuted(batch, source))
            for layer, calls in after.items():
                pairs = zip(before[layer], calls, strict=True)
                change = torch.stack([_change(old, new, source, of) for old, new in pairs]).mean(0)
                change[~is_moved.to(change.device)] = torch.nan
                changes.setdefault(layer, []).append(change)
    return results(collector, {layer: torch.cat(each).nanmean(0) for layer, each in changes.items()})


def _permutation(movable: Tensor, generator: torch.Generator) -> Tensor:
    """Which token comes to each place, ``(batch, n)``; those that may not move stay."""
    batch, n = movable.shape
    source = torch.arange(n, device=movable.device).repeat(batch, 1)
    for places, may in zip(source, movable, strict=True):
        own = may.nonzero()[:, 0]
        order = torch.randperm(len(own), generator=generator, device=generator.device)
        places[own] = own[order.to(own.device)]
    return source


def _permuted(batch: Mapping[str, Any], source: Tensor) -> dict[str, Any]:
    out = dict(batch)
    for name in _OF_TOKENS:
        value = out.get(name)
        if isinstance(value, Tensor) and value.shape[:2] == source.shape:
            index = source.to(value.device).reshape(*source.shape, *[1] * (value.dim() - 2))
            out[name] = value.gather(1, index.expand_as(value))
    return out


def _change(before: Tensor, after: Tensor, source: Tensor, of: str) -> Tensor:
    """Change of each sequence and head, ``(batch, heads)``."""
    if of == "attention":
        index = source.to(after.device)[:, None, None].expand_as(after)
        back = torch.zeros_like(after).scatter(-1, index, after)
        return (back - before).abs().sum(-1).mean(-1) / 2
    size = before.square().sum((-2, -1)).sqrt()
    change = (after - before).square().sum((-2, -1)).sqrt()
    # A head with an output of zero before and after has not changed.
    return torch.where(change == 0, 0.0, change / size)
