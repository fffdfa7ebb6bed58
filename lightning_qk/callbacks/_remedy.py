"""What a guard does when it has fired: a dormant callback that wakes, a smaller learning rate, a step back."""

import os
import shutil
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

CHECKPOINT_NAME = "lightning_qk_healthy.ckpt"


class Dormant:
    """Callbacks that are checked at the start of a fit and do nothing until they are woken.

    Their ``setup`` and ``on_fit_start`` run with the guard's, so that they refuse what they cannot do before
    any work. ``on_train_start`` comes when they wake: what they take as the start is that moment.

    Args:
        callbacks: the interventions.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)
        self.is_awake = False

    def always(self, hook: str, *args: Any) -> None:
        """Call a hook, awake or not."""
        for callback in self.callbacks:
            getattr(callback, hook)(*args)

    def call(self, hook: str, *args: Any) -> None:
        """Call a hook where awake."""
        if self.is_awake:
            self.always(hook, *args)

    def wake(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Begin; whether there was something to begin."""
        if self.is_awake or not self.callbacks:
            return False
        self.is_awake = True
        self.always("on_train_start", trainer, pl_module)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Whether awake, and the callbacks' own states."""
        return {"is_awake": self.is_awake, "states": [callback.state_dict() for callback in self.callbacks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as in a checkpoint, where it has the same callbacks."""
        if len(state["states"]) == len(self.callbacks):
            self.is_awake = bool(state["is_awake"])
            for callback, own in zip(self.callbacks, state["states"], strict=True):
                if own:
                    callback.load_state_dict(own)


class RateLimit:
    """Scales the learning rates of optimizers inside their own steps, so that no schedule notices.

    From :meth:`tighten` on, a group steps with ``factor`` times its scheduled rate, and never with more than
    ``factor`` times the largest rate that it had until then: a schedule that still rises does not undo it. Over
    the first steps it may rise to that from zero, which is what a start without warm-up lacked.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._warmup = 0
        self._steps: list[int] = []
        self._ceilings: list[float] = []
        self._peaks: list[float] = []
        self._handles: list[Any] = []
        self._before: list[Any] = []

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Stand before and after the steps of optimizers."""
        start = 0
        if len(self._steps) != len(optimizers):
            self._steps = [0] * len(optimizers)
        for number, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step(start, number)))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            start += len(optimizer.param_groups)
        if len(self._peaks) != start:
            self._peaks, self._ceilings = [0.0] * start, []

    def detach(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def tighten(self, factor: float, warmup: int = 0) -> None:
        """Multiply the rates from now on, reached over so many steps; a second time, once more."""
        self.factor *= factor
        self._ceilings = list(self._peaks)
        self._warmup, self._steps = warmup, [0] * len(self._steps)

    def _before_step(self, start: int, number: int) -> Any:
        def hook(optimizer: Optimizer, *_: Any) -> None:
            self._before = [group["lr"] for group in optimizer.param_groups]
            self._steps[number] += 1
            factor = self.factor * min(1.0, self._steps[number] / max(1, self._warmup))
            for index, group in enumerate(optimizer.param_groups, start):
                if not self._ceilings:
                    # A learning rate that is a tensor may lie on the device: reading it would wait.
                    if isinstance(group["lr"], float | int):
                        self._peaks[index] = max(self._peaks[index], float(group["lr"]))
                    continue
                rate, ceiling = group["lr"], self._ceilings[index]
                if isinstance(rate, float | int) and ceiling > 0:
                    rate = min(rate, ceiling)
                group["lr"] = rate * factor

        return hook

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group, before in zip(optimizer.param_groups, self._before, strict=True):
            group["lr"] = before

    def state_dict(self) -> dict[str, Any]:
        """The factor, what the rates may not exceed, and how far the warm-up is."""
        return {
            "factor": self.factor,
            "ceilings": self._ceilings,
            "peaks": self._peaks,
            "warmup": self._warmup,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the rates of a checkpoint."""
        self.factor = float(state["factor"])
        self._ceilings, self._peaks = list(state["ceilings"]), list(state["peaks"])
        self._warmup, self._steps = int(state.get("warmup", 0)), list(state.get("steps", []))


class HealthyCheckpoint:
    """The newest checkpoint of a run that was healthy: one file (a folder, where the strategy writes shards).

    Damage is done before it shows. So a checkpoint is a candidate at first, in a file of its own, and replaces the
    one before only when everything that was read for a while after it was healthy too.

    Args:
        readings: how many healthy readings have to follow.

    Attributes:
        step: the optimizer step that it holds; None where there is none.
    """

    def __init__(self, readings: int) -> None:
        self.readings = readings
        self.step: int | None = None
        self._candidate: int | None = None
        self._followed = 0
        self._path: str | None = None

    def begin(self, folder: str) -> None:
        """Where it goes, the same on every rank; one of an earlier run that lies there does not count."""
        path = os.path.join(folder, CHECKPOINT_NAME)
        if path != self._path or not os.path.exists(path):
            self.step = None
        self._path, self._candidate = path, None

    @property
    def is_waiting(self) -> bool:
        """Whether a candidate is there that has not been confirmed."""
        return self._candidate is not None

    def save(self, trainer: Trainer, step: int) -> None:
        """Write the state of now as the candidate; every rank calls it."""
        trainer.save_checkpoint(self._candidate_path, weights_only=False)
        self._candidate, self._followed = step, 0

    def confirm(self, trainer: Trainer, at_once: bool = False) -> None:
        """One more healthy reading: after enough of them the candidate is it. Every rank calls it."""
        if self._candidate is None:
            return
        self._followed += 1
        if self._followed < self.readings and not at_once:
            return
        assert self._path is not None  # begin
        if trainer.is_global_zero:
            # The one before stays until the new one is whole.
            if os.path.isdir(self._path):
                shutil.rmtree(self._path)
            Path(self._candidate_path).replace(self._path)
        trainer.strategy.barrier("CollapseGuard")
        self.step, self._candidate = self._candidate, None

    def doubt(self, trainer: Trainer) -> None:
        """A reading that was not healthy: what was not confirmed until now never will be."""
        if self._candidate is not None and trainer.is_global_zero:
            _remove(Path(self._candidate_path))
        self._candidate = None

    @property
    def _candidate_path(self) -> str:
        assert self._path is not None  # begin
        return f"{self._path}.new"

    def restore(self, trainer: Trainer) -> bool:
        """Take weights and optimizers' states back; every rank calls it. Whether there was one.

        Learning rates stay where the schedule is; so do the schedule, the step and the data's position.
        """
        if self.step is None or self._path is None:
            return False
        if not trainer.strategy.reduce_boolean_decision(os.path.exists(self._path)):
            return False
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        checkpoint = _load(trainer, self._path)
        trainer.strategy.load_model_state_dict(checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for optimizer, own in zip(trainer.optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate
        return True

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"step": self.step, "path": self._path}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know the file of the run that is resumed; :meth:`begin` looks whether it is there."""
        self.step, self._path = state["step"], state["path"]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _load(trainer: Trainer, path: str) -> dict[str, Any]:
    """A checkpoint that this run wrote, whatever is in it."""
    load = trainer.strategy.load_checkpoint
    if "weights_only" in signature(load).parameters:
        return load(path, weights_only=False)
    return load(path)  # older versions of Lightning have no such argument
