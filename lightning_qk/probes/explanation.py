"""Whether attention shows which tokens matter."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import evaluated
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.chunks import sample_rows
from lightning_qk.functional.ranks import kendall_tau
from lightning_qk.metrics.collector import AttentionCollector
from lightning_qk.probes._attention import attention_of, is_causal, received
from lightning_qk.probes._output import Where, change, read_output
from lightning_qk.probes.run import (
    check_marks,
    last_tokens,
    one_sequence,
    over_tokens,
    own_generator,
    parameters,
    results,
)


def attention_as_explanation(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    tokens: int = 16,
    read: Literal["last", "all"] | None = None,
    rows: Literal["all", "last"] = "all",
    mask_token_id: int | None = None,
    candidates: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Rank agreement of the attention that tokens receive with what masking each of them does to the output.

    Some tokens of each sequence are sampled. The attention that a head gives to each, mean over the rows that see
    it, is compared by Kendall's τ_b with the effect of masking it: the total variation between the model's output
    distributions before and after (of a model without a head, the relative change of its last hidden states).
    1: what a head attends to is what matters; 0: attention shows nothing. After arXiv 2211.07714 [S: the
    comparison of attention with the effect of masking; R: this form].

    Costs ``tokens`` + 1 forward passes of the batch. The model is run in evaluation mode without gradients and
    left as it was.

    Args:
        model: a transformers model of one sequence, or a module that is called and answers like one.
        batch: its keyword arguments, with ``input_ids`` or ``inputs_embeds``.
        tokens: how many to mask in each sequence, or all where there are fewer.
        read: where the output is compared: at the ``"last"`` valid token, or at ``"all"`` valid tokens but the
            masked one. None: last where attention is causal, else all. Of no effect on logits of whole sequences.
        rows: whose attention counts: that of ``"all"`` valid tokens, or that of the ``"last"`` one.
        mask_token_id: what a masked token is replaced by in ``input_ids``. None: it stays, and the attention mask
            hides it from all tokens.
        candidates: tokens that may be masked, boolean ``(batch, tokens)``, to leave out special ones. Padding
            never is, nor the last token where the output is read there.
        generator: where tokens are sampled from; None: the same ones at every call.

    Returns:
        Layer → τ_b of each head, mean over the sequences where it is defined, ``(heads,)``; NaN where it is
        defined in none: fewer than two tokens, or all with the same attention or effect.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: an encoder-decoder, a batch without tokens, a model that takes no attention mask (without
            ``mask_token_id``), no attention that can be captured, or an argument out of range.
    """
    if tokens < 2:
        raise ValueError(f"expected tokens to be at least 2, since one has no rank, got {tokens}")
    if read not in (None, "last", "all") or rows not in ("all", "last"):
        raise ValueError(
            f"expected read 'last', 'all' or None and rows 'all' or 'last', got {read!r}, {rows!r}"
        )
    batch, valid = one_sequence(model, batch, "attention as explanation")
    check_marks(candidates, valid.shape, "candidates")
    _check_masking(model, batch, mask_token_id, valid)
    keep = torch.zeros_like(valid).scatter(1, last_tokens(valid, 1), True) if rows == "last" else None
    causal: list[bool] = []
    attention: dict[str, list[Tensor]] = {}

    def measure(layer: str, call: CapturedCall) -> None:
        own = attention_of(call)
        over_tokens(own, valid.shape)
        if not causal:
            causal.append(is_causal(own))
        attention.setdefault(layer, []).append(received(own, keep))

    with evaluated(model):
        collector = AttentionCollector(model, measure, eager=True)
        output = collector.run(batch)
        where: Where = read or ("last" if causal and causal[0] else "all")
        before = read_output(model, output, valid, where)
        may = valid if candidates is None else valid & candidates.to(valid.device)
        if before.values.shape[1] == 1 and where == "last":
            may = may.scatter(1, last_tokens(valid, 1), False)
        count = min(tokens, valid.shape[1])
        chosen = sample_rows(may, count, own_generator(generator))
        effects = []
        for place in chosen.unbind(1):
            output = model(**_masked(batch, place, valid, mask_token_id))
            effects.append(change(before, read_output(model, output, valid, where), place))
    effect = torch.stack(effects, 1)
    effect = torch.where(may.gather(1, chosen).to(effect.device), effect, torch.nan)
    taus = {
        layer: _agreement(torch.stack(calls).mean(0), chosen, effect) for layer, calls in attention.items()
    }
    return results(collector, taus)


def _agreement(attention: Tensor, chosen: Tensor, effect: Tensor) -> Tensor:
    """Mean of τ_b over sequences, ``(heads,)``, of attention ``(batch, heads, n)``."""
    taus = []
    for got, places, wanted in zip(attention.double(), chosen, effect.to(attention.device), strict=True):
        known = ~wanted.isnan()
        taus.append(kendall_tau(got[:, places.to(got.device)][:, known], wanted[known]))
    return torch.stack(taus).nanmean(0).float()


def _check_masking(
    model: nn.Module, batch: Mapping[str, Any], mask_token_id: int | None, valid: Tensor
) -> None:
    kind = type(model).__name__
    if mask_token_id is not None:
        if batch.get("input_ids") is None:
            raise ValueError(
                f"expected input_ids in the batch to put mask_token_id into, got {sorted(batch)}: leave "
                "mask_token_id out to hide tokens by the attention mask"
            )
        return
    if "attention_mask" not in parameters(model):
        raise ValueError(
            f"expected a model that takes an attention_mask, by which tokens are hidden, got {kind}: pass "
            "mask_token_id to replace them instead"
        )
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape != valid.shape:
        raise ValueError(
            f"expected an attention_mask of shape (batch, tokens) = {tuple(valid.shape)} for {kind}, got "
            f"{tuple(mask.shape)}: pass mask_token_id to replace tokens instead of hiding them"
        )


def _masked(
    batch: Mapping[str, Any], place: Tensor, valid: Tensor, mask_token_id: int | None
) -> dict[str, Any]:
    """The batch without one token of each sequence."""
    place = place[:, None]
    if mask_token_id is not None:
        return {**batch, "input_ids": batch["input_ids"].scatter(1, place, mask_token_id)}
    mask = batch.get("attention_mask")
    mask = valid.long() if mask is None else mask
    return {**batch, "attention_mask": mask.scatter(1, place, 0)}
