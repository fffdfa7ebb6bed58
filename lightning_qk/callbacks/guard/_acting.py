"""What a guard does when it has fired, and the files that it keeps for that."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer

from lightning_qk._packages import either
from lightning_qk.callbacks._event_log import EventLog, write_events
from lightning_qk.callbacks._ranks import all_or_none, reason_of
from lightning_qk.callbacks._trainer import logging_step, say
from lightning_qk.callbacks.callback import Callback
from lightning_qk.callbacks.guard._healthy import CHECKPOINT_NAME, HealthyCheckpoint
from lightning_qk.callbacks.guard._rate import RateLimit
from lightning_qk.callbacks.guard._remedy import Dormant
from lightning_qk.callbacks.guard._watch import ReadingSource
from lightning_qk.callbacks.interventions.locater import LocAteR
from lightning_qk.callbacks.interventions.qk_clip import QKClip
from lightning_qk.callbacks.run_directory import run_directory
from lightning_qk.guard.detector import CollapseDetector, Verdict
from lightning_qk.loggers.loggers import log_alert
from lightning_qk.record.events import Event
from lightning_qk.record.history import RunRecord

Action = Literal["warn", "alert", "stop", "locater", "qk_clip"]
# For isinstance, of either package.
_AnyCallback = either("Callback")


def remedies_of(action: Any) -> tuple[str, list[Any]]:
    """What to do, and the callbacks to wake."""
    if action == "locater":
        return "remedy", [LocAteR(1.0, form="target")]
    if action == "qk_clip":
        return "remedy", [QKClip()]
    if isinstance(action, str) and action in get_args(Action):
        return action, []
    callbacks = [action] if isinstance(action, _AnyCallback) else action
    if not isinstance(callbacks, Sequence | set) or not all(
        isinstance(one, _AnyCallback) for one in callbacks
    ):
        raise ValueError(
            f"expected action to be one of {', '.join(get_args(Action))}, or callbacks such as QKClip(), got "
            f"{action!r}: correct it"
        )
    return "remedy", list(callbacks)


class Acting(Callback):
    """The part of a guard that acts: remedies, rates, the last healthy checkpoint. Nothing here raises."""

    action: str
    _remedies: list[Any]
    _watch: ReadingSource
    rollback: bool
    lr_factor: float
    lr_warmup: int
    checkpoint_every: int
    detector: CollapseDetector

    def begin(self) -> None:
        """As for a new run."""
        super().begin()
        self.rolled_back_to: int | None = None
        self.event_log = EventLog()
        self._remedy = Dormant(self._remedies, self._say_once)
        self._rate = RateLimit()
        self._healthy = HealthyCheckpoint(self.detector.sensitivity.window, keeps_replaced=self.rollback)
        self._cannot_save = False
        self._said: set[str] = set()

    @property
    def remedies(self) -> list[Any]:
        """The callbacks that are switched on when the guard fires."""
        return list(self._remedies)

    def contribute(self, record: RunRecord) -> None:
        """Add what the remedies did, and the alarms."""
        for callback in self._remedies:
            if isinstance(callback, Callback):
                callback.contribute(record)
        self.event_log.contribute(record)

    def _attach_rate(self, trainer: Trainer) -> None:
        """On all ranks or on none: weights would come to differ with the rates."""
        try:
            all_or_none(trainer, lambda: self._rate.attach(trainer.optimizers))
        except Exception:
            self._rate.detach()
            raise

    def _folder(self, trainer: Trainer) -> str:
        try:
            return run_directory(trainer)
        except Exception as error:
            self._say_once(
                f"the run's folder is not known ({reason_of(error)}): {trainer.default_root_dir} is taken"
            )
            return str(trainer.default_root_dir)

    def _try(self, action: Callable[[], object], otherwise: str) -> None:
        """Do something that is no part of a reading; say once where it fails."""
        try:
            action()
        except Exception as error:
            self._say_once(f"{otherwise} ({reason_of(error)}); training goes on", otherwise)

    def _keep(self, trainer: Trainer, step: int, is_healthy: bool) -> None:
        """Confirm or drop the checkpoint that waits for it; write the next where due."""
        if not is_healthy:
            self._healthy.doubt(trainer)
            return
        self._with_files(lambda: self._healthy.confirm(trainer))
        last = self._healthy.step
        if (
            self.checkpoint_every > 0
            and not self._healthy.is_waiting
            and (last is None or step - last >= self.checkpoint_every)
        ):
            self._save(trainer, step)

    def _save(self, trainer: Trainer, step: int) -> None:
        if not self._cannot_save:
            self._with_files(lambda: self._healthy.save(trainer, step))

    def _with_files(self, action: Callable[[], object]) -> None:
        """What fails here fails on all ranks; a full disk is no reason to end a run."""
        try:
            action()
        except Exception as error:
            if not self._cannot_save:
                self._cannot_save = True
                self._say(f"it keeps no more checkpoints ({reason_of(error)}); training goes on")

    def _act(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        done = []
        reason = self._watch.with_labels(verdict.reason)
        if self.action == "stop":
            trainer.should_stop = True
            done.append("training is stopped")
        if self._remedy.callbacks or self.lr_factor < 1 or self.rollback:
            done += self._help(trainer, pl_module)
        sentence = f"step {verdict.step}: {reason}"
        if done:
            sentence += f"; {', '.join(done)}"
        said = f"CollapseGuard: {reason}{''.join(f'; {one}' for one in done)}"
        alarm = self._event(
            "alarm", said, verdict.step, where=self._where(verdict), value=verdict.score, threshold=1.0
        )
        self.event_log.add_event(alarm)
        write_events(trainer, [alarm, *(self._event("remedy", one, verdict.step) for one in done)])
        try:
            is_sent = self.action == "alert" and log_alert(trainer, "CollapseGuard", sentence)
        except Exception:
            is_sent = False
        if not is_sent:
            say(f"{type(self).__name__}: {sentence}")

    def _where(self, verdict: Verdict) -> str:
        """The layer as log keys name it, and the head."""
        layer = self._watch.labels.get(verdict.layer, verdict.layer)
        return layer if verdict.head is None else f"{layer}/head_{verdict.head:02d}"

    def _help(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Roll back, lower the rate and wake the remedy; what was done, in words."""
        done = []
        went_back = self.rollback and self.rolled_back_to is None and self._restored(trainer)
        if went_back:
            self.rolled_back_to = step = self._healthy.step
            where = "where training started" if step is None or step < 0 else f"at step {step}"
            done.append(f"weights and optimizer are back {where}")
        # Once: measured on the benchmark, factors upon factors left runs without a rate to learn with.
        if self.lr_factor < 1 and self._rate.factor == 1 and self._tightened(trainer, went_back):
            done.append(f"the learning rate is multiplied by {self._rate.factor:.3g}")
        if self._remedy.wake(trainer, pl_module):
            names = [type(callback).__name__ for callback in self._remedy.awake]
            done.append(f"{' and '.join(names)} set in")
        if done:
            self.detector.restart()
            self._watch.forget_weights()  # what they are next is no update of training's
        return done

    def _tightened(self, trainer: Trainer, went_back: bool) -> bool:
        """On all ranks or on none."""
        if not self._rate.optimizers:
            return False  # they could not be attached to
        before: dict[str, Any] | None = None

        def tighten() -> None:
            nonlocal before
            before = self._rate.state_dict()
            self._rate.tighten(self.lr_factor, self.lr_warmup if went_back else 0)

        try:
            all_or_none(trainer, tighten)
            return True
        except Exception as error:
            if before is not None:
                self._rate.load_state_dict(before)
            self._say_once(f"learning rates cannot be multiplied ({reason_of(error)}); training goes on")
            return False

    def _restored(self, trainer: Trainer) -> bool:
        try:
            return self._healthy.restore(trainer)
        except Exception as error:
            self._say(
                f"it could not go back to {CHECKPOINT_NAME} ({reason_of(error)}); training goes on from where it "
                "is"
            )
            return False

    def _say_once(self, sentence: str, kind: str | None = None) -> None:
        if (kind or sentence) not in self._said:
            self._said.add(kind or sentence)
            self._say(sentence)

    def _say(self, sentence: str) -> None:
        say(f"{type(self).__name__}: {sentence}")
        trainer, _ = self.running()
        if trainer is not None:
            write_events(trainer, [self._event("note", sentence, logging_step(trainer))])

    def _event(self, kind: str, sentence: str, step: int, **facts: Any) -> Event:
        return Event(step, kind, type(self).__name__, sentence, **facts)
