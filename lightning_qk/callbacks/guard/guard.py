"""Callback: early warning of collapse, and what is done about it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_qk.callbacks._event_log import write_events
from lightning_qk.callbacks._ranks import all_or_none, from_zero, reason_of, total
from lightning_qk.callbacks._trainer import is_logged_step, logging_step
from lightning_qk.callbacks.callback import EDITS, JUDGES, Callback, check_lightning
from lightning_qk.callbacks.guard._acting import Acting, Action, remedies_of
from lightning_qk.callbacks.guard._pending import Pending, StepLosses
from lightning_qk.callbacks.guard._watch import COSINE, ReadingSource
from lightning_qk.guard.detector import CollapseDetector, Sensitivity, Verdict
from lightning_qk.guard.reading import Reading
from lightning_qk.loggers.loggers import describe_config, log_scalars


def _for_remedies(hook: str) -> Any:
    """A hook that a guard only passes on."""

    def forward(self: "CollapseGuard", *args: Any, **kwargs: Any) -> None:
        self._remedy.call(hook, *args, *kwargs.values())

    forward.__name__, forward.__doc__ = hook, "For a remedy."
    return forward


class CollapseGuard(Acting):
    r"""Warns before a run collapses, says where and why, and does something about it where asked.

    At its steps it looks at the largest logits and the normalized entropy of every head, the squared norms of
    ``W_QK``, how alike a sequence's tokens are before every attention layer, and the training loss of every step
    since it last looked. Running medians and robust trends of these tell what is about to happen; see
    :class:`~lightning_qk.guard.detectors.Sensitivity` for what counts as an alarm, and
    ``benchmarks/collapse`` for the runs that it was chosen on and for how often it is right on others. An alarm
    is one sentence that names the layer and the head with the numbers. It is given once, and again only after the
    numbers were healthy or a remedy set in.

    Where the trainer has an ``AttentionMonitor`` or a ``QKSpectrumMonitor`` that measures at all of the guard's
    steps, its numbers are read; else the guard measures by itself, on a few query rows, and logs none of it. What
    it decides on is reduced over ranks, so that all of them do the same. It never ends a run unless ``action`` is
    ``"stop"``; a reading that fails is lost, and after three in a row it says so and training goes on unwatched.

    Interventions that it wakes (``action="qk_clip"`` and so on) are checked at the start of the fit, and refuse
    there what they cannot do. Their ``on_train_start`` comes when they wake, and they stay awake. With
    ``lr_factor``
    below 1, optimizers step with that factor of their scheduled rates from the alarm on, and with no more than
    that factor of the largest rate until then. No schedule sees it, and no further alarm adds to it. It is
    the plainest remedy, and where the rate is what went wrong, the one that helps: clipping logits alone leaves
    it.

    With ``rollback=True`` the first alarm takes weights and optimizers' states back to the last healthy
    checkpoint, on all ranks alike: where training started, until there is another. Steps, schedules and the
    position in the data go on. That checkpoint, ``lightning_qk_healthy.ckpt`` in the run's folder, is an ordinary
    one to resume from. A newer one replaces it once a whole window of readings after it was healthy too, since
    damage is done before it shows; until then it lies beside it as ``lightning_qk_healthy.ckpt.new``. With
    ``rollback`` up to two replaced ones stay, as ``lightning_qk_healthy.ckpt.<key>``, while checkpoints of the run
    refer to them. A file is gone back to only if it holds the identity that the run's state has of it.

    Logged keys: ``guard/score``, the largest of the detectors' scores, alarming from 1 on; ``guard/loss``,
    ``guard/logits``, ``guard/entropy``, ``guard/rank`` and ``guard/spectrum``, each detector's; ``guard/fired``,
    how many alarms were given; ``guard/lr_factor`` where ``lr_factor`` is below 1; and ``guard/updates`` with
    ``Sensitivity(update=…)``, which also looks at what ``W_QK`` changes by between two readings. For that the
    guard keeps a copy of all query and key weights in the host's memory, and in checkpoints.

    Args:
        action: ``"warn"``; ``"alert"``, an alert of Weights & Biases, a warning where there is none; ``"stop"``,
            which sets ``trainer.should_stop``; or a remedy: ``"qk_clip"`` (``QKClip()``), ``"locater"``
            (``LocAteR(1.0, form="target")``), a callback or several, which are not also the trainer's own.
        every_n_steps: look at every n-th optimizer step; None follows the trainer's ``log_every_n_steps``.
        sensitivity: what counts as an alarm; None is what was chosen on the benchmark.
        rollback: go back to the last healthy checkpoint, once.
        lr_factor: multiply learning rates at an alarm; 1 leaves them.
        lr_warmup: steps over which the smaller rate is reached from zero after going back.
        checkpoint_every: steps between healthy checkpoints, at least; 0 keeps none. Each costs as much as any
            other checkpoint.
        loss: key in ``trainer.callback_metrics`` to watch in place of what ``training_step`` returns.
        rows: query rows that are sampled where the guard measures by itself.

    Attributes:
        verdicts: the alarms that were given, oldest first.
        rolled_back_to: step of the checkpoint that was gone back to, or None.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: an argument is out of range, or a remedy cannot be done exactly.
    """

    live: ClassVar[tuple[str, ...]] = ("_watch",)

    def __init__(
        self,
        action: Action | Callback | Sequence[Callback] = "warn",
        *,
        every_n_steps: int | None = None,
        sensitivity: Sensitivity | None = None,
        rollback: bool = False,
        lr_factor: float = 1.0,
        lr_warmup: int = 0,
        checkpoint_every: int = 500,
        loss: str | None = None,
        rows: int = 16,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"expected every_n_steps to be at least 1, got {every_n_steps}: pass None to follow the "
                "trainer's log_every_n_steps"
            )
        if not 0 < lr_factor <= 1:
            raise ValueError(
                f"expected lr_factor above 0 and at most 1, got {lr_factor}: 1 leaves the learning rate alone"
            )
        if lr_warmup < 0:
            raise ValueError(
                f"expected lr_warmup of at least 0, got {lr_warmup}: pass over how many steps the smaller rate is "
                "reached"
            )
        if checkpoint_every < 0 or (rollback and not checkpoint_every):
            raise ValueError(
                f"expected checkpoint_every of at least {int(rollback)} with rollback={rollback}, got "
                f"{checkpoint_every}: pass how many steps may lie between checkpoints"
            )
        if rows < 1:
            raise ValueError(f"expected rows of at least 1, got {rows}: pass how many query rows to sample")
        self.action, self._remedies = remedies_of(action)
        self.every_n_steps = every_n_steps
        self.rollback = rollback
        self.lr_factor = lr_factor
        self.lr_warmup = lr_warmup
        self.checkpoint_every = checkpoint_every
        self.loss = loss
        self.rows = rows
        self.detector = CollapseDetector(sensitivity)
        super().__init__()

    def begin(self) -> None:
        """As for a new run."""
        super().begin()
        self.verdicts: list[Verdict] = []
        self._watch = ReadingSource(self.every_n_steps, self.rows, updates=self.sensitivity.watches_updates)
        # What the newest checkpoint has for the next update of the weights.
        self._updates_state: dict[str, Any] | None = None
        self._losses = StepLosses()
        self._pending: Pending | None = None
        self._is_due = False
        self._steps_before = 0
        # What went wrong on this rank since ranks agreed last; readings that failed in a row, the same on all.
        self._trouble: str | None = None
        self._lost = 0
        self._gave_up = False

    @property
    def place(self) -> int:
        """Behind the monitors that it reads, unless its remedies edit."""
        return EDITS if self._remedies else JUDGES

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        names = [type(callback).__name__ for callback in self._remedies]
        return {**super().settings(), "action": " and ".join(names) or self.action}

    @property
    def sensitivity(self) -> Sensitivity:
        """What counts as an alarm."""
        return self.detector.sensitivity

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any work; a fit of another model is a new run."""
        check_lightning(trainer, type(self).__name__)
        for callback in self._remedies:
            if any(callback is other for other in trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError(
                    f"expected a remedy that is the guard's alone, got the trainer's own "
                    f"{type(callback).__name__}: take it out of the trainer's callbacks"
                )
        if stage == "fit":
            if self._rate.optimizers:  # of a fit before that did not end well
                self._try(self._rate.detach, "learning rates could not be left")
            if self.begin_fit(trainer, pl_module):
                self.detector.restart()
        self._remedy.check("setup", trainer, pl_module, stage)
        if stage == "fit":
            self._try(
                lambda: describe_config(trainer, {type(self).__name__: self.settings()}),
                "its settings could not be logged",
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what can be watched; where there is no attention, the loss is."""
        self._trouble, self._lost, self._gave_up, self._cannot_save = None, 0, False, False
        self._said.clear()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        try:
            all_or_none(trainer, lambda: self._watch.begin(trainer, pl_module, callbacks), facts=str)
        except Exception as error:
            self._say_once(
                f"attention cannot be watched, the training loss is ({reason_of(error)}); training goes on"
            )
            self._try(lambda: self._watch.leave(trainer, pl_module), "its hooks could not all be removed")
        self._remedy.check("on_fit_start", trainer, pl_module)
        if self.lr_factor < 1:
            self._try(lambda: self._attach_rate(trainer), "learning rates cannot be multiplied")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state that training starts with, to roll back to; resume a remedy that was awake."""
        updated, state = self._watch.updated, self._updates_state
        if updated is not None and state is not None:
            self._try(lambda: updated.recall(state), "the update since the last reading is not known")
        gone = self._healthy.begin(trainer, self._folder(trainer))
        if gone is not None:
            self._say(
                f"the healthy checkpoint of step {gone} that the resumed run had is gone, or what lies there is "
                "another: only what is kept from here on can be gone back to"
            )
        if self.rollback and self._healthy.step is None and self.rolled_back_to is None:
            self._save(trainer, logging_step(trainer) - 1)
            self._with_files(lambda: self._healthy.confirm(trainer, at_once=True))
        self._remedy.call("on_train_start", trainer, pl_module)
        self._remedy.agree(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Judge the step before, if a monitor measured it after this callback's turn; listen where due."""
        self._judge(trainer, pl_module, is_last_call=True)
        self._try(self._rate.settle, "learning rates cannot be multiplied")
        self._steps_before = trainer.global_step
        self._is_due = self._is_due or is_logged_step(trainer, self.every_n_steps)
        if not self._gave_up:
            self._attempt(lambda: self._watch.begin_batch(trainer, pl_module, batch, batch_idx, self._is_due))
        self._remedy.call("on_train_batch_start", trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """For a remedy that changes gradients."""
        self._try(self._rate.stand_last, "learning rates cannot be multiplied")
        self._remedy.call("on_before_optimizer_step", trainer, pl_module, optimizer)

    on_before_zero_grad = _for_remedies("on_before_zero_grad")
    on_before_backward = _for_remedies("on_before_backward")
    on_after_backward = _for_remedies("on_after_backward")
    on_train_epoch_end = _for_remedies("on_train_epoch_end")
    on_validation_start = _for_remedies("on_validation_start")
    on_validation_batch_start = _for_remedies("on_validation_batch_start")
    on_validation_end = _for_remedies("on_validation_end")
    on_fit_end = _for_remedies("on_fit_end")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the loss; once the optimizer has stepped, read and judge where due."""
        self._remedy.call("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)
        self._remedy.agree(trainer, pl_module)
        if self._gave_up:
            return
        has_stepped = trainer.global_step != self._steps_before
        self._attempt(self._watch.hidden.stop)
        self._attempt(lambda: self._losses.add(trainer, pl_module, outputs, self.loss))
        if has_stepped:
            self._attempt(lambda: self._losses.close_step(trainer, pl_module.device))
        is_read = has_stepped and self._is_due
        if is_read:
            self._is_due = False
            self._pending = self._gather(trainer, pl_module)
        if self._pending is None or self._pending.trouble is None:
            # A collective call where they measure.
            self._attempt(lambda: self._watch.end_batch(trainer, pl_module, outputs, batch, batch_idx))
        else:
            self._attempt(self._watch.skip_batch)
        if is_read:
            self._judge(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step, if a monitor measured it after this callback's turn."""
        self._judge(trainer, pl_module, is_last_call=True, has_ended=True)
        self._remedy.call("on_train_end", trainer, pl_module)
        self._try(self._rate.detach, "learning rates could not be left")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave everything as it was: teardown may not follow."""
        self._remedy.always("on_exception", trainer, pl_module, exception)
        self._leave(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave everything as it was."""
        self._remedy.always("teardown", trainer, pl_module, stage)
        self._leave(trainer, pl_module)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._try(self._rate.detach, "learning rates could not be left")
        self._remember_updates(trainer)  # for a checkpoint after the fit
        quiet = list(self._watch.quiet)
        self._try(lambda: self._watch.leave(trainer, pl_module), "its hooks could not all be removed")
        for monitor in quiet:
            monitor.stop()  # each by itself, whatever became of the others
        if trainer.is_global_zero:
            self._try(self._healthy.sweep, "its files could not be removed")

    def state_dict(self) -> dict[str, Any]:
        """What was seen, what was said, and the remedy's state."""
        self._remember_updates(self.running()[0])
        return {
            "detector": self.detector.state_dict(),
            "account": self.event_log.state_dict(),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "rolled_back_to": self.rolled_back_to,
            "remedy": self._remedy.state_dict(),
            "rate": self._rate.state_dict(),
            "healthy": self._healthy.state_dict(),
            **self._losses.state_dict(),
            "is_due": self._is_due,
            "pending": None if self._pending is None else self._pending.state_dict(),
            "updates": self._updates_state,
        }

    def _remember_updates(self, trainer: Trainer | None) -> None:
        """Keep what a resumed run needs to miss no update, while updates are looked at."""
        updated = self._watch.updated
        if trainer is None or updated is None:
            return
        self._updates_state = None
        step = trainer.global_step

        def remember() -> None:
            self._updates_state = updated.singular_state(step)

        self._try(remember, "the newest update is not remembered")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a checkpoint's run had seen."""
        self.detector.load_state_dict(state_dict["detector"])
        self.verdicts = [Verdict(**state) for state in state_dict["verdicts"]]
        self.event_log.load_state_dict(state_dict.get("account", {}))
        write_events(self.running()[0], self.event_log.kept)
        self.rolled_back_to = state_dict["rolled_back_to"]
        self._remedy.load_state_dict(state_dict["remedy"])
        self._rate.load_state_dict(state_dict["rate"])
        self._healthy.load_state_dict(state_dict["healthy"])
        self._losses.load_state_dict(state_dict)
        self._is_due = bool(state_dict.get("is_due", False))
        self._updates_state = state_dict.get("updates")
        pending = state_dict.get("pending")
        self._pending = None if pending is None else Pending.from_state_dict(pending)

    def _attempt(self, action: Callable[[], object]) -> None:
        """Do a part of a reading; where it fails, the reading is lost, on all ranks."""
        try:
            action()
        except Exception as error:
            self._trouble = self._trouble or reason_of(error)

    def _lose(self, reason: str) -> None:
        """A reading that failed, on all ranks: the next is tried, and after a few in a row no more."""
        self._lost += 1
        if self._lost < _MAX_LOST:
            return
        self._gave_up = True
        self._say(
            f"it stopped watching after {_MAX_LOST} readings in a row that failed ({reason}); training goes on"
        )

    # Reading and judging

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> Pending:
        """What ranks have to add up for a reading, and whether something failed on one; one collective call."""
        hidden = self._watch.hidden
        flat = torch.zeros(1 + 2 * len(hidden.modules), device=pl_module.device)
        try:
            flat[1:] = hidden.take(pl_module.device).flatten()
        except Exception as error:
            self._trouble = self._trouble or reason_of(error)
        flat[0] = float(self._trouble is not None)
        total(trainer, flat)
        found = flat.cpu()
        trouble = None if not found[0] else self._trouble or "another process failed"
        self._trouble = None
        pending = Pending(logging_step(trainer), trouble)
        try:
            sums = found[1:].reshape(-1, 2)
            pending.cosine = sums[:, 0] / sums[:, 1]
            pending.losses = self._losses.take(pl_module.device)
        except Exception as error:
            # Rank zero alone judges.
            pending.trouble = pending.trouble or reason_of(error)
        return pending

    def _judge(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        is_last_call: bool = False,
        has_ended: bool = False,
    ) -> None:
        """Judge the pending reading, if there is one, on rank zero for all ranks (collective).

        Args:
            trainer: the trainer.
            pl_module: its module.
            is_last_call: judge what is there; else wait where the trainer's monitors have not measured yet.
            has_ended: training has.
        """
        pending = self._pending
        if pending is None or self._gave_up:
            self._pending = None
            return
        answer: tuple[str, Any] = ("", None)
        if trainer.is_global_zero:
            try:
                answer = self._answer(trainer, pl_module, pending, is_last_call)
            except Exception as error:
                answer = "failed", reason_of(error)
        kind, found = from_zero(trainer, answer)
        if kind == "wait":
            return
        self._pending = None
        if kind == "failed":
            self._lose(found)
            return
        self._lost = 0
        verdict: Verdict = found
        if verdict.fired:
            self.verdicts.append(verdict)
            self._act(trainer, pl_module, verdict)
        # Before the checkpoint, which has this step in its state too.
        self._log(trainer, pl_module, verdict, has_ended)
        self._keep(trainer, verdict.step, verdict.is_healthy)

    def _answer(
        self, trainer: Trainer, pl_module: LightningModule, pending: Pending, is_last_call: bool
    ) -> tuple[str, Any]:
        watch = self._watch
        if pending.trouble is not None:
            return "failed", pending.trouble
        values, places = watch.read(trainer, pl_module, pending.step)
        pending.values |= values
        pending.places |= places
        if not is_last_call and not watch.is_ready(pending.step):
            return "wait", None
        if pending.cosine is not None:
            pending.values[COSINE] = watch.of_trained(trainer, pl_module, pending.cosine, watch.hidden.places)
            pending.places["hidden"] = watch.hidden.places
        reading = Reading(pending.step, pending.losses, dict(pending.values), dict(pending.places))
        return "verdict", self.detector.observe(reading)

    def _log(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict, has_ended: bool) -> None:
        step = verdict.step
        scalars = {
            "guard/score": verdict.score if math.isfinite(verdict.score) else 1e3,
            "guard/fired": float(len(self.verdicts)),
            **{f"guard/{name}": value for name, value in verdict.scores.items()},
        }
        if self.lr_factor < 1:
            scalars["guard/lr_factor"] = self._rate.factor
        drawn = ("guard/score", "guard/lr_factor")

        def share() -> None:
            pl_module.log_dict(scalars, logger=False, on_step=True, on_epoch=False)

        for action in (
            lambda: self.event_log.add_points(
                step, {name: value for name, value in scalars.items() if name in drawn}
            ),
            lambda: log_scalars(trainer, scalars, step),
            # Lightning takes nothing more once training has ended.
            *(() if has_ended else (share,)),
        ):
            self._try(action, "its numbers could not be logged")


_MAX_LOST = 3
