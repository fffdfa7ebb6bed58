"""What a guard does when it has fired: a dormant callback that wakes, a smaller learning rate, a step back."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._ranks import agree, is_distributed, reason_of, total
from lightning_qk.callbacks.interventions._base import Intervention


class Dormant:
    """Callbacks that are checked at the start of a fit and do nothing until they are woken.

    Their ``setup`` and ``on_fit_start`` run with the guard's, so that they refuse what they cannot do before
    any work. ``on_train_start`` comes when they wake: what they take as the start is that moment. From then on one
    that raises is left out, on all ranks, and training goes on. Where it raises on one rank while the others wait
    for it to agree, that is done in its place.

    Args:
        callbacks: the interventions.
        say: is given a sentence when one fails.
    """

    def __init__(self, callbacks: Sequence[Any], say: Callable[[str], None] = lambda sentence: None) -> None:
        self.callbacks = list(callbacks)
        self.say = say
        self.is_awake = False
        self._failed: dict[int, Exception] = {}
        self._is_out: set[int] = set()
        self._steps_before = 0

    def check(self, hook: str, *args: Any) -> None:
        """Call a hook of the start of a fit, in which they may refuse."""
        for callback in self.callbacks:
            getattr(callback, hook)(*args)

    def always(self, hook: str, *args: Any) -> None:
        """Call a hook, awake or not."""
        for index, callback in enumerate(self.callbacks):
            if index in self._is_out:
                continue
            agreed = getattr(callback, "agreements", 0)
            if index not in self._failed:
                try:
                    getattr(callback, hook)(*args)
                    continue
                except Exception as error:
                    self._failed[index] = error
            if isinstance(callback, Intervention) and callback.agreements == agreed:
                self._agree_for(callback, hook, args[0], self._failed[index])

    def _agree_for(self, callback: Intervention, hook: str, trainer: Trainer, error: Exception) -> None:
        """Where other ranks have come to agree with a callback that failed here."""
        if callback.agrees_in(hook, has_stepped=trainer.global_step != self._steps_before):
            with suppress(Exception):
                agree(trainer, error)

    def call(self, hook: str, *args: Any) -> None:
        """Call a hook where awake."""
        if hook == "on_train_batch_start":
            self._steps_before = args[0].global_step
        if self.is_awake:
            self.always(hook, *args)

    def agree(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out on all ranks what failed on one; a collective call while awake."""
        if not self.is_awake or not self.callbacks:
            return
        failed = [float(index in self._failed) for index in range(len(self.callbacks))]
        if is_distributed(trainer):
            failed = total(trainer, torch.tensor(failed, device=pl_module.device)).tolist()
        for index, count in enumerate(failed):
            if count and index not in self._is_out:
                self._is_out.add(index)
                error = self._failed.get(index)
                reason = "another process failed" if error is None else reason_of(error)
                self.say(f"{type(self.callbacks[index]).__name__} is left out from here on ({reason})")
                self._take_away(index, trainer, pl_module)
        self._failed.clear()

    def _take_away(self, index: int, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self.callbacks[index].teardown(trainer, pl_module, "fit")
        except Exception as error:
            self.say(f"{type(self.callbacks[index]).__name__} could not be taken away ({reason_of(error)})")

    def wake(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Begin; whether there was something to begin. Every rank calls it."""
        if self.is_awake or not self.callbacks:
            return False
        self.is_awake = True
        self.always("on_train_start", trainer, pl_module)
        self.agree(trainer, pl_module)
        return len(self._is_out) < len(self.callbacks)

    @property
    def awake(self) -> list[Any]:
        """Those that act."""
        return [
            one for index, one in enumerate(self.callbacks) if self.is_awake and index not in self._is_out
        ]

    def state_dict(self) -> dict[str, Any]:
        """Whether awake, and the callbacks' own states."""
        states: list[Any] = []
        for callback in self.callbacks:
            try:
                own = callback.kept() if isinstance(callback, Intervention) else callback.state_dict()
                states.append(own)
            except Exception as error:  # noqa: PERF203 (once a checkpoint)
                states.append({})
                self.say(f"the state of {type(callback).__name__} is not saved ({reason_of(error)})")
        return {"is_awake": self.is_awake, "states": states, "is_out": sorted(self._is_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as in a checkpoint, where it has the same callbacks."""
        if len(state["states"]) == len(self.callbacks):
            self.is_awake = bool(state["is_awake"])
            self._is_out = set(state.get("is_out", ()))
            for callback, own in zip(self.callbacks, state["states"], strict=True):
                if own and isinstance(callback, Intervention):
                    callback.go_on(own)
                elif own:
                    callback.load_state_dict(own)
