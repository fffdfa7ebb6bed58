"""Attention on tokens that are known to be noise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import evaluated
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import MeanSums
from lightning_qk.metrics.collector import AttentionCollector
from lightning_qk.probes._attention import Attention, attention_of, row_parts
from lightning_qk.probes.run import (
    check_marks,
    over_tokens,
    prepared,
    refuse_encoder_decoder,
    results,
)


def irrelevant_mass(model: nn.Module, batch: Mapping[str, Any], irrelevant: Tensor) -> dict[str, Tensor]:
    r"""Attention that the other tokens give to tokens marked as irrelevant, per head.

    The mean of :math:`\sum_{j \in \text{marked}} a_{ij}` over rows i that are not marked themselves and see at
    least one marked token and one that is not. 0: noise is ignored. After arXiv 2007.04862 [S: attention on
    tokens that are irrelevant; R: this form].

    Costs one forward pass. The model is run in evaluation mode without gradients and left as it was.

    Args:
        model: a transformers model of one sequence, or a module that is called like one.
        batch: its keyword arguments.
        irrelevant: which tokens are noise, boolean ``(batch, tokens)``.

    Returns:
        Layer → mass of each head in [0, 1], ``(heads,)``; NaN where no row counts.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: an encoder-decoder, marks of another form, or no attention over the marked tokens.
    """
    refuse_encoder_decoder(model, "attention on irrelevant tokens")
    shape = irrelevant.shape if isinstance(irrelevant, Tensor) and irrelevant.dim() == 2 else (0, 0)
    check_marks(irrelevant, shape, "irrelevant")

    def measure(layer: str, call: CapturedCall) -> MeanSums:
        attention = attention_of(call)
        over_tokens(attention, shape)
        return _mass(attention, irrelevant.to(attention.valid.device))

    with evaluated(model):
        collector = AttentionCollector(model, measure, eager=True)
        collector.run(prepared(model, batch))
    sums = collector.pool.sums()
    return results(collector, {layer: own.means(per_sequence=False)[0] for layer, own in sums.items()})


def _mass(attention: Attention, marked: Tensor) -> MeanSums:
    """Mass on marked keys over the rows that count, of parts ``(1, 1, heads)``."""
    heads = attention.shape[1]
    total, count = torch.zeros(2, heads, dtype=attention.source.dtype, device=attention.source.device)
    for part in row_parts(attention, ~marked):
        width = part.probabilities.shape[-1]
        keys = marked[:, None, None, :width]
        counts = (part.shown & keys).any(-1) & (part.shown & ~keys).any(-1)
        mass = (part.probabilities * keys).sum(-1) * counts
        total = total + mass.sum((0, 2))
        count = count + counts.expand(-1, heads, -1).sum((0, 2))
    return MeanSums(total[None, None], count[None, None])
