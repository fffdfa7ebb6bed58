"""What ranks have to agree on before one of them does something that the others would wait for.

Collective calls, all of them: they stand where every rank comes by; nothing known on one rank alone may
decide whether they are made.
"""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def has_peers(trainer: Trainer) -> bool:
    """Whether other processes train with this one; the same answer on all of them."""
    return trainer.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()


def all_agree(trainer: Trainer, is_well: bool) -> bool:
    """Whether all is well on every rank."""
    if not has_peers(trainer):
        return is_well
    return bool(trainer.strategy.reduce_boolean_decision(is_well, all=True))


def from_zero(trainer: Trainer, value: Any) -> Any:
    """What rank zero has, on all ranks."""
    return trainer.strategy.broadcast(value) if has_peers(trainer) else value


def total(trainer: Trainer, values: Tensor) -> Tensor:
    """Sum over ranks, in place; the shape is the same on all of them."""
    if has_peers(trainer):
        torch.distributed.all_reduce(values)
    return values
