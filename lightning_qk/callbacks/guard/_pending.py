"""What a guard has not judged yet: losses of steps, and a reading that waits for the trainer's monitors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk.callbacks._loss import batch_loss
from lightning_qk.callbacks._ranks import is_distributed, total
from lightning_qk.guard.reading import Place


class StepLosses:
    """Training losses of the optimizer steps since the last reading, means over micro-batches and ranks."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._micro: list[Tensor] = []

    def add(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, key: str | None) -> None:
        """Keep the loss of a micro-batch: what ``training_step`` returned, or a key of the callback metrics."""
        if key is not None:
            value = trainer.callback_metrics.get(key)
        else:
            value = batch_loss(trainer, pl_module, outputs)
        if isinstance(value, Tensor) and value.numel() == 1:
            self._micro.append(value.detach().float().reshape(()))

    def close_step(self, trainer: Trainer, device: torch.device) -> None:
        """The loss of an optimizer step, mean over ranks: a collective call, so that any rank can save it.

        Raises:
            Exception: whatever failed on this rank, after the collective call.
        """
        found: Tensor | None = None
        error: Exception | None = None
        try:
            if self._micro:
                found = torch.stack([loss.to(device) for loss in self._micro]).mean()
        except Exception as own:
            error = own
        self._micro = []
        if is_distributed(trainer):
            pair = torch.zeros(2, device=device)
            if found is not None:
                pair[0], pair[1] = found, 1.0
            total(trainer, pair)
            # Without a value where no rank has one: that is not looked at here, which would wait for the device.
            found = pair[0] / pair[1].clamp_min(1)
        if found is not None:
            self._losses.append(found)
        if error is not None:
            raise error

    def take(self, device: torch.device) -> list[float]:
        """The losses of the steps since the last call."""
        losses, self._losses = self._losses, []
        return torch.stack([one.to(device) for one in losses]).tolist() if losses else []

    def state_dict(self) -> dict[str, list[float]]:
        """Plain numbers."""
        return {
            "losses": [float(loss) for loss in self._losses],
            "micro": [float(loss) for loss in self._micro],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the losses of a checkpoint."""
        self._losses = [torch.tensor(float(loss)) for loss in state.get("losses", ())]
        self._micro = [torch.tensor(float(loss)) for loss in state.get("micro", ())]


@dataclass
class Pending:
    """A reading that is not judged yet: reduced over ranks already, so that any rank can save it.

    Attributes:
        step: the optimizer step.
        trouble: why there is none, the same on every rank.
        losses: of the steps since the reading before.
        cosine: of the layers' tokens.
        values: what the monitors measured that had their turn.
        places: where.
    """

    step: int
    trouble: str | None = None
    losses: list[float] = field(default_factory=list)
    cosine: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        places = {group: [tuple(place) for place in own] for group, own in self.places.items()}
        return {**vars(self), "places": places}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Pending":
        """The reading that :meth:`state_dict` described."""
        places = {group: [Place(*place) for place in own] for group, own in state["places"].items()}
        return cls(**{**state, "places": places})
