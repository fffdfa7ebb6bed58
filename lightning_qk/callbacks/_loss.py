"""The training loss: of a batch, and as a curve of the run for its report."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk.record.history import History


def batch_loss(trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Tensor | None:
    """The loss that ``training_step`` returned for a micro-batch, on its device; None where it returned none.

    Args:
        trainer: the trainer.
        pl_module: its module.
        outputs: what ``on_train_batch_end`` is given.
    """
    value = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(value, Tensor) or value.numel() != 1:
        return None
    if pl_module.automatic_optimization:
        # Lightning has divided it by the number of micro-batches.
        value = value * trainer.accumulate_grad_batches
    return value.detach().float().reshape(())


class LossCurve:
    """Training loss of the measured steps, the mean over the step's batches of this process.

    Other steps stay as they are without a monitor, and nothing waits for the device but a measurement.
    """

    NAME = "train/loss"

    def __init__(self) -> None:
        self._points = History(["run"], [1])
        self._sum: Tensor | None = None
        self._count = 0

    def hear(self, loss: Tensor | None) -> None:
        """Take the loss of a batch."""
        if loss is not None:
            self._sum = loss if self._sum is None else self._sum.to(loss.device) + loss
            self._count += 1

    def close(self, step: int) -> None:
        """A point of the curve at a measured step; waits for the device."""
        total, count, self._sum, self._count = self._sum, self._count, None, 0
        if total is not None:
            self._points.append(step, {"loss": (total / count).reshape(1)})

    def points(self) -> tuple[list[int], list[float]]:
        """Steps and means, without those that are not finite."""
        if not self._points.steps:
            return [], []
        values = self._points.series("loss")[:, 0].tolist()
        known = [pair for pair in zip(self._points.steps, values, strict=True) if math.isfinite(pair[1])]
        return [step for step, _ in known], [value for _, value in known]

    def state_dict(self) -> dict[str, Any]:
        """The curve up to now."""
        return self._points.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the curve of a checkpoint."""
        self._points = History.from_state_dict(state)
