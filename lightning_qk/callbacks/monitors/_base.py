"""What the monitors share: when to measure, how to log, what to remember, the report at the end."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypedDict, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._layers import Patterns, kept_patterns
from lightning_qk.callbacks._loss import LossCurve, batch_loss
from lightning_qk.callbacks._output import log_agreed, log_at_step
from lightning_qk.callbacks._ranks import has_others
from lightning_qk.callbacks._run_facts import run_settings
from lightning_qk.callbacks._self_check import add_self_check
from lightning_qk.callbacks._trainer import (
    is_last_chance,
    is_logged_step,
    logging_step,
)
from lightning_qk.callbacks.callback import OBSERVES, check_lightning, observe_last
from lightning_qk.callbacks.monitors._drawing import Drawing
from lightning_qk.callbacks.monitors._keys import Families, PerLayer, without_errors
from lightning_qk.callbacks.monitors._round import Part, measure_together
from lightning_qk.callbacks.monitors._session import join_session, measure_due
from lightning_qk.callbacks.monitors._watching import OnUnreadable
from lightning_qk.loggers.loggers import describe_config, log_scalars
from lightning_qk.record.forgotten import Forgotten
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.snapshots import Snapshots
from lightning_qk.record.states import NOT_FINITE


class MonitorOptions(TypedDict, total=False):
    """Types of the options that all monitors share; :class:`Monitor` says what they are."""

    per_layer: PerLayer
    per_head: bool
    families: Families
    exclude: Families
    figures_every: int
    report: bool
    report_every: float | None
    modules: Patterns
    on_unreadable: OnUnreadable


def at_least(least: int, **values: int | None) -> None:
    """Check numbers of things to sample.

    Raises:
        ValueError: one is below ``least``, and not None.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"expected {name} to be at least {least}, or None for all of them, got {value}")


class Monitor(Drawing):
    """Base of the monitors, and what they share.

    A subclass sets the class attributes, finds its layers in :meth:`find_layers` and measures them in
    :meth:`measure`. Nothing raises out of its hooks but a refusal that ``on_unreadable="raise"`` asks for.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's ``log_every_n_steps``.
        per_layer: names of statistics to log for each layer; None for the monitor's own choice, True for all of
            them (in evaluation loops too), False for none.
        per_head: also log one scalar a head.
        families: log statistics of these families alone, such as ``["health", "entropy"]``, see
            :data:`~lightning_qk.record.families.FAMILIES`; None for all. The table, the report, the file with
            every head and ``trainer.callback_metrics`` have all that is measured in any case.
        exclude: families that are not logged.
        figures_every: draw figures at every n-th measurement and at the end; 0 for never.
        report: write the report at the end, and while the run goes on.
        report_every: seconds between two writings while it goes on, at least: 0 for none before the end, None for
            30. The smallest of all monitors counts. A thread writes, after a measurement, on rank zero.
        modules: glob pattern or patterns on qualified names of attention layers, such as ``"*.encoder.*"``; None
            for all of them.
        on_unreadable: what to do where a layer that is asked for cannot be watched, or there is none: ``"warn"``
            watches the rest and names it once with the reason, ``"raise"`` refuses at the start of training.

    Attributes:
        history: statistics of every head at the measured steps, without layers until they are found.
        labels: qualified layer name → label in log keys.
        states: state of each head at the newest measurement, see :mod:`lightning_qk.record.states`.

    Raises:
        ValueError: an argument is out of range; with ``on_unreadable="raise"``, at the start of training: a layer
            cannot be watched.
    """

    record_field: str = ""
    """Field of the run's record that takes the history; empty for none."""
    curve_statistics: tuple[str, ...] = ()
    """Statistics with means that are curves of the report."""
    figure_statistics: tuple[str, ...] = ()
    """Statistics that are drawn as layer × head heatmaps."""
    witness: str
    """A statistic that, of a head that was measured, is not finite exactly when something is wrong with it."""
    subject: str
    """What is not finite then, in the plural."""
    has_heads: bool = True
    """Whether layers have heads to be named; without, each has one value."""

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        per_layer: PerLayer = None,
        per_head: bool = False,
        families: Families = None,
        exclude: Families = (),
        figures_every: int = 10,
        report: bool = True,
        report_every: float | None = None,
        modules: Patterns = None,
        on_unreadable: OnUnreadable = "warn",
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"expected every_n_steps to be at least 1, got {every_n_steps}: pass None to follow the "
                "trainer's log_every_n_steps"
            )
        if figures_every < 0:
            raise ValueError(f"expected figures_every to be 0 (never) or more, got {figures_every}")
        if report_every is not None and not 0 <= report_every < math.inf:
            raise ValueError(
                f"expected report_every to be 0 (only at the end) or more seconds, got {report_every}: correct it"
            )
        if on_unreadable not in get_args(OnUnreadable):
            raise ValueError(
                f"expected on_unreadable to be 'warn' or 'raise', got {on_unreadable!r}: pass 'warn' to watch "
                "what can be watched and have the rest named"
            )
        self.modules = kept_patterns(modules)
        self.on_unreadable: OnUnreadable = on_unreadable
        self.every_n_steps = every_n_steps
        self.figures_every = figures_every
        self.report = report
        self.report_every = report_every
        self.set_keys(per_layer, per_head, families, exclude)

    def begin(self) -> None:
        """Nothing was seen yet."""
        super().begin()
        self.states: Tensor | None = None
        self._snapshots = Snapshots()
        self._loss = LossCurve()
        self._steps_before = 0
        self._at_the_end = False
        self._begin_counting(0)

    def start_counting(self, trainer: Trainer) -> None:
        """Nothing is measured, said or lost yet."""
        self._begin_counting(trainer.global_step)
        self._is_finished = False
        self.forget_failures()

    def _begin_counting(self, first_step: int) -> None:
        self._found_non_finite = False
        self._logged, self._is_due = 0, False
        self._drawn = None
        self._steps_measured, self._steps_a_batch = 0, 1
        self._first_step = first_step
        self._last_step: int | None = None

    @property
    def place(self) -> int:
        """After callbacks that may change weights."""
        return OBSERVES

    # Lightning's hooks

    @property
    def state_key(self) -> str:
        """Several of these can be in one trainer, on other modules."""
        return super().state_key if self.modules is None else self._generate_state_key(modules=self.modules)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the settings into the run's config."""
        self.idle = False
        check_lightning(trainer, type(self).__name__)
        if stage == "fit":
            self.begin_fit(trainer, pl_module)
            join_session(trainer, self)
            observe_last(trainer)
            if self.has_heads:
                add_self_check(trainer)
            describe_config(trainer, {type(self).__name__: self.settings()})
            self.attempt(lambda: describe_config(trainer, run_settings(trainer)), "describing the run")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers: the same on every process, or raise on all."""
        self.start_counting(trainer)
        self.start_together(trainer, lambda: self.find_layers(trainer, pl_module))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether the step that this batch belongs to is measured."""
        self._steps_before = trainer.global_step
        # With accumulation, and with an optimizer that is stepped by hand, the step comes with a later batch.
        self._is_due = self._is_due or is_logged_step(trainer, self.every_n_steps)
        if not self._is_due and not self._steps_measured and not self.history.steps[-1:] > [-1]:
            # A run, or an epoch, that is over before the first step that is due has numbers all the same.
            self._is_due = is_last_chance(trainer, batch_idx, self._steps_a_batch)
        self.here(lambda: self.begin_batch(self._is_due and not self.gave_up))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left of earlier steps, before any callback logs this one."""
        if self._is_due:
            self.log_late(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop listening; the trainer's monitors measure together, when all of them have come here."""
        if self._is_due:
            self.attempt(lambda: self._loss.hear(batch_loss(trainer, pl_module, outputs)), "keeping the loss")
        self.here(self.end_batch)

    def end_step(self, trainer: Trainer) -> bool:
        """Whether the step is to be measured that this batch was the last of, the same on every process."""
        steps = trainer.global_step - self._steps_before
        if not steps:
            return False
        self._steps_before = trainer.global_step
        self._steps_a_batch, self._last_step = max(steps, 1), logging_step(trainer)
        was_due, self._is_due = self._is_due, False
        self._steps_measured += was_due
        return was_due

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left of earlier steps, before the validation logs this one."""
        if not trainer.sanity_checking:
            self.log_late(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what no step was measured of, and log the last figures."""
        if not self.idle:
            self._measure_at_the_end(trainer, pl_module)
        self.finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the last figures, and leave the model as it was: teardown may not follow."""
        try:
            self.finish(trainer, pl_module)
        finally:
            self.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self.release()

    def state_dict(self) -> dict[str, Any]:
        """The history, and what is kept of a few steps, so that a resumed run reports the whole run."""
        self._end_step_before_saving()
        state = {"history": self.history.state_dict()} if self.history.layers else {}
        if self._loss.points()[0]:
            state["loss"] = self._loss.state_dict()
        return {**state, "snapshots": self._snapshots.state_dict()} if len(self._snapshots) else state

    def _end_step_before_saving(self) -> None:
        """Measure a step that is due where a callback before this one saves a checkpoint at its end.

        With several processes it comes with its turn: one of them alone may ask for the state.
        """
        trainer, pl_module = self.running()
        if trainer is None or self.idle or has_others() or not trainer.training:
            return
        if self._is_due and trainer.global_step != self._steps_before:
            self.end_batch()
            self.measure_due_alone(trainer, pl_module)

    def measure_due_alone(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure a step that is due now, without the trainer's other monitors; collective calls."""
        measure_due(trainer, pl_module, [self])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        if "history" in state_dict:
            self.history = History.from_state_dict(state_dict["history"])
        if "snapshots" in state_dict:
            self._snapshots = Snapshots.from_state_dict(state_dict["snapshots"])
        if "loss" in state_dict:
            self._loss.load_state_dict(state_dict["loss"])

    # What a monitor says

    @abstractmethod
    def part(self, trainer: Trainer, pl_module: LightningModule) -> Part:
        """What it does in a measurement of a step."""

    def contribute(self, record: RunRecord) -> None:
        """Add the history to the run's record, and the loss and the means of some statistics as curves."""
        loss = self._loss.points()
        if len(loss[0]) > len(record.scalars.get(LossCurve.NAME, ([], []))[0]):
            record.scalars = {LossCurve.NAME: loss, **record.scalars}
        self.contribute_history(record)
        for name in self.curve_statistics:
            if name in self.history.values:
                curve = self.history.series(name).nanmean(-1).tolist()
                known = [one for one in zip(self.history.steps, curve, strict=True) if math.isfinite(one[1])]
                if known:
                    steps, values = zip(*known, strict=True)
                    record.scalars[f"{self.group}/{name}/mean"] = (list(steps), list(values))

    def contribute_history(self, record: RunRecord) -> None:
        """Add what layers and heads are judged by."""
        if self.record_field and self.history.layers:
            setattr(record, self.record_field, self.history)

    def can_measure_at_the_end(self) -> bool:
        """Whether there is something to measure after the last step, where no step was measured."""
        return self._is_due

    def begin_batch(self, is_due: bool) -> None:
        """Get ready, before a batch, to capture it where it is to be measured."""

    def end_batch(self) -> None:
        """After a batch: stop listening."""

    # What a monitor can use

    def stop(self) -> None:
        """Watch nothing from here on; training goes on."""
        self._is_due = False
        super().stop()

    def step_of(self, trainer: Trainer) -> int:
        """The step that is measured: at the end of training the last one."""
        if self._at_the_end and self._last_step is not None:
            return self._last_step
        return logging_step(trainer)

    def share(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        values: Mapping[str, Tensor],
        *,
        in_evaluation: bool = False,
    ) -> None:
        """Give ``trainer.callback_metrics`` the aggregates, for EarlyStopping, ModelCheckpoint and the like.

        Those decide on every process: it is done on all of them, whatever failed on one. A loop of evaluation
        returns them too.
        """
        overall = self.over_the_model(without_errors(values), states=self.states)
        # The loggers get them with the others.
        if in_evaluation:
            # Of plain numbers Lightning would copy each to the device.
            log_agreed(
                pl_module, dict(zip(overall, torch.tensor(list(overall.values())).unbind(), strict=True))
            )
        else:
            log_at_step(trainer, pl_module, overall)

    def gaps(self, part: Part) -> dict[str, Tensor]:
        """Values besides that another process may have where they are NaN here; the same names on every process.

        May not fail.
        """
        return {}

    def filled(self, part: Part, values: dict[str, Tensor]) -> None:
        """Take the values of :meth:`gaps`, the same on every process now, whatever became of the part."""

    def remember_step(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        """Keep a step, and the layers that count in it."""
        self.count_layers(trainer, pl_module)
        self.attempt(lambda: self.remember(trainer, values), "remembering")

    def remember(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        """Keep the statistics of one step in the history, and judge by them; no collective call."""
        history, step = self.history, self.step_of(trainer)
        if trainer.is_global_zero and self.report and history.forgotten is None:
            history.forgotten = Forgotten()
        history.append(step, values, self.states)
        self._loss.close(step)
        if history.forgotten is not None and history.forgotten.problem is not None:
            self.note(history.forgotten.problem)
        self.note_non_finite(self.states, step)
        self.attempt(lambda: self.conclude(trainer, step), "judging heads")

    def publish(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        """Send the statistics of one step to ``trainer.callback_metrics`` and the loggers, on every process."""
        if not self._at_the_end:  # no module may log then
            self.share(trainer, pl_module, values)
        self.attempt(lambda: self._log_step(trainer, values), "remembering")
        self.after_measuring(trainer)

    def _log_step(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        step = self.step_of(trainer)
        if self.history.steps[-1:] != [step]:
            return  # it could not be remembered, which was said
        self.attempt(lambda: self.log_values(trainer, without_errors(values), step))
        if not trainer.is_global_zero:
            return
        if self.figures_every and self._logged % self.figures_every == 0:
            self.log_figures(trainer, step)
        self._logged += 1

    def conclude(self, trainer: Trainer, step: int) -> None:
        """Make something of a step that is in the history now, before it is logged; no collective call."""

    def log_values(self, trainer: Trainer, values: Mapping[str, Tensor], step: int) -> None:
        """Aggregates to the loggers."""
        states = self.history.states_at(step)
        overall = self.worth_logging(self.over_the_model(values, states=states)) | self.of_run(step)
        log_scalars(trainer, overall | self.by_layer_and_head(self.history, values, states=states), step)

    def of_run(self, step: int) -> dict[str, float]:
        """Numbers of the whole run that are logged with the aggregates of a step."""
        return {}

    def note_non_finite(self, states: Tensor | None, step: int) -> None:
        """Name the layers and heads that are not finite, the first time: NaN soon spreads to all."""
        when = "before the first step" if step < 0 else f"at step {step}"
        history = self.history
        if self._found_non_finite or states is None:
            return
        found, first = [], ""
        for label, heads in zip(history.layers, history.split(states), strict=True):
            bad = [str(index) for index, state in enumerate(heads.tolist()) if state == NOT_FINITE]
            if bad:
                first = first or (f"{label}/head_{int(bad[0]):02d}" if self.has_heads else label)
                module = next(module for module, own in self.labels.items() if own == label)
                found.append(f"{module} (head {', '.join(bad)})" if self.has_heads else module)
        if found:
            self._found_non_finite = True
            self.note(
                f"{self.subject} are not finite {when} in {shorten(found)}: training goes on; look for a "
                "learning rate that is too high, or an overflow in half precision",
                "non-finite",
                where=first,
                step=step,
            )

    def _measure_at_the_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure a run none of whose steps was, as far as that can be done after its last one; else say so."""
        if self._steps_measured or self._last_step is None:
            return
        if not self.can_measure_at_the_end():
            steps = trainer.global_step - self._first_step
            every = "log_every_n_steps" if self.every_n_steps is None else "every_n_steps"
            self.nothing_measured(
                f"no step was measured: training ended after {steps} of them, before one was due, and its end was "
                f"not known beforehand; pass a smaller {every}"
            )
            return
        self._at_the_end, self._is_due = True, False
        try:
            self.measure_alone(self.part(trainer, pl_module))
        finally:
            self._at_the_end = False

    def measure_alone(self, part: Part) -> None:
        """Measure where the other monitors have nothing to measure; collective calls."""
        if not self.gave_up:
            measure_together([part])

    def nothing_measured(self, sentence: str) -> None:
        """Say that training ended without a measurement."""
        self.note(sentence)

    def after_measuring(self, trainer: Trainer) -> None:
        """After a measurement that every process has: begin what is logged late."""
