"""What the monitors share: when to measure, how to log, what to remember, the report at the end."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypedDict, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._guarded import MOST_FAILURES
from lightning_qk.callbacks._layers import Patterns, kept_patterns
from lightning_qk.callbacks._loss import LossCurve, batch_loss
from lightning_qk.callbacks._output import log_agreed, log_at_step
from lightning_qk.callbacks._ranks import has_others
from lightning_qk.callbacks._run_facts import run_settings
from lightning_qk.callbacks._self_check import add_self_check
from lightning_qk.callbacks._trainer import (
    describe_error,
    is_last_chance,
    is_logged_step,
    logging_step,
)
from lightning_qk.callbacks.callback import OBSERVES, check_lightning, observe_last
from lightning_qk.callbacks.monitors._keys import Families, PerLayer, without_errors
from lightning_qk.callbacks.monitors._live import LivePage
from lightning_qk.callbacks.monitors._report import write_run
from lightning_qk.callbacks.monitors._watching import OnUnreadable, Watching
from lightning_qk.callbacks.run_directory import run_directory
from lightning_qk.loggers.loggers import describe_config, log_scalars, shows_pictures
from lightning_qk.loggers.pictures import Pictures
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


def flat_values(metric: Metric) -> dict[str, Tensor]:
    """What a metric computes, one value a head, in float32 on the CPU.

    torchmetrics makes scalars of a model's only head. One copy from the device brings all statistics.
    """
    with torch.no_grad():
        values = metric.compute()
        flat = [value if value.dim() == 1 else value.reshape(-1) for value in values.values()]
        table = torch.stack(flat).to("cpu", torch.float32)
        return dict(zip(values, table.unbind(), strict=True))


def at_least(least: int, **values: int | None) -> None:
    """Check numbers of things to sample.

    Raises:
        ValueError: one is below ``least``, and not None.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"expected {name} to be at least {least}, or None for all of them, got {value}")


def _draw_heatmap(history: History, statistic: str) -> bytes:
    from lightning_qk.report.figures import heatmap, to_png

    return to_png(heatmap(history, statistic))


class Monitor(Watching):
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

    live: ClassVar[tuple[str, ...]] = ("_pictures", "_ended_by", "_page")

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
        self._pictures = Pictures()
        self._loss = LossCurve()
        self._directory: str | None = None
        self._ended_by: BaseException | None = None
        self._page: LivePage | None = None
        self._steps_before = 0
        self._at_the_end = False
        self._begin_counting(0)

    def start_counting(self, trainer: Trainer) -> None:
        """Nothing is measured, said or lost yet."""
        self._begin_counting(trainer.global_step)
        self._reported = False
        self.forget_failures()

    def _begin_counting(self, first_step: int) -> None:
        self._found_non_finite = False
        self._logged, self._is_due = 0, False
        self._drawn: int | None = None
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
            observe_last(trainer)
            if self.has_heads:
                add_self_check(trainer)
            describe_config(trainer, {type(self).__name__: self.settings()})
            self.attempt(lambda: describe_config(trainer, run_settings(trainer)), "describing the run")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on where the report goes, and find the layers: the same on every process, or raise on all."""
        self._directory = run_directory(trainer)
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
            self.log_late(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log once the optimizer has stepped."""
        if self._is_due:
            self.attempt(lambda: self._loss.hear(batch_loss(trainer, pl_module, outputs)), "keeping the loss")
        self.here(self.end_batch)
        self._end_step(trainer, pl_module)

    def _end_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.global_step - self._steps_before
        if not steps:
            return
        self._steps_a_batch, self._last_step = max(steps, 1), logging_step(trainer)
        if self._is_due:
            self._is_due = False
            self._steps_measured += 1
            self._measure_and_publish(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left of earlier steps, before the validation logs this one."""
        if not trainer.sanity_checking:
            self.log_late(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what no step was measured of, log the last figures and leave the report."""
        if not self.idle:
            self._measure_at_the_end(trainer, pl_module)
        self.finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the report of what was seen until then, and the model as it was: teardown may not follow."""
        self._ended_by = exception
        try:
            self.finish(trainer, pl_module)
        finally:
            self._ended_by = None
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
            self._end_step(trainer, pl_module)

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
    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        """Statistic → flat values of all heads after a step, reduced over ranks; None if there is nothing.

        Collective calls are made by all processes or by none: what may fail before one of them goes through
        :func:`~lightning_qk.callbacks._ranks.all_or_none`. What comes after the last one may fail as it likes.
        """

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

    def publish(self, trainer: Trainer, pl_module: LightningModule | None, values: dict[str, Tensor]) -> None:
        """Send the statistics of one step to the history and the loggers."""
        history = self.history
        step = self.step_of(trainer)
        if trainer.is_global_zero and self.report and history.forgotten is None:
            history.forgotten = Forgotten()
        history.append(step, values, self.states)
        self._loss.close(step)
        if history.forgotten is not None and history.forgotten.problem is not None:
            self.note(history.forgotten.problem)
        self.note_non_finite(self.states, step)
        self.attempt(lambda: self.conclude(trainer, step), "judging heads")
        # Of its own: what a logger does not take is still remembered.
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

    def log_figures(self, trainer: Trainer, step: int) -> None:
        """Draw layer × head heatmaps of the newest values, once a step, in a thread."""
        history = self.history
        if step == self._drawn or self._failed.get("drawing", 0) >= MOST_FAILURES:
            return
        if not shows_pictures(trainer):
            return
        self._drawn = step
        for name in self.figure_statistics:
            is_drawn = self.is_logged(name) and name in history.values
            if is_drawn and history.values[name][-1].isfinite().any():
                # Of its own: the history goes on.
                newest = History(history.layers, history.heads)
                newest.append(step, {name: history.values[name][-1]})
                self._pictures.draw(
                    f"{self.group}/heatmap/{name}", step, partial(_draw_heatmap, newest, name)
                )

    def log_late(self, trainer: Trainer, pl_module: LightningModule | None = None) -> None:
        """Log what was begun at earlier steps in a thread; no collective call.

        Args:
            trainer: the trainer.
            pl_module: where its ``log`` may be called.
        """
        self.attempt(lambda: self._pictures.log(trainer), "drawing")

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Last figures, then, from the last of the monitors, the report of all of them."""
        if not trainer.is_global_zero or self._reported or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._reported = True
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]
        for page in (monitor._page for monitor in monitors if monitor._page is not None):
            page.close()
        try:
            if self.figures_every and len(self.history):
                self.log_figures(trainer, self.history.steps[-1])
            self.log_late(trainer)
            if self.report and all(monitor._reported for monitor in monitors if monitor.report):
                folder = Path(self._directory or trainer.default_root_dir)
                write_run(trainer, pl_module, folder, self.note, self._ended_by)
        except Exception as error:
            self.note(f"the report could not be written ({describe_error(error)})")

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
            values = self.together(trainer, lambda: self.measure(trainer, pl_module))
            if values is not None:
                # No module may log now.
                self.attempt(lambda: self.publish(trainer, None, values), "remembering")
                self.after_measuring(trainer)
        finally:
            self._at_the_end = False

    def nothing_measured(self, sentence: str) -> None:
        """Say that training ended without a measurement."""
        self.note(sentence)

    def _measure_and_publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.log_late(trainer, pl_module)
        values = self.together(trainer, lambda: self.measure(trainer, pl_module))
        if values is None:
            return
        self.count_layers(trainer, pl_module)
        self.share(trainer, pl_module, values)
        self.attempt(lambda: self.publish(trainer, pl_module, values), "remembering")
        self.after_measuring(trainer)
        if trainer.is_global_zero and self.report:
            self.attempt(lambda: self._rewrite(trainer, pl_module), "rewriting the report")

    def _rewrite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The report of the run up to now: from the monitor that measures most often, the last of several."""
        monitors = [one for one in reversed(trainer.callbacks) if isinstance(one, Monitor) and one.report]  # type: ignore[attr-defined]
        often = min(monitors, key=lambda one: one.every_n_steps or trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self is often and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._page = self._page or LivePage.as_asked(one.report_every for one in monitors)
            self._page.keep(trainer, pl_module, Path(self._directory or trainer.default_root_dir))

    def after_measuring(self, trainer: Trainer) -> None:
        """After a measurement that every process has: begin what is logged late."""
