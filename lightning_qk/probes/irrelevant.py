"""Attention on tokens that are known to be noise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.probes._attention import Attention, row_parts
from lightning_qk.probes.run import (
    Hearing,
    check_marks,
    over_tokens,
    prepared,
    quiet,
    refuse_encoder_decoder,
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
    totals: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def listen(layer: str, heard: Attention) -> None:
        over_tokens(heard, shape)
        total, count = _mass(heard, irrelevant.to(heard.valid.device))
        totals[layer] = totals.get(layer, 0) + total
        counts[layer] = counts.get(layer, 0) + count

    with quiet(model):
        hearing = Hearing(model)
        hearing.run(prepared(model, batch), listen)
    return hearing.result({layer: total / counts[layer] for layer, total in totals.items()})


def _mass(attention: Attention, marked: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of the mass on marked keys, and how many rows, both ``(heads,)``."""
    heads = attention.shape[1]
    total, count = torch.zeros(
        2, heads, dtype=attention.source.dtype, device=attention.source.device
    ).unbind()
    for part in row_parts(attention, ~marked):
        width = part.probabilities.shape[-1]
        keys = marked[:, None, None, :width]
        counts = (part.shown & keys).any(-1) & (part.shown & ~keys).any(-1)
        mass = (part.probabilities * keys).sum(-1) * counts
        total = total + mass.sum((0, 2))
        count = count + counts.expand(-1, heads, -1).sum((0, 2))
    return total, count
