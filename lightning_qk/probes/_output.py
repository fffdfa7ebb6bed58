"""A model's output, and how much it changes."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Where = Literal["last", "all"]


class Said(NamedTuple):
    """Output of one run, where it is read.

    Attributes:
        values: ``(batch, positions, width)``: logits, or hidden states of a model without a head.
        is_distribution: they are logits.
        weight: positions that count, ``(batch, positions)``.
    """

    values: Tensor
    is_distribution: bool
    weight: Tensor


def read_output(model: nn.Module, output: Any, valid: Tensor, where: Where) -> Said:
    """Take the logits, or else the last hidden states, where they are to be compared.

    Args:
        model: for the message.
        output: what it returned.
        valid: tokens that are no padding, ``(batch, n)``.
        where: ``"last"``: at the last valid token; ``"all"``: at all valid tokens. What has no position, the
            logits of a sequence, is compared as it is.

    Raises:
        ValueError: the output has neither.
    """
    values, is_distribution = getattr(output, "logits", None), True
    if not isinstance(values, Tensor):
        values, is_distribution = getattr(output, "last_hidden_state", None), False
    if not isinstance(values, Tensor) or values.dim() not in (2, 3) or len(values) != len(valid):
        raise ValueError(
            f"expected {type(model).__name__} to return logits or last_hidden_state of shape (batch, ...), got "
            f"{type(output).__name__}: wrap the model so that its output has one of the two"
        )
    if values.dim() == 2:
        values = values[:, None]
    if values.shape[1] != valid.shape[1]:
        ones = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return Said(values, is_distribution, ones)
    if where == "last":
        places = torch.arange(valid.shape[1], device=valid.device).masked_fill(~valid, -1)
        last = places.amax(1).clamp_min(0).to(values.device)
        values = values[torch.arange(len(values), device=values.device), last][:, None]
        return Said(values, is_distribution, torch.ones_like(values[..., 0], dtype=torch.bool))
    return Said(values, is_distribution, valid.to(values.device))


def change(before: Said, after: Said, without: Tensor | None = None) -> Tensor:
    """How much an output changed, mean over the positions that count, ``(batch,)``.

    Of logits the total variation between their distributions, in [0, 1]; of hidden states the distance over the
    norm of what was before.

    Args:
        before: output of one run.
        after: output of another.
        without: one position of each sequence that does not count, ``(batch,)``.
    """
    weight = before.weight.double()
    if without is not None and weight.shape[1] > 1:
        weight = weight.scatter(1, without.to(weight.device)[:, None], 0.0)
    # One sequence at a time: distributions over a vocabulary are the largest tensors of a run.
    changes = [
        _distance(old, new, before.is_distribution)
        for old, new in zip(before.values, after.values, strict=True)
    ]
    each = torch.stack(changes)
    # A position that does not count may hold anything.
    return torch.where(weight > 0, each * weight, 0.0).sum(1) / weight.sum(1)


def _distance(old: Tensor, new: Tensor, is_distribution: bool) -> Tensor:
    old, new = old.double(), new.double()
    if is_distribution:
        return (old.softmax(-1) - new.softmax(-1)).abs().sum(-1) / 2
    return (old - new).norm(dim=-1) / old.norm(dim=-1)
