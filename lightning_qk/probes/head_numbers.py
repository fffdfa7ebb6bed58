"""What is measured of each head to class it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import AttentionSums, attention_sums, finish
from lightning_qk.functional.logits import AttentionLogits
from lightning_qk.functional.position import positional_share
from lightning_qk.functional.propagation import signal_propagation_probability
from lightning_qk.functional.spectrum import qk_moments
from lightning_qk.heads.reader import kept_reader
from lightning_qk.probes._attention import Attention, row_parts, weighted_values
from lightning_qk.probes.run import Hearing, prepared, quiet

_OF_ATTENTION = (
    "entropy",
    "entropy_normalized",
    "max_prob",
    "max_abs_logit",
    "logit_std",
    "sink_first",
    "sink_rate",
)
# A key counts for the top when it is seen by this share of the rows that see the most-seen key, as for sink_rate.
_MIN_SEEN = 0.25
# Relative positions at which propagation is predicted: midpoints of ten equal parts of [0, 1], as the monitors do.
_THETA = torch.linspace(0.05, 0.95, 10)


def measure_heads(model: nn.Module, batches: Iterable[Any]) -> tuple[dict[str, dict[str, Tensor]], Hearing]:
    """Run some batches and measure every head.

    Args:
        model: a transformers model, or a module that is called like one.
        batches: mappings of its keyword arguments, or tensors of input ids.

    Returns:
        Layer → number → ``(heads,)``, see :data:`~lightning_qk.probes.head_classes.NUMBERS`; and what heard them,
        which knows the layers that were left out.

    Raises:
        TypeError: a batch is neither.
        ValueError: no batch, or no attention that can be heard.
    """
    collected: dict[str, _Collected] = {}
    ran = False
    with quiet(model):
        hearing = Hearing(model)

        def listen(layer: str, call: CapturedCall) -> None:
            collected.setdefault(layer, _Collected()).add(hearing, layer, call)

        for batch in batches:
            ran = True
            given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
            hearing.run_calls(prepared(model, given), listen)
        if not ran:
            raise ValueError(
                "expected at least one batch to measure heads on, got none: pass some of the data"
            )
        known = hearing.result({layer: one.rows for layer, one in collected.items()})
        weights = weight_numbers(model)
    return {layer: collected[layer].numbers() | weights.get(layer, {}) for layer in known}, hearing


def weight_numbers(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Of the layers whose weights can be read: ``weight``, ``eig_var``, ``propagation``."""
    try:
        reader = kept_reader(model)
    except ValueError:
        return {}
    out = {}
    for name, layer in reader.items():
        if not layer.self_attention:
            continue
        query, key = layer.query.detach(), layer.key.detach()
        moments = qk_moments(query, key)
        scale = layer.scaling
        propagation = signal_propagation_probability(
            _THETA.to(moments["trace"])[:, None],
            scale * moments["trace"],
            scale**2 * moments["trace_sq"],
            scale**2 * moments["frobenius_sq"],
        )
        out[name] = {
            "weight": relative(moments["frobenius_sq"].sqrt()),
            "eig_var": moments["eig_var"],
            "propagation": propagation.mean(0),
        }
    return out


def relative(sizes: Tensor) -> Tensor:
    """Each over the largest; 0 where all are 0."""
    largest = sizes[~sizes.isnan()].amax() if (~sizes.isnan()).any() else sizes.new_tensor(torch.nan)
    return torch.where(sizes == 0, 0.0, sizes / largest)


class _Collected:
    """Sums of one layer over calls."""

    def __init__(self) -> None:
        self._sums: AttentionSums | None = None
        self._top: list[Tensor] = []
        self._square: Tensor | None = None
        self._share: list[tuple[Tensor, Tensor]] = []

    def add(self, hearing: Hearing, layer: str, call: CapturedCall) -> None:
        own, heads = hearing.self_attention.get(layer), hearing.heads.get(layer)
        logits = call.logits(self_attention=own, heads=heads)
        sums = _pooled(attention_sums(logits))
        before = self._sums
        if before is not None:
            sums = AttentionSums(
                total=before.total + sums.total,
                weight=before.weight + sums.weight,
                variance=before.variance + sums.variance,
                maximum=torch.maximum(before.maximum, sums.maximum),
            )
        attention = hearing.attention(layer, call)
        top, square = _of_rows(attention)
        share = None if own is False else _share(logits, own)
        # Only now, that nothing has failed.
        self._sums = sums
        self._top.append(top)
        if square is not None:
            self._square = square if self._square is None else self._square + square
        if share is not None:
            self._share.append((share, attention.valid.sum()))

    @property
    def rows(self) -> Tensor:
        assert self._sums is not None  # add
        return self._sums.weight

    def numbers(self) -> dict[str, Tensor]:
        assert self._sums is not None  # add
        values = finish(self._sums, standard_errors=False)
        out = {name: values[name] for name in _OF_ATTENTION}
        nothing = torch.full_like(out["max_prob"], torch.nan)
        out["sink_top"] = torch.cat(self._top).nanmean(0)
        rows = self._sums.weight.amax(0)
        out["output"] = nothing if self._square is None else relative((self._square / rows).sqrt())
        out["positional_share"] = self._mean_share(nothing)
        return out

    def _mean_share(self, nothing: Tensor) -> Tensor:
        if not self._share:
            return nothing
        shares = torch.stack([share for share, _ in self._share])
        weight = torch.stack([rows for _, rows in self._share])[:, None] * ~shares.isnan()
        return (shares.nan_to_num() * weight).sum(0) / weight.sum(0)


def _pooled(sums: AttentionSums) -> AttentionSums:
    return AttentionSums(sums.total.sum(1), sums.weight.sum(1), sums.variance.sum(1), sums.maximum.amax(1))


def _of_rows(attention: Attention) -> tuple[Tensor, Tensor | None]:
    """What the key that receives most receives in each sequence, ``(batch, heads)``, and Σ ‖o‖², ``(heads,)``."""
    batch, heads, _, m = attention.shape
    like: dict[str, Any] = {"dtype": attention.source.dtype, "device": attention.source.device}
    total, seen = torch.zeros(2, batch, heads, m, **like).unbind()
    square = None if attention.value is None else torch.zeros(heads, **like)
    for part in row_parts(attention):
        width = part.probabilities.shape[-1]
        total[..., :width] += part.probabilities.sum(-2)
        seen[..., :width] += part.shown.sum(-2)
        if square is not None and attention.value is not None:
            square += weighted_values(part.probabilities, attention.value).square().sum((0, 2, 3))
    counts = (seen > 0) & (seen >= _MIN_SEEN * seen.amax(-1, keepdim=True))
    top = torch.where(counts, total / seen, -torch.inf).amax(-1)
    return top.masked_fill(top == -torch.inf, torch.nan), square


def _share(logits: AttentionLogits, own: bool | None) -> Tensor | None:
    """Positional share of the logits; None where queries have no place among the keys."""
    n, m = logits.shape[2:]
    if logits.query_offset is None or (own is None and n != m):
        return None
    return positional_share(logits)
