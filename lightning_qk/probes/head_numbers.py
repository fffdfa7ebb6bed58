"""What is measured of each head to class it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import evaluated
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import AttentionSums, MeanSums, attention_sums, finish
from lightning_qk.functional.logits import AttentionLogits
from lightning_qk.functional.position import positional_share
from lightning_qk.functional.spectrum import qk_moments
from lightning_qk.heads.reader import kept_reader
from lightning_qk.metrics.collector import AttentionCollector
from lightning_qk.probes._attention import Attention, attention_of, row_parts, weighted_values
from lightning_qk.probes.run import prepared, results

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


def measure_heads(
    model: nn.Module, batches: Iterable[Any]
) -> tuple[dict[str, dict[str, Tensor]], AttentionCollector]:
    """Run some batches and measure every head.

    Args:
        model: a transformers model, or a module that is called like one.
        batches: mappings of its keyword arguments, or tensors of input ids.

    Returns:
        Layer → number → ``(heads,)``, see :data:`~lightning_qk.probes.head_classes.NUMBERS`; and the collector,
        which knows the layers that were left out.

    Raises:
        TypeError: a batch is neither.
        ValueError: no batch, or no attention that can be captured.
    """
    ran = False
    with evaluated(model):
        collector = AttentionCollector(model, _measure, eager=True)
        for batch in batches:
            ran = True
            given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
            collector.run(prepared(model, given))
        if not ran:
            raise ValueError(
                "expected at least one batch to measure heads on, got none: pass some of the data"
            )
        attention, others = collector.pool.sums("attention"), collector.pool.sums("others")
        known = results(collector, {layer: _numbers(attention[layer], others[layer]) for layer in others})
        weights = weight_numbers(model)
    return {layer: numbers | weights.get(layer, {}) for layer, numbers in known.items()}, collector


def _measure(layer: str, call: CapturedCall) -> dict[str, AttentionSums | MeanSums]:
    logits, attention = call.logits(), attention_of(call)
    top, square = _of_rows(attention)
    share = _share(logits, call.self_attention)
    rows = attention.valid.sum()
    total = torch.stack([top.nan_to_num().sum(0), square.nan_to_num(), share.nan_to_num() * rows])
    weight = torch.stack([(~top.isnan()).sum(0), ~square.isnan() * rows, ~share.isnan() * rows])
    return {"attention": attention_sums(logits), "others": MeanSums(total[:, None], weight[:, None])}


def weight_numbers(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """``weight`` and ``eig_var`` of the layers with weights that can be read."""
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
        out[name] = {
            "weight": relative(moments["frobenius_sq"].sqrt()),
            "eig_var": moments["eig_var"],
        }
    return out


def relative(sizes: Tensor) -> Tensor:
    """Each over the largest; 0 where all are 0."""
    largest = sizes[~sizes.isnan()].amax() if (~sizes.isnan()).any() else sizes.new_tensor(torch.nan)
    return torch.where(sizes == 0, 0.0, sizes / largest)


def _numbers(attention: AttentionSums, others: MeanSums) -> dict[str, Tensor]:
    values = finish(AttentionSums(*(part.squeeze(1) for part in attention)), standard_errors=False)
    top, square, share = others.means(per_sequence=False)
    return {name: values[name] for name in _OF_ATTENTION} | {
        "sink_top": top,
        "output": relative(square.sqrt()),
        "positional_share": share,
    }


def _of_rows(attention: Attention) -> tuple[Tensor, Tensor]:
    """What the key that receives most receives in each sequence, ``(batch, heads)``, and Σ ‖o‖², ``(heads,)``.

    NaN where no key counts, or values are not known.
    """
    batch, heads, _, m = attention.shape
    like: dict[str, Any] = {"dtype": attention.source.dtype, "device": attention.source.device}
    total, seen = torch.zeros(2, batch, heads, m, **like).unbind()
    square = torch.full((heads,), torch.nan if attention.value is None else 0.0, **like)
    for part in row_parts(attention):
        width = part.probabilities.shape[-1]
        total[..., :width] += part.probabilities.sum(-2)
        seen[..., :width] += part.shown.sum(-2)
        if attention.value is not None:
            square += weighted_values(part.probabilities, attention.value).square().sum((0, 2, 3))
    counts = (seen > 0) & (seen >= _MIN_SEEN * seen.amax(-1, keepdim=True))
    top = torch.where(counts, total / seen, -torch.inf).amax(-1)
    return top.masked_fill(top == -torch.inf, torch.nan), square


def _share(logits: AttentionLogits, own: bool | None) -> Tensor:
    """Positional share of the logits, ``(heads,)``; NaN where queries have no place among the keys."""
    _, heads, n, m = logits.shape
    if own is False or logits.query_offset is None or (own is None and n != m):
        return torch.full((heads,), torch.nan, dtype=logits.dtype, device=logits.device)
    return positional_share(logits)
