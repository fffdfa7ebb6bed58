"""What the monitors share: when to measure, how to log, what to remember, the report at the end."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.architecture.labels import layer_labels
from lightning_qk.callbacks._fit_state import OfOneFit, nothing
from lightning_qk.callbacks._guarded import GuardedHooks, Refused
from lightning_qk.callbacks._order import observe_last
from lightning_qk.callbacks._ranks import FailedTogether, all_or_none, finish_together, has_others
from lightning_qk.callbacks._self_check import add_self_check, self_check_of, shorten
from lightning_qk.callbacks._trainer import (
    Callback,
    check_lightning,
    describe_error,
    is_last_chance,
    is_logged_step,
    logging_step,
    model_info,
    run_directory,
    say,
)
from lightning_qk.callbacks._training import training_layers
from lightning_qk.callbacks.monitors._losses import MOST_FAILURES
from lightning_qk.callbacks.monitors._watched import Patterns, kept_patterns, matching
from lightning_qk.loggers.loggers import describe_config, log_file, log_scalars, shows_pictures
from lightning_qk.loggers.pictures import Pictures
from lightning_qk.record.forgotten import Forgotten
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.snapshots import Snapshots
from lightning_qk.record.states import NOT_FINITE

_T = TypeVar("_T")
PerLayer = bool | str | Sequence[str] | None
OnUnreadable = Literal["warn", "raise"]

REPORT_NAME = "lightning_qk_report.html"
RECORD_NAME = "lightning_qk_record.safetensors"


def flat_values(metric: Metric) -> dict[str, Tensor]:
    """What a metric computes, one value a head, in float32 on the CPU.

    torchmetrics makes scalars of a model's only head. One copy from the device brings all statistics.
    """
    values = metric.compute()
    table = torch.stack([value.detach().reshape(-1).float() for value in values.values()]).cpu()
    return dict(zip(values, table, strict=True))


def _checked_layers(per_layer: PerLayer) -> bool | tuple[str, ...] | None:
    if per_layer is None or isinstance(per_layer, bool):
        return per_layer
    return (per_layer,) if isinstance(per_layer, str) else tuple(per_layer)


def _without_errors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Standard errors stay in the history: three more keys for each statistic would bury the rest."""
    return {name: flat for name, flat in values.items() if not name.endswith("_se")}


def _draw_heatmap(history: History, statistic: str) -> bytes:
    from lightning_qk.report.figures import heatmap, to_png

    return to_png(heatmap(history, statistic))


def _arguments(kind: type) -> Collection[str]:
    return inspect.signature(kind).parameters


class Monitor(OfOneFit, GuardedHooks, Callback):
    """Base of the monitors; see :class:`~lightning_qk.QKSpectrumMonitor` for what users pass.

    Nothing raises out of its hooks but a refusal that was asked for by ``on_unreadable="raise"``.
    """

    group: str
    """Prefix of the log keys."""
    statistics: tuple[str, ...]
    """Statistics that it has, without those that are made on request."""
    layer_statistics: tuple[str, ...]
    """Statistics that are logged for every layer unless others are asked for."""
    extremes: Mapping[str, tuple[str, ...]]
    """Statistic → which of ``min`` and ``max`` over all heads loggers get beside the mean."""
    figure_statistics: tuple[str, ...]
    """Statistics that are drawn as layer × head heatmaps."""
    witness: str
    """A statistic that, of a head that was measured, is not finite exactly when something is wrong with it."""
    subject: str
    """What is not finite then, in the plural."""
    has_heads: bool = True
    """Whether layers have heads to be named; without, each has one value."""

    fit_state = {  # noqa: RUF012 (never changed)
        "history": nothing,
        "labels": dict,
        "notes": list,
        "_logged": int,
        "_drawn": nothing,
        "_snapshots": Snapshots,
        "_directory": nothing,
        "_is_due": bool,
        "_steps_before": int,
        "_reported": bool,
        "_found_non_finite": bool,
        "states": nothing,
        "_failed": dict,
        "_lost_in_a_row": int,
        "_counted": nothing,
        "_steps_measured": int,
        "_at_the_end": bool,
        "_steps_a_batch": lambda: 1,
        "_first_step": int,
        "_last_step": nothing,
        "_failure": nothing,
    }
    running_state = {"_pictures": Pictures}  # noqa: RUF012 (never changed)

    history: History | None
    labels: dict[str, str]
    notes: list[str]
    _logged: int
    _drawn: int | None
    _snapshots: Snapshots
    _directory: str | None
    _is_due: bool
    _steps_before: int
    _reported: bool
    _found_non_finite: bool
    states: Tensor | None
    """State of each head at the newest measurement, see :mod:`lightning_qk.record.states`."""
    _failed: dict[str, int]
    """What → how many times in a row it failed on this process; for what no other process waits for."""
    _lost_in_a_row: int
    """How many measurements were lost one after the other: the same number on every process."""
    _counted: Tensor | None
    """Which heads count in aggregates over the model; None for all."""
    _steps_measured: int
    _at_the_end: bool
    _steps_a_batch: int
    _first_step: int
    _last_step: int | None
    _failure: Exception | None
    """What one of this process's hooks failed with: the other processes learn it at the next measurement."""
    _pictures: Pictures

    def __init__(
        self,
        every_n_steps: int | None,
        *,
        per_head: bool,
        figures_every: int,
        report: bool,
        per_layer: PerLayer = None,
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
        if on_unreadable not in get_args(OnUnreadable):
            raise ValueError(
                f"expected on_unreadable to be 'warn' or 'raise', got {on_unreadable!r}: pass 'warn' to watch "
                "what can be watched and have the rest named"
            )
        self.modules = kept_patterns(modules)
        self.on_unreadable: OnUnreadable = on_unreadable
        self.every_n_steps = every_n_steps
        self.per_head = per_head
        self.per_layer = _checked_layers(per_layer)
        self.figures_every = figures_every
        self.report = report
        self.begin()

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
            own = ("per_layer", "per_head", "figures_every", "report", "modules", "on_unreadable")
            rest = {name: getattr(self, name) for name in own if name in _arguments(type(self))}
            describe_config(trainer, {type(self).__name__: self.settings() | rest})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on where the report goes, and find the layers: the same on every process, or raise on all."""
        self._directory = run_directory(trainer)
        self.start_counting(trainer)
        self._start_together(trainer, lambda: self.find_layers(trainer, pl_module))

    def start_counting(self, trainer: Trainer) -> None:
        """Nothing is measured, said or lost yet."""
        self.idle = False
        self._reported = self._found_non_finite = False
        self._failed, self._lost_in_a_row = {}, 0
        self._logged, self._drawn, self._is_due = 0, None, False
        self._steps_measured, self._steps_a_batch = 0, 1
        self._first_step, self._last_step = trainer.global_step, None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether the step that this batch belongs to is measured."""
        self._steps_before = trainer.global_step
        # With accumulation, and with an optimizer that is stepped by hand, the step comes with a later batch.
        self._is_due = self._is_due or is_logged_step(trainer, self.every_n_steps)
        is_first = not self._steps_measured and not (
            self.history is not None and self.history.steps[-1:] > [-1]
        )
        if is_first and not self._is_due:
            # A run, or an epoch, that is over before the first step that is due has numbers all the same.
            self._is_due = is_last_chance(trainer, batch_idx, self._steps_a_batch)
        self._here(lambda: self.begin_batch(self._is_due and self._lost_in_a_row < MOST_FAILURES))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left of earlier steps, before any callback logs this one."""
        if self._is_due:
            self.log_late(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log once the optimizer has stepped."""
        self._here(self.end_batch)
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
            self.log_late(trainer, pl_module, at_epoch_end=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what no step was measured of, log the last figures and leave the report."""
        if not self.idle:
            self._measure_at_the_end(trainer, pl_module)
        self.finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the report of what was seen until then, and the model as it was: teardown may not follow."""
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
        state = {} if self.history is None else {"history": self.history.state_dict()}
        return {**state, "snapshots": self._snapshots.state_dict()} if len(self._snapshots) else state

    def _end_step_before_saving(self) -> None:
        """Measure a step that is due where a callback before this one saves a checkpoint at its end.

        With several processes it comes with its turn: one of them alone may ask for the state.
        """
        fit: Any = (None, None) if self._fit is None else (self._fit[0](), self._fit[1]())
        trainer, pl_module = fit
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

    # What a monitor has to say

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is to be watched, at the start of a fit; no collective call.

        Raises:
            ValueError: there is nothing.
        """

    def watched(self) -> Mapping[str, Any]:
        """Name of each module that is watched → facts that collective calls rely on to be everywhere the same."""
        return {}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        """Statistic → flat values of all heads after a step, reduced over ranks; None if there is nothing.

        Collective calls are made by all processes or by none: what may fail before one of them goes through
        :func:`~lightning_qk.callbacks._ranks.all_or_none`. What comes after the last one may fail as it likes.
        """

    @abstractmethod
    def contribute(self, record: RunRecord) -> None:
        """Add what this monitor remembers to the run's record."""

    def release(self) -> None:
        """Take away whatever stands in the model, and end what runs beside the training."""

    def can_measure_at_the_end(self) -> bool:
        """Whether there is something to measure after the last step, where no step was measured."""
        return self._is_due

    def begin_batch(self, is_due: bool) -> None:
        """Before a batch: get ready to listen when it is to be measured."""

    def end_batch(self) -> None:
        """After a batch: stop listening."""

    # What a monitor can use

    def remember_layers(
        self, heads: Mapping[str, int], cross: Iterable[str], labels: Mapping[str, str] | None = None
    ) -> None:
        """Fix the layers; a history of other layers (of a changed model) starts anew.

        Args:
            heads: layer name → number of heads, in the model's order.
            cross: those of them that are cross-attention.
            labels: layer name → label in log keys; None makes them of the names.
        """
        self.labels = layer_labels(list(heads), cross=set(cross)) if labels is None else dict(labels)
        layers = tuple(self.labels[name] for name in heads)
        if (
            self.history is None
            or self.history.layers != layers
            or self.history.heads != tuple(heads.values())
        ):
            self.history = History(layers, list(heads.values()))

    def choose(
        self,
        found: Collection[str],
        left_out: Mapping[str, str],
        *,
        kind: str,
        nothing: str,
        unread: str,
    ) -> bool:
        """Say what is not watched and why; whether anything is.

        Args:
            found: qualified names of all layers of the model, those that ``modules`` leaves out included.
            left_out: name → reason, of layers that ``modules`` asks for and that cannot be watched.
            kind: what a layer is, in the singular.
            nothing: sentence for a model without any, in the form of an error.
            unread: what is expected of the layers, in the form "whose weights can be read".

        Returns:
            Whether a layer is left to watch. Where none is, the monitor is idle from here on.

        Raises:
            Refused: something cannot be watched, with ``on_unreadable="raise"``.
        """
        chosen = matching(found, self.modules)
        watched = [name for name in chosen if name not in left_out]
        must = self.on_unreadable == "raise"
        if not found:
            sentence = nothing
        elif not chosen:
            sentence = (
                f"expected modules={self.modules!r} to match at least one {kind}, but it matches none of "
                f"{len(found)} ({shorten(list(found))}): use * for any part of a name"
            )
        elif left_out and (must or not watched):
            first = next(iter(left_out.values()))
            same = [name for name, reason in left_out.items() if reason == first]
            others = len(left_out) - len(same)
            rest = f" (and {others} for other reasons)" if others else ""
            sentence = (
                f"expected {kind}s {unread}, got {shorten(same)} left out{rest}: {first}; choose others by "
                "modules="
            )
        else:
            self.note_left_out(left_out)
            return True
        if must:
            raise Refused(f"{sentence}, or pass on_unreadable='warn' to go on without them")
        self.note(f"nothing is watched: {sentence}")
        self.stop()
        return False

    def stop(self) -> None:
        """Watch nothing from here on; training goes on."""
        self.idle, self._is_due = True, False
        try:
            self.release()
        except Exception as error:
            self.note(f"what stood in the model could not be taken away ({describe_error(error)})")

    def hook_failed(self, hook: str, error: Exception) -> None:
        """Say so and watch nothing more; what was seen until then is still reported."""
        ends = hook in ("on_train_end", "on_exception", "teardown")
        if hook in ("state_dict", "load_state_dict"):
            self.note(f"its history is missing where it failed in {hook} ({describe_error(error)})")
            return
        self.note(
            f"it stopped {'reporting' if ends else 'watching'}, since {hook} failed ({describe_error(error)}); "
            "training goes on"
        )
        self._reported = self._reported or ends
        if has_others() and not ends:
            # The other processes are not left alone: at the next measurement it is given up on all of them.
            self._failure = error
            return
        self.stop()

    def _here(self, action: Callable[[], None]) -> None:
        """Do something on this process alone, whose failure every process learns at the next measurement."""
        if self._failure is not None:
            return
        try:
            action()
        except Exception as error:
            self._failure = error

    def _start_together(self, trainer: Trainer, find: Callable[[], None]) -> None:
        """Find what is watched, the same on every process; else be idle on all, or refuse on all."""
        try:
            all_or_none(trainer, find, facts=lambda _: repr((self.idle, self.watched())))
        except FailedTogether as error:
            if self.on_unreadable == "raise":
                raise Refused(str(error)) from error
            self.note(f"nothing is watched: {error}; training goes on")
            self.stop()

    def note_left_out(self, reasons: Mapping[str, str]) -> None:
        """Name the layers that are not measured; those with the same reason in one sentence."""
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, own in reasons.items() if own == reason]
            verb = "is" if len(names) == 1 else f"({len(names)} layers) are"
            self.note(f"{shorten(names)} {verb} left out: {reason}")

    def note_lost(self, reasons: Mapping[str, str]) -> None:
        """Say, once, that layers have no value at a step that was to be measured."""
        name, reason = next(iter(reasons.items()))
        more = f", as have {len(reasons) - 1} more layers" if len(reasons) > 1 else ""
        self.note(f"{name} has no value at one step{more}: {reason}; it is tried again, and training goes on")

    def attempt(self, action: Callable[[], _T], what: str = "logging") -> _T | None:
        """Do something for which training must not stop, and for which no other process waits.

        After failures one after the other it is not tried again; so what follows from it may differ between
        processes, and must not decide about a collective call: see :meth:`together`.

        Args:
            action: what to do.
            what: its kind, in the words of "it stopped ...".

        Returns:
            What the action returned, or None where it failed or is not tried any more.
        """
        failed = self._failed.get(what, 0)
        if failed >= MOST_FAILURES:
            return None
        try:
            value = action()
        except Exception as error:
            self._failed[what] = failed + 1
            self._note_failure(what, failed + 1, error)
            return None
        self._failed[what] = 0
        return value

    def together(self, trainer: Trainer, action: Callable[[], _T]) -> _T | None:
        """Measure on all processes or on none; training must not stop for it. A collective call.

        After failures one after the other, on whichever process, it is not tried again on any.

        Args:
            trainer: the trainer.
            action: as :meth:`measure`.

        Returns:
            What the action returned, or None where it failed on some process or is not tried any more.
        """
        if self._lost_in_a_row >= MOST_FAILURES:
            return None
        try:
            all_or_none(trainer, self._check_whole)
            value = finish_together(trainer, action)
        except Exception as error:
            self._lost_in_a_row += 1
            self._note_failure("measuring", self._lost_in_a_row, error)
            return None
        self._lost_in_a_row = 0
        return value

    def _check_whole(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _note_failure(self, what: str, times: int, error: Exception) -> None:
        reason = str(error) if isinstance(error, FailedTogether) else f"{type(error).__name__}: {error}"
        if times >= MOST_FAILURES:
            self.note(f"it stopped {what} after {times} failures in a row ({reason}); training goes on")
        elif times == 1:
            self.note(f"{what} failed once ({reason}); it is tried again, and training goes on")

    def note(self, sentence: str) -> None:
        """Say something once, in the log and in the report."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            say(f"{type(self).__name__}: {sentence}")

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
        at_epoch_end: bool = False,
    ) -> None:
        """Give ``trainer.callback_metrics`` the aggregates, for EarlyStopping, ModelCheckpoint and the like.

        Those decide on every process: it is done on all of them, whatever failed on one.
        """
        overall = self.over_the_model(_without_errors(values), states=self.states)
        # The loggers get them with the others.
        pl_module.log_dict(overall, logger=False, on_step=not at_epoch_end, on_epoch=at_epoch_end)

    def publish(self, trainer: Trainer, pl_module: LightningModule | None, values: dict[str, Tensor]) -> None:
        """Send the statistics of one step to the history and the loggers."""
        history = self.history
        assert history is not None  # remember_layers comes before the first measurement
        step = self.step_of(trainer)
        if trainer.is_global_zero and self.report and history.forgotten is None:
            history.forgotten = Forgotten()
        history.append(step, values, self.states)
        if history.forgotten is not None and history.forgotten.problem is not None:
            self.note(history.forgotten.problem)
        self.note_non_finite(self.states, f"at step {step}")
        # Of its own: what a logger does not take is still remembered.
        self.attempt(lambda: self.log_values(trainer, _without_errors(values), step))
        if not trainer.is_global_zero:
            return
        if self.figures_every and self._logged % self.figures_every == 0:
            self.log_figures(trainer, step)
        self._logged += 1

    def log_values(self, trainer: Trainer, values: Mapping[str, Tensor], step: int) -> None:
        """Aggregates to the loggers."""
        history = self.history
        assert history is not None  # publish
        states = history.states_at(step)
        overall = self.worth_logging(self.over_the_model(values, states=states))
        log_scalars(trainer, overall | self.by_layer_and_head(history, values, states=states), step)

    def over_the_model(
        self, values: Mapping[str, Tensor], prefix: str | None = None, *, states: Tensor | None = None
    ) -> dict[str, float]:
        """Mean, minimum and maximum over heads that have a value and count; keys begin with the group or a prefix.

        NaN where a head that should have a value is not finite: numbers of the others would look healthy.
        """
        prefix = prefix or self.group
        scalars: dict[str, float] = {}
        for name, flat in values.items():
            broken = self._broken_heads(name, flat, states)
            if self._counted is not None and self._counted.shape == flat.shape:
                flat, broken = flat[self._counted], broken[self._counted]
            finite = flat[flat.isfinite()]
            is_broken = bool(broken.any())
            for reduction in ("mean", "min", "max") if is_broken or finite.numel() else ():
                value = math.nan if is_broken else getattr(finite, reduction)().item()
                scalars[f"{prefix}/{name}/{reduction}"] = value
        return scalars

    def _broken_heads(self, name: str, flat: Tensor, states: Tensor | None) -> Tensor:
        """Which heads should have a value of a statistic and are not finite."""
        if states is None:
            return torch.zeros_like(flat, dtype=torch.bool)
        return (states == NOT_FINITE) & ~flat.isfinite() & self.has_value(name, flat)

    def has_value(self, name: str, flat: Tensor) -> Tensor:
        """Which heads have a value of a statistic when all is well, boolean, of the shape of ``flat``."""
        return torch.ones_like(flat, dtype=torch.bool)

    def by_layer_and_head(
        self,
        history: History,
        values: Mapping[str, Tensor],
        prefix: str | None = None,
        *,
        states: Tensor | None = None,
    ) -> dict[str, float]:
        """Means over the heads of each layer, of some statistics, and each head where asked.

        NaN where a head of the layer is not finite.
        """
        is_evaluation = prefix is not None
        prefix = prefix or self.group
        by_layer = self._by_layer(values, is_evaluation)
        scalars: dict[str, float] = {}
        for name, flat in values.items():
            broken = history.split(self._broken_heads(name, flat, states))
            for label, heads, bad in zip(history.layers, history.split(flat), broken, strict=True):
                finite = heads[heads.isfinite()]
                if name in by_layer and (finite.numel() or bad.any()):
                    scalars[f"{prefix}/{label}/{name}"] = math.nan if bad.any() else finite.mean().item()
                if self.per_head:
                    scalars.update(
                        (f"{prefix}/{label}/head_{index:02d}/{name}", value)
                        for index, value in enumerate(heads.tolist())
                        if math.isfinite(value)
                    )
        return scalars

    def worth_logging(self, overall: Mapping[str, float], *, is_evaluation: bool = False) -> dict[str, float]:
        """What loggers get of :meth:`over_the_model`: every mean, and the extremes that tell something.

        A dashboard of all of them would bury these. ``trainer.callback_metrics`` has them all.
        """
        kept: dict[str, float] = {}
        for key, value in overall.items():
            *_, statistic, reduction = key.split("/")
            wanted = () if is_evaluation else self.extremes.get(statistic, ())
            if reduction == "mean" or reduction in wanted:
                kept[key] = value
        return kept

    def _by_layer(self, values: Mapping[str, Tensor], is_evaluation: bool) -> Collection[str]:
        """Statistics that are logged for every layer; of evaluation loops only where all are asked for."""
        if isinstance(self.per_layer, bool):
            return values if self.per_layer else ()
        if is_evaluation:
            return ()
        return self.layer_statistics if self.per_layer is None else self.per_layer

    def check_layer_statistics(self) -> None:
        """Refuse names in ``per_layer`` that are no statistics of this monitor; for the end of ``__init__``.

        Raises:
            ValueError: one is not.
        """
        if self.per_layer is None or isinstance(self.per_layer, bool):
            return
        known = (*self.statistics, *self.layer_statistics)
        unknown = [name for name in self.per_layer if name not in known]
        if unknown:
            names = ", ".join(dict.fromkeys(known))
            raise ValueError(
                f"expected per_layer to be True, False or names among {names}, got {unknown[0]!r}: correct it"
            )

    def log_figures(self, trainer: Trainer, step: int) -> None:
        """Draw layer × head heatmaps of the newest values, once a step, in a thread."""
        history = self.history
        if history is None or step == self._drawn or self._failed.get("drawing", 0) >= MOST_FAILURES:
            return
        if not shows_pictures(trainer):
            return
        self._drawn = step
        for name in self.figure_statistics:
            if name in history.values and history.values[name][-1].isfinite().any():
                # Of its own: the history goes on.
                newest = History(history.layers, history.heads)
                newest.append(step, {name: history.values[name][-1]})
                self._pictures.draw(
                    f"{self.group}/heatmap/{name}", step, partial(_draw_heatmap, newest, name)
                )

    def log_late(
        self, trainer: Trainer, pl_module: LightningModule | None = None, *, at_epoch_end: bool = False
    ) -> None:
        """Log what was begun at earlier steps in a thread; no collective call.

        Args:
            trainer: the trainer.
            pl_module: where its ``log`` may be called.
            at_epoch_end: whether it is called from a hook of the end or start of an epoch.
        """
        self.attempt(lambda: self._pictures.log(trainer), "drawing")

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Last figures, then, from the last of the monitors, the report of all of them."""
        if not trainer.is_global_zero or self._reported or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._reported = True
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]
        try:
            if self.figures_every and self.history is not None and len(self.history):
                self.log_figures(trainer, self.history.steps[-1])
            self.log_late(trainer)
            if self.report and all(monitor._reported for monitor in monitors if monitor.report):
                self._write_report(trainer, pl_module, monitors)
        except Exception as error:
            self.note(f"the report could not be written ({type(error).__name__}: {error})")

    def _write_report(
        self, trainer: Trainer, pl_module: LightningModule, monitors: Iterable["Monitor"]
    ) -> None:
        from lightning_qk.callbacks._account import contributors
        from lightning_qk.record.health import print_health
        from lightning_qk.report.report import write_report

        record = RunRecord(info=model_info(trainer, pl_module))
        check = self_check_of(trainer)
        if check is not None and check.lines:
            record.info["Weights as read"] = check.lines[0]
        for monitor in monitors:
            monitor.contribute(record)
            record.notes.extend(note for note in monitor.notes if note not in record.notes)
        for other in contributors(trainer.callbacks):  # type: ignore[attr-defined]
            other.contribute(record)
        if not any(len(history) for history in record.histories.values()):
            return
        # First what needs no disk.
        print_health(record)
        folder = Path(self._directory or trainer.default_root_dir)
        record.save(folder / RECORD_NAME)
        self._write_history(trainer, record, folder)
        path = write_report(record, folder / REPORT_NAME)
        print(f"Report: {path}")

    def _write_history(self, trainer: Trainer, record: RunRecord, folder: Path) -> None:
        """Every head's history beside the report, and to the loggers that keep files."""
        from lightning_qk.record.parquet import HISTORY_NAME, write_history

        try:
            path = write_history(record, folder / HISTORY_NAME)
        except Exception as error:
            self.note(f"the history of the heads could not be written ({type(error).__name__}: {error})")
            return
        description = (
            "Every head at every kept step: step, layer, layer_index, head, key, value. Read it with "
            "pandas.read_parquet."
        )
        log_file(trainer, path, name="lightning_qk_history", kind="history", description=description)

    def note_non_finite(self, states: Tensor | None, when: str) -> None:
        """Name the layers and heads that are not finite, the first time: NaN soon spreads to all."""
        history = self.history
        if self._found_non_finite or history is None or states is None:
            return
        found = []
        for label, heads in zip(history.layers, history.split(states), strict=True):
            bad = [str(index) for index, state in enumerate(heads.tolist()) if state == NOT_FINITE]
            if bad:
                module = next(module for module, own in self.labels.items() if own == label)
                found.append(f"{module} (head {', '.join(bad)})" if self.has_heads else module)
        if found:
            self._found_non_finite = True
            self.note(
                f"{self.subject} are not finite {when} in {shorten(found)}: training goes on; look for a "
                "learning rate that is too high, or an overflow in half precision"
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

    def after_measuring(self, trainer: Trainer) -> None:
        """After a measurement that every process has: begin what is logged late."""

    def count_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave copies that do not train (teachers, references, averaged weights) out of aggregates."""
        history = self.history
        assert history is not None  # remember_layers comes before the first measurement
        self._counted = None
        names = [self.module_of(name) for name in self.labels]
        training = training_layers(trainer, pl_module, names)
        frozen = [name for name in self.labels if self.module_of(name) not in training]
        if not frozen:
            return
        counts = [self.module_of(name) in training for name in self.labels]
        self._counted = torch.tensor(counts).repeat_interleave(torch.tensor(history.heads))
        self.note(
            f"{shorten(frozen)} do not train, beside others that do: they keep keys of their own, and means, "
            f"minima and maxima over the model ({self.group}/…/mean) are without them"
        )

    def module_of(self, name: str) -> str:
        """Qualified name of the module that a watched name stands for."""
        return name
