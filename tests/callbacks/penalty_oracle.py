"""Penalties on attention as a term of the loss: dense maps of eager models, from their own tensors."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import models
import torch
import transformers
from torch import Tensor

FILES = {
    "gpt2": transformers.models.gpt2.modeling_gpt2,
    "bert": transformers.models.bert.modeling_bert,
    "llama": transformers.models.llama.modeling_llama,
}


class Term:
    """Keeps the maps of a forward and makes the term of them."""

    def __init__(self, penalty: Callable[[Tensor, Tensor], Tensor], weight: float) -> None:
        self.penalty = penalty
        self.weight = weight
        self.found: list[Tensor] = []
        self.values: list[float] = []

    def __call__(self, job: Any) -> Tensor:
        found, self.found = self.found, []
        value = torch.stack(found).mean()
        self.values.append(float(value.detach()))
        return self.weight * value

    @contextmanager
    def listening(self, kind: str) -> Iterator["Term"]:
        """Within it the model's own eager function leaves its map here."""
        file = FILES[kind]
        function = file.eager_attention_forward

        def heard(module, query, key, value, attention_mask, scaling=None, **kwargs):
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            with torch.autocast("cpu", enabled=False):
                keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
                logits = query.float() @ keys.mT * scaling
                visible = torch.ones_like(logits, dtype=torch.bool)
                if attention_mask is not None:
                    visible = visible & (attention_mask > -1e4)
                log_p = logits.masked_fill(~visible, -math.inf).log_softmax(-1)
                if torch._C._current_graph_task_id() == -1:
                    self.found.append(self.penalty(log_p, visible))
            return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

        file.eager_attention_forward = heard
        try:
            yield self
        finally:
            file.eager_attention_forward = function


def rows_that_count(visible: Tensor) -> Tensor:
    """Tokens that some row sees, ``(batch, 1, n)``."""
    return visible.any(-2)[:, :1]


def band(low: float, high: float, per: str) -> Callable[[Tensor, Tensor], Tensor]:
    def penalty(log_p: Tensor, visible: Tensor) -> Tensor:
        p = log_p.exp()
        entropy = -(p * torch.where(visible, log_p, 0.0)).sum(-1)
        count = visible.sum(-1)
        used = (count > 1) & rows_that_count(visible)
        value = torch.where(used, entropy / count.clamp_min(2).log(), 0.0)
        if per == "head":
            value = value.sum((0, 2)) / used.sum((0, 2))
            return (torch.relu(low - value) + torch.relu(value - high)).mean()
        distance = torch.where(used, torch.relu(low - value) + torch.relu(value - high), 0.0)
        return distance.sum() / used.sum()

    return penalty


def divergence(prior: Tensor, heads: list[int] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Prior: broadcastable to the map's shape."""

    def penalty(log_p: Tensor, visible: Tensor) -> Tensor:
        mass = torch.where(visible, prior.float().expand_as(log_p), 0.0)
        total = mass.sum(-1, keepdim=True)
        mass = mass / torch.where(total > 0, total, 1.0)
        kl = (torch.special.xlogy(mass, mass) - mass * torch.where(visible, log_p, 0.0)).sum(-1)
        used = (total[..., 0] > 0) & rows_that_count(visible)
        value = torch.where(used, kl, 0.0).sum((0, 2)) / used.sum((0, 2))
        return (value if heads is None else value[heads]).mean()

    return penalty


def build(kind: str) -> Any:
    torch.manual_seed(1)
    return getattr(models, kind)(attn_implementation="eager")
