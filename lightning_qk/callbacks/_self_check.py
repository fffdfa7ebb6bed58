"""One check of a fit's model, shared by all callbacks: is what is read of it what its attention computes with?"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._guarded import GuardedHooks
from lightning_qk.callbacks._output import inform
from lightning_qk.callbacks._trainer import describe_error, say
from lightning_qk.callbacks.callback import Callback
from lightning_qk.heads.facts import forget_changed
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.record.history import RunRecord
from lightning_qk.verification import SelfCheck as Check
from lightning_qk.verification import Status, Verified, summary

# Training batches that are looked at until every layer was called: networks may take turns.
_BATCHES = 4
# By how much one process may know more than another: the worst word counts.
_RANKING = (Status.UNCHECKED, Status.VERIFIED, Status.REREAD, Status.DIFFERS)


class SelfCheck(GuardedHooks, Callback):
    """Checks what was read of a model's layers while its first batches run; one for all callbacks of a trainer.

    It comes before all others, so that what it finds is known when they act. Layers whose queries and keys are not
    ``W x + b`` as read are left out by every reader of the model, and those that were read in another way are read
    so from then on. Callbacks learn of it by their ``layers_settled``, those that change weights by
    ``leave_alone``.

    Attributes:
        verdicts: qualified layer name → what was found, the same on every process; empty until the first batch.
        lines: what was found in words, for the log and the report.
    """

    def __init__(self) -> None:
        super().__init__()
        self.verdicts: dict[str, Verified] = {}
        self.lines: list[str] = []
        self._check: Check | None = None
        self._batches = 0
        # The same on every process: they decide on collective calls.
        self._is_open, self._is_over = False, True
        self._is_settled = True

    @property
    def is_awaited(self) -> bool:
        """Whether a fit has begun and nothing is known of its layers yet."""
        return not self._is_settled

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        self.idle = False
        self.verdicts, self.lines = {}, []
        self._batches, self._is_open, self._is_over = 0, False, False
        self._check, self._is_settled = None, False
        try:
            reader = ProjectionReader(pl_module, root=trainer.strategy.model, allow_empty=True)
            if reader.layers or reader.unread:
                self._check = Check(pl_module, reader)
        except ValueError:
            pass  # no attention: the monitors say so
        except Exception as error:
            self._give_up(error)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the forwards of the batch, where layers are left that were not called."""
        if self._is_over:
            return
        self._is_open = True
        if self._check is not None:
            try:
                self._check.install()
            except Exception as error:
                self._give_up(error)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Say what is known before anybody acts on it."""
        # By hand, processes may step at different times: they agree at the end of the batch.
        if self._is_open and pl_module.automatic_optimization:
            self._settle(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop to look, and say what was found."""
        if not self._is_open:
            return
        self._is_open, self._batches = False, self._batches + 1
        self._settle(trainer, pl_module)
        self._remove()
        missing = [name for name, verdict in self.verdicts.items() if verdict.status is Status.UNCHECKED]
        self._is_over = self._is_over or self._batches >= _BATCHES or not missing
        self._say()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was: teardown may not follow."""
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model, and the trainer's callbacks, as they were."""
        self._remove()
        self._check = None
        trainer.callbacks = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]

    def contribute(self, record: RunRecord) -> None:
        """Add what was found, in one line."""
        if self.lines:
            record.info["Weights as read"] = self.lines[0]

    def hook_failed(self, hook: str, error: Exception) -> None:
        """Go on without a check."""
        self._give_up(error)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree with the other processes on what was found, and let readers and callbacks know; collective."""
        own: dict[str, Verified] = {}
        if self._check is not None:
            try:
                own = self._check.conclude()
            except Exception as error:
                self._give_up(error)
        agreed = _agreed(trainer, own)
        if agreed is None:
            self._is_over, agreed = True, {}
        before, self.verdicts = self.verdicts, agreed
        if self._is_settled and _acted_on(agreed) == _acted_on(before):
            return
        self._is_settled = True
        if self._check is not None:
            try:
                self._check.settle(agreed)
            except Exception as error:
                # The callbacks get the verdicts all the same, as on the other processes.
                self._give_up(error)
        wrong = {name: own.reason for name, own in agreed.items() if own.status is Status.DIFFERS}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            _tell(callback, trainer, pl_module, wrong)

    def _say(self) -> None:
        lines = summary(self.verdicts, shorten) if self.verdicts else []
        for line in lines:
            if line not in self.lines:
                tell = say if "left out" in line else inform
                tell(f"lightning-qk: {line}")
        self.lines = lines

    def _remove(self) -> None:
        if self._check is not None:
            self._check.remove()

    def _give_up(self, error: Exception) -> None:
        self._remove()
        self._check = None
        say(
            "lightning-qk: what was read of the attention layers is not verified "
            f"({describe_error(error)}); training goes on"
        )


def _acted_on(verdicts: Mapping[str, Verified]) -> dict[str, tuple[Status, bool | None]]:
    """What is the same on every process, and all that decides how layers are read."""
    return {name: (verdict.status, verdict.self_attention) for name, verdict in verdicts.items()}


def _tell(callback: Any, trainer: Trainer, pl_module: LightningModule, wrong: Mapping[str, str]) -> None:
    """Let one callback know which layers are read wrong, and that what is read of all is settled."""
    try:
        if wrong and hasattr(callback, "leave_alone"):
            callback.leave_alone(wrong)
        if hasattr(callback, "layers_settled"):
            callback.layers_settled(trainer, pl_module)
    except Exception as error:
        if not isinstance(callback, GuardedHooks):
            raise
        callback.hook_failed("layers_settled", error)


def add_self_check(trainer: Trainer) -> None:
    """Put a self-check before all callbacks of a trainer, once; to be called in ``setup`` of a fit.

    What an earlier fit has found of layers that have changed since is forgotten.
    """
    forget_changed(trainer.lightning_module)
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    if not any(isinstance(callback, SelfCheck) for callback in callbacks):
        trainer.callbacks = [SelfCheck(), *callbacks]  # type: ignore[attr-defined]


def self_check_of(trainer: Trainer) -> SelfCheck | None:
    """The self-check of a trainer's fit, or None."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, SelfCheck)), None)


def _agreed(trainer: Trainer, own: dict[str, Verified]) -> dict[str, Verified] | None:
    """What all processes can act on: a layer that differs on one is left out on all; None where they cannot agree.

    A collective call. Layers that were read again on some processes and not called on others are left out too,
    since the others do not know how to read them.
    """
    distributed = torch.distributed
    if trainer.world_size == 1 or not (distributed.is_available() and distributed.is_initialized()):
        return own
    known = {
        name: (_RANKING.index(status), of_itself) for name, (status, of_itself) in _acted_on(own).items()
    }
    every: list[dict[str, tuple[int, bool | None]]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(every, known)
    if any(other.keys() != known.keys() for other in every):
        return None
    agreed = {}
    for name, verdict in own.items():
        words = [_RANKING[other[name][0]] for other in every]
        worst = max(words, key=_RANKING.index)
        if worst is Status.REREAD and any(word is not Status.REREAD for word in words):
            reason = "it has to be read by running it as it was called, and was not called on every process"
            verdict = Verified(Status.DIFFERS, verdict.query, verdict.key, reason)
        elif worst is Status.DIFFERS and verdict.status is not Status.DIFFERS:
            reason = "on another process its queries or keys are not W x + b as read from its weights"
            verdict = Verified(Status.DIFFERS, verdict.query, verdict.key, reason)
        elif worst is Status.VERIFIED and verdict.status is Status.UNCHECKED:
            verdict = Verified(Status.VERIFIED, verdict.query, verdict.key)
        seen = [other[name][1] for other in every if other[name][1] is not None]
        agreed[name] = verdict._replace(self_attention=all(seen) if seen else None)
    return agreed
