"""What all callbacks that change a training share: setup, key, patterns, event log, resume.

They refuse at the start, in one sentence. Once training has begun they raise nothing: what cannot be changed any
more is left alone, which is said once.
"""

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch import LightningModule, Trainer

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._event_log import EventLog, write_events
from lightning_qk.callbacks._layers import Patterns, kept_patterns
from lightning_qk.callbacks._self_check import add_self_check
from lightning_qk.callbacks._trainer import describe_error, is_logged_step, logging_step, say
from lightning_qk.callbacks.callback import Callback, check_lightning
from lightning_qk.loggers.loggers import describe_config, log_scalars
from lightning_qk.record.events import Event
from lightning_qk.record.history import RunRecord

When = Literal["always", "unfrozen"]

# Where states are kept in a checkpoint: by Lightning's own key of a callback, and which of those that share it.
KEY = "lightning_qk"


class Intervention(Callback):
    """Base of the callbacks that change weights, gradients or attention calls.

    Each ``setup`` of a fit calls :meth:`begin`: a second fit with the same object is that of a new one. A
    checkpoint is restored after ``setup``.

    Args:
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        name: part of the log keys, which tells several of these callbacks in one trainer apart; None for no part.

    Attributes:
        event_log: curves and events for the run's report.
    """

    reads_weights: ClassVar[bool] = True
    """Whether it acts on query and key weights as they are read, which are checked then."""

    group: str
    """Prefix of the log keys."""

    def __init__(self, modules: Patterns = None, name: str | None = None) -> None:
        self.name = name
        self.modules = kept_patterns(modules)
        self._is_fit = True
        super().__init__()

    def begin(self) -> None:
        """Forget the fit before; a subclass adds its own."""
        super().begin()
        self.event_log = EventLog()
        self._said: set[str] = set()
        # How many times it has agreed with other processes.
        self.agreements = 0
        self._cannot_log = False
        # Whether the step that the current batch belongs to is logged, and the trainer's step before the batch.
        self._is_due = False
        self._steps_before = 0

    @property
    def state_key(self) -> str:
        """Several of these can be in one trainer, on other modules."""
        named = {} if self.name is None else {"name": self.name}
        return self._generate_state_key(modules=self.modules, **named)

    @property
    def prefix(self) -> str:
        """Prefix of the log keys, with the name."""
        return self.group if self.name is None else f"{self.group}/{self.name}"

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer and the strategy before any work, and put the settings into the run's config."""
        self.release()
        self._is_fit = stage == "fit"
        check_lightning(trainer, type(self).__name__)
        if not self._is_fit:
            return
        self.begin()
        self._fit = weakref.ref(trainer), weakref.ref(pl_module)
        self.check_strategy(trainer)
        if self.reads_weights:
            add_self_check(trainer)
        describe_config(trainer, {self.title(trainer): self.settings()})

    def check_strategy(self, trainer: Trainer) -> None:
        """Refuse a strategy or a set of callbacks under which it cannot work.

        Raises:
            ValueError: it cannot.
        """

    def title(self, trainer: Trainer) -> str:
        """Its name in the run's config."""
        return type(self).__name__ if self.name is None else f"{type(self).__name__} {self.name}"

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find out whether the step is logged."""
        # With an optimizer that is stepped by hand, the step may come with a later batch.
        self._is_due = self._is_due or is_logged_step(trainer, None)
        self._steps_before = trainer.global_step

    def has_stepped(self, trainer: Trainer) -> bool:
        """Whether the optimizer has stepped since the batch began."""
        return trainer.global_step != self._steps_before

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was: teardown may not follow."""
        self.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self.release()

    def release(self) -> None:
        """Remove every hook from the model, the optimizers and the attention interface."""

    # Checkpoints and the report

    def kept(self) -> dict[str, Any]:
        """What a resumed run has to know, as tensors on the CPU and plain values."""
        return {"account": self.event_log.state_dict()}

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """Go on where :meth:`kept` was called."""
        self.event_log.load_state_dict(kept.get("account", {}))
        write_events(self.running()[0], self.event_log.kept)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what a resumed run has to know."""
        checkpoint.setdefault(KEY, {})[self._index(trainer)] = self.kept()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with what was kept; a test or validation from a checkpoint changes nothing."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        states = checkpoint.get(KEY)
        kept = states.get(self._index(trainer)) if isinstance(states, Mapping) else None
        # Where older versions kept the state of LocAteR and QKClip.
        kept = kept or checkpoint.get("callbacks", {}).get(self.state_key)
        if kept and self._is_fit:
            self.go_on(copy.deepcopy(kept))

    def _index(self, trainer: Trainer) -> str:
        """Which callback this is. Not in ``state_dict``: Lightning refuses two of one key that have one."""
        same = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Intervention) and callback.state_key == self.state_key
        ]
        number = next((index for index, callback in enumerate(same) if callback is self), 0)
        return f"{self.state_key}#{number}"

    def contribute(self, record: RunRecord) -> None:
        """Add curves and events to the run's record."""
        self.event_log.contribute(record)

    # Several processes

    def agrees_in(self, hook: str, *, has_stepped: bool) -> bool:
        """Whether a hook begins its collective calls with :func:`~lightning_qk.callbacks._ranks.agree`.

        A guard that calls the hooks, and finds that one has raised before that on one process alone, agrees in its
        place.

        Args:
            hook: its name.
            has_stepped: whether the optimizer has stepped since the batch began.
        """
        return False

    # What is said and logged

    def say(self, sentence: str, key: str | None = None, *, kind: str = "skipped", where: str = "") -> None:
        """Warn once.

        Args:
            sentence: what is said.
            key: what makes it the same sentence; None: itself.
            kind: what it is as an event, see :data:`~lightning_qk.record.events.KINDS`.
            where: the layer.
        """
        key = sentence if key is None else key
        if key not in self._said:
            self._said.add(key)
            say(f"{type(self).__name__}: {sentence}")
            self._write(self._event(kind, sentence, where=where))

    def happened(
        self, kind: str, sentence: str, *, where: str, value: float = math.nan, threshold: float = math.nan
    ) -> None:
        """Remember an event of this step, for the report and the file of events.

        Args:
            kind: see :data:`~lightning_qk.record.events.KINDS`.
            sentence: what happened.
            where: label of the layer, or of a head of it.
            value: the number that it is about.
            threshold: what that was compared with.
        """
        event = self._event(kind, sentence, where=where, value=value, threshold=threshold)
        self.event_log.add_event(event)
        self._write(event)

    def _event(self, kind: str, sentence: str, **facts: Any) -> Event:
        trainer, _ = self.running()
        step = 0 if trainer is None else logging_step(trainer)
        name = "" if self.name is None else f" {self.name}"
        return Event(step, kind, f"{type(self).__name__}{name}", sentence, **facts)

    def _write(self, event: Event) -> None:
        write_events(self.running()[0], [event])

    def log_safely(self, action: Callable[[], None]) -> None:
        """Send something to loggers; one that raises ends the sending and not the run. No collective calls."""
        if self._cannot_log:
            return
        try:
            action()
        except Exception as error:
            self._cannot_log = True
            self.say(f"nothing more is logged ({describe_error(error)}); it goes on to work")

    def log_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        overall: Mapping[str, float],
        by_layer: Mapping[str, float],
    ) -> None:
        """Log numbers of the whole model, also as curves of the report; those of layers to the loggers alone."""
        step = logging_step(trainer)
        pl_module.log_dict(dict(overall), logger=False, on_step=True, on_epoch=False)
        self.event_log.add_points(step, overall)
        self.log_safely(lambda: log_scalars(trainer, {**overall, **by_layer}, step))


def check_when(when: str) -> None:
    """Check the argument.

    Raises:
        ValueError: it is another string.
    """
    if when not in get_args(When):
        raise ValueError(
            f"expected when to be 'always' or 'unfrozen', got {when!r}: 'unfrozen' begins with a layer once its "
            "weights train"
        )


def refuse_frozen(names: Sequence[str], when: When) -> None:
    """Refuse layers with query or key weights that are frozen at the start, unless they are to be waited for.

    Raises:
        ValueError: there are some.
    """
    if names and when == "always":
        raise ValueError(
            f"expected query and key weights that train, got frozen ones in {shorten(names)}: pass "
            "when='unfrozen' to begin with a layer once its weights train, leave such layers out with modules=, "
            "or unfreeze them"
        )
