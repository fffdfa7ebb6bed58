"""Callback: early warning of collapse, and what is done about it."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_qk.callbacks._account import Account
from lightning_qk.callbacks._remedy import CHECKPOINT_NAME, Dormant, HealthyCheckpoint, RateLimit
from lightning_qk.callbacks._trainer import check_lightning, is_logged_step, logging_step, run_directory
from lightning_qk.callbacks._watch import COSINE, Watch
from lightning_qk.callbacks.locater import LocAteR
from lightning_qk.callbacks.qk_clip import QKClip
from lightning_qk.guard.detector import CollapseDetector, Sensitivity, Verdict
from lightning_qk.guard.reading import Reading
from lightning_qk.logging.loggers import describe_config, log_alert, log_scalars

Action = Literal["warn", "alert", "stop", "locater", "qk_clip"]


class CollapseGuard(Callback):
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
    ``"stop"``; should measuring fail, it says so once and training goes on unwatched.

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
    damage is done before it shows; until then it lies beside it as ``lightning_qk_healthy.ckpt.new``.

    Logged keys: ``guard/score``, the largest of the detectors' scores, alarming from 1 on; ``guard/loss``,
    ``guard/logits``, ``guard/entropy``, ``guard/rank`` and ``guard/spectrum``, each detector's; ``guard/fired``,
    how
    many alarms were given; and ``guard/lr_factor`` where ``lr_factor`` is below 1.

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
        ValueError: an argument is out of range, the module holds no transformer attention, or a remedy cannot be
            done exactly.
    """

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
        self.action, remedies = _remedies(action)
        self.every_n_steps = every_n_steps
        self.rollback = rollback
        self.lr_factor = lr_factor
        self.lr_warmup = lr_warmup
        self.checkpoint_every = checkpoint_every
        self.loss = loss
        self.rows = rows
        self.detector = CollapseDetector(sensitivity)
        self.verdicts: list[Verdict] = []
        self.rolled_back_to: int | None = None
        self.account = Account()
        self._remedy = Dormant(remedies)
        self._rate = RateLimit()
        self._healthy = HealthyCheckpoint(self.detector.sensitivity.window)
        self._watch: Watch | None = None
        self._losses: list[Tensor] = []
        self._micro: list[Tensor] = []
        self._pending: int | None = None
        self._is_due = False
        self._steps_before = 0
        self._gave_up = False
        self._cannot_save = False

    @property
    def remedies(self) -> list[Callback]:
        """The callbacks that are switched on when the guard fires."""
        return list(self._remedy.callbacks)

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any work."""
        check_lightning(trainer, type(self).__name__)
        for callback in self._remedy.callbacks:
            if any(callback is other for other in trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError(
                    f"expected a remedy that is the guard's alone, got the trainer's own "
                    f"{type(callback).__name__}: take it out of the trainer's callbacks"
                )
        self._remedy.always("setup", trainer, pl_module, stage)
        if stage == "fit":
            settings = ("every_n_steps", "rollback", "lr_factor", "lr_warmup", "checkpoint_every", "rows")
            names = [type(callback).__name__ for callback in self._remedy.callbacks]
            describe_config(
                trainer,
                {
                    type(self).__name__: {
                        "action": " and ".join(names) or self.action,
                        **{name: getattr(self, name) for name in settings},
                    }
                },
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what can be watched; raise here, before any work, where there is nothing."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._watch = Watch(trainer, pl_module, self.every_n_steps, self.rows, callbacks)
        self._remedy.always("on_fit_start", trainer, pl_module)
        self._healthy.begin(run_directory(trainer))
        self._rate.attach(trainer.optimizers)
        self._losses, self._micro, self._pending = [], [], None
        self._is_due = self._gave_up = self._cannot_save = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where training starts is what there is to go back to at first; a remedy that was awake goes on."""
        if self.rollback and self._healthy.step is None and self.rolled_back_to is None:
            self._save(trainer, logging_step(trainer) - 1)
            self._healthy.confirm(trainer, at_once=True)
        self._remedy.call("on_train_start", trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Judge the step before, if a monitor measured it after this callback's turn; listen where due."""
        self._judge_pending(trainer, pl_module)
        self._steps_before = trainer.global_step
        self._is_due = self._is_due or is_logged_step(trainer, self.every_n_steps)
        if self._watch is not None:
            for monitor in self._watch.quiet:
                monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if self._is_due:
                self._watch.hidden.listen(batch)
        self._remedy.call("on_train_batch_start", trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """For a remedy that changes gradients."""
        self._remedy.call("on_before_optimizer_step", trainer, pl_module, optimizer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """For a remedy."""
        self._remedy.call("on_before_zero_grad", trainer, pl_module, optimizer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """For a remedy."""
        self._remedy.call("on_before_backward", trainer, pl_module, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For a remedy."""
        self._remedy.call("on_after_backward", trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the loss; once the optimizer has stepped, read and judge where due."""
        self._remedy.call("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)
        if self._watch is None:
            return
        for monitor in self._watch.quiet:
            monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._watch.hidden.stop()
        self._hear_loss(trainer, pl_module, outputs)
        if trainer.global_step == self._steps_before:
            return
        if self._micro:
            self._losses.append(torch.stack(self._micro).mean())
            self._micro = []
        if self._is_due:
            self._is_due = False
            self._pending = logging_step(trainer)
            if self._watch.is_ready(self._pending):
                self._judge_pending(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For a remedy."""
        self._remedy.call("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For a remedy."""
        self._remedy.call("on_train_end", trainer, pl_module)
        self._rate.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave everything as it was: teardown may not follow."""
        self._remedy.always("on_exception", trainer, pl_module, exception)
        self._leave(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave everything as it was."""
        self._remedy.always("teardown", trainer, pl_module, stage)
        self._leave(trainer, pl_module)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rate.detach()
        if self._watch is not None:
            self._watch.hidden.stop()
            for monitor in self._watch.quiet:
                monitor.teardown(trainer, pl_module, "fit")
            self._watch = None

    def state_dict(self) -> dict[str, Any]:
        """What was seen, what was said, and the remedy's state."""
        return {
            "detector": self.detector.state_dict(),
            "account": self.account.state_dict(),
            "verdicts": [verdict.state_dict() for verdict in self.verdicts],
            "rolled_back_to": self.rolled_back_to,
            "remedy": self._remedy.state_dict(),
            "rate": self._rate.state_dict(),
            "healthy": self._healthy.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a checkpoint's run had seen."""
        self.detector.load_state_dict(state_dict["detector"])
        self.verdicts = [Verdict.from_state_dict(state) for state in state_dict["verdicts"]]
        self.account.load_state_dict(state_dict.get("account", {}))
        self.rolled_back_to = state_dict["rolled_back_to"]
        self._remedy.load_state_dict(state_dict["remedy"])
        self._rate.load_state_dict(state_dict["rate"])
        self._healthy.load_state_dict(state_dict["healthy"])

    # Reading and judging

    def _hear_loss(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        if self.loss is not None:
            value = trainer.callback_metrics.get(self.loss)
        else:
            value = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if isinstance(value, Tensor) and pl_module.automatic_optimization:
                # Lightning has divided it by the number of micro-batches.
                value = value * trainer.accumulate_grad_batches
        if isinstance(value, Tensor) and value.numel() == 1:
            self._micro.append(value.detach().float().reshape(()))

    def _judge_pending(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step, self._pending = self._pending, None
        if step is None or self._gave_up:
            return
        try:
            verdict = self.detector.observe(self._read(trainer, pl_module, step))
        except Exception as error:
            self._gave_up = True
            self._say(f"it stopped watching ({type(error).__name__}: {error}); training goes on")
            return
        # What is read is reduced over ranks already; this makes it certain that all of them do the same.
        fired = trainer.strategy.reduce_boolean_decision(verdict.fired, all=False)
        if fired:
            self.verdicts.append(verdict)
            self._act(trainer, pl_module, verdict)
        self._keep(trainer, step, verdict.is_healthy)
        self._log(trainer, pl_module, verdict, step)

    def _read(self, trainer: Trainer, pl_module: LightningModule, step: int) -> Reading:
        assert self._watch is not None  # on_fit_start
        values, places = self._watch.read(step)
        values[COSINE] = self._watch.hidden.compute(trainer, pl_module.device)
        places["hidden"] = self._watch.hidden.places
        return Reading(step, self._mean_losses(trainer, pl_module), values, places)

    def _mean_losses(self, trainer: Trainer, pl_module: LightningModule) -> list[float]:
        """Losses of the steps since the last reading, means over ranks; a collective call."""
        losses, self._losses = self._losses, []
        if not losses:
            return []
        flat = torch.stack([loss.to(pl_module.device) for loss in losses])
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
            flat /= trainer.world_size
        return flat.tolist()

    def _keep(self, trainer: Trainer, step: int, is_healthy: bool) -> None:
        """Confirm or drop the checkpoint that waits for it; write the next where due."""
        if not is_healthy:
            self._healthy.doubt(trainer)
            return
        self._healthy.confirm(trainer)
        last = self._healthy.step
        if (
            self.checkpoint_every > 0
            and not self._healthy.is_waiting
            and (last is None or step - last >= self.checkpoint_every)
        ):
            self._save(trainer, step)

    def _save(self, trainer: Trainer, step: int) -> None:
        """A full disk is no reason to end a run."""
        if self._cannot_save:
            return
        try:
            self._healthy.save(trainer, step)
        except Exception as error:
            self._cannot_save = True
            self._say(f"it keeps no more checkpoints ({type(error).__name__}: {error}); training goes on")

    # Acting

    def _act(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict) -> None:
        done = []
        if self.action == "stop":
            trainer.should_stop = True
            done.append("training is stopped")
        if self._remedy.callbacks or self.lr_factor < 1 or self.rollback:
            done += self._help(trainer, pl_module)
        sentence = f"step {verdict.step}: {verdict.reason}"
        if done:
            sentence += f"; {', '.join(done)}"
        self.account.tell(
            verdict.step, f"CollapseGuard: {verdict.reason}{''.join(f'; {one}' for one in done)}"
        )
        if self.action != "alert" or not log_alert(trainer, "CollapseGuard", sentence):
            self._say(sentence)

    def _help(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Roll back, lower the rate and wake the remedy; what was done, in words."""
        done = []
        went_back = self.rollback and self.rolled_back_to is None and self._restored(trainer)
        if went_back:
            self.rolled_back_to = step = self._healthy.step
            assert step is not None  # there was one to restore
            where = f"at step {step}" if step >= 0 else "where training started"
            done.append(f"weights and optimizer are back {where}")
        # Once: measured on the benchmark, factors upon factors left runs without a rate to learn with.
        if self.lr_factor < 1 and self._rate.factor == 1:
            self._rate.tighten(self.lr_factor, self.lr_warmup if went_back else 0)
            done.append(f"the learning rate is multiplied by {self._rate.factor:.3g}")
        if self._remedy.wake(trainer, pl_module):
            names = [type(callback).__name__ for callback in self._remedy.callbacks]
            done.append(f"{' and '.join(names)} set in")
        if done:
            self.detector.restart()
        return done

    def _restored(self, trainer: Trainer) -> bool:
        try:
            return self._healthy.restore(trainer)
        except Exception as error:
            self._say(
                f"it could not go back to {CHECKPOINT_NAME} ({type(error).__name__}: {error}); training goes on "
                "from where it is"
            )
            return False

    def _log(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict, step: int) -> None:
        scalars = {
            "guard/score": verdict.score if math.isfinite(verdict.score) else 1e3,
            "guard/fired": float(len(self.verdicts)),
            **{f"guard/{name}": value for name, value in verdict.scores.items()},
        }
        if self.lr_factor < 1:
            scalars["guard/lr_factor"] = self._rate.factor
        pl_module.log_dict(scalars, logger=False, on_step=True, on_epoch=False)
        drawn = ("guard/score", "guard/lr_factor")
        self.account.draw(step, {name: value for name, value in scalars.items() if name in drawn})
        log_scalars(trainer, scalars, step)

    def _say(self, sentence: str) -> None:
        rank_zero_warn(f"{type(self).__name__}: {sentence}")


def _remedies(action: Any) -> tuple[str, list[Callback]]:
    """What to do, and the callbacks to wake."""
    if action == "locater":
        return "remedy", [LocAteR(1.0, form="target")]
    if action == "qk_clip":
        return "remedy", [QKClip()]
    if isinstance(action, str) and action in get_args(Action):
        return action, []
    callbacks = [action] if isinstance(action, Callback) else action
    if isinstance(callbacks, str) or not all(isinstance(callback, Callback) for callback in callbacks):
        raise ValueError(
            f"expected action to be one of {', '.join(get_args(Action))}, or callbacks such as QKClip(), got "
            f"{action!r}: correct it"
        )
    return "remedy", list(callbacks)
