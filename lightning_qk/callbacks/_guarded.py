"""Hooks that a monitor's own failure never leaves: training goes on without the monitor."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch
from lightning.pytorch import Trainer

from lightning_qk.callbacks._event_log import write_events
from lightning_qk.callbacks._ranks import all_or_none, finish_together, has_others, reason_of
from lightning_qk.callbacks._trainer import describe_error, logging_step, say
from lightning_qk.callbacks.callback import Callback
from lightning_qk.record.events import Event

_T = TypeVar("_T")

MOST_FAILURES = 3
"""After so many failures one after the other something is not tried again."""

HOOKS = frozenset(
    name
    for name, value in vars(lightning.pytorch.Callback).items()
    if callable(value) and not name.startswith("_")
)
"""Names of everything that a trainer calls on a callback."""

# What still runs on a monitor that watches nothing (any more): a new start, and the end.
_ALWAYS = (
    "setup",
    "on_fit_start",
    "teardown",
    "on_train_end",
    "on_exception",
    "state_dict",
    "load_state_dict",
)


class Refused(ValueError):
    """A monitor with ``on_unreadable="raise"`` refuses a model: the only exception that leaves its hooks."""


class GuardedHooks(ABC):
    """Base of callbacks none of whose hooks raises.

    Every hook that a subclass defines is wrapped. An exception in it goes to :meth:`hook_failed`;
    :class:`Refused`, and what is no ``Exception`` (KeyboardInterrupt, SystemExit), pass. A hook that calls that of
    its base class is one hook.
    """

    idle: bool = False
    """Whether there is nothing to watch: hooks other than those of start and end do nothing then."""
    _inside: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in HOOKS & vars(cls).keys():
            setattr(cls, name, _guarded(name, vars(cls)[name]))

    @abstractmethod
    def hook_failed(self, hook: str, error: Exception) -> None:
        """Deal with what a hook raised; may not raise."""


def _guarded(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def guarded(self: GuardedHooks, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return hook(self, *args, **kwargs)
        if self.idle and name not in _ALWAYS:
            return None
        self._inside = True
        try:
            return hook(self, *args, **kwargs)
        except Refused:
            raise
        except Exception as error:
            self.hook_failed(name, error)
            return {} if name == "state_dict" else None
        finally:
            self._inside = False

    return guarded


class Attempts(GuardedHooks, Callback):
    """Base of callbacks that give up what fails, on all processes alike where others wait for it, and say so once.

    Attributes:
        notes: what was said, for the report.
    """

    def begin(self) -> None:
        """Nothing was said and nothing failed yet."""
        super().begin()
        self.notes: list[str] = []
        # What failed on this process alone: the others learn of it at the next measurement.
        self._failure: Exception | None = None
        self.forget_failures()

    def forget_failures(self) -> None:
        """Try everything again."""
        self.idle = False
        # What → how many times in a row it failed on this process; no other process waits for it.
        self._failed: dict[str, int] = {}
        # Measurements lost one after the other: the same number on every process.
        self._lost_in_a_row = 0

    def release(self) -> None:
        """Remove every hook from the model, and end what runs beside the training."""

    def stop(self) -> None:
        """Watch nothing from here on; training goes on."""
        self.idle = True
        try:
            self.release()
        except Exception as error:
            self.note(f"its hooks could not be removed from the model ({describe_error(error)})")

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
        if has_others() and not ends:
            # The other processes are not left alone: at the next measurement it is given up on all of them.
            self._failure = error
            return
        self.stop()

    def here(self, action: Callable[[], None], *, always: bool = False) -> None:
        """Do something on this process alone; every process learns of its failure at the next measurement.

        Args:
            action: what to do.
            always: even where something has failed here before that the others do not know of yet.
        """
        if self._failure is not None and not always:
            return
        try:
            action()
        except Exception as error:
            self._failure = self._failure or error

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

        After failures one after the other, on any process, it is not tried again on any.

        Args:
            trainer: the trainer.
            action: what may make collective calls; see :func:`~lightning_qk.callbacks._ranks.finish_together`.

        Returns:
            What the action returned, or None where it failed on some process or is not tried any more.
        """
        if self.gave_up:
            return None
        try:
            all_or_none(trainer, self.check_whole)
            value = finish_together(trainer, action)
        except Exception as error:
            self.count_measurement(error)
            return None
        self.count_measurement(None)
        return value

    def count_measurement(self, error: Exception | None) -> None:
        """Count measurements that were lost one after the other, the same on every process."""
        if error is None:
            self._lost_in_a_row = 0
            return
        self._lost_in_a_row += 1
        self._note_failure("measuring", self._lost_in_a_row, error)

    @property
    def gave_up(self) -> bool:
        """Whether nothing is measured any more, the same on every process."""
        return self._lost_in_a_row >= MOST_FAILURES

    def check_whole(self) -> None:
        """Raises what has failed on this process, where the others do not know of it yet."""
        if self._failure is not None:
            raise self._failure

    def _note_failure(self, what: str, times: int, error: Exception) -> None:
        reason = reason_of(error)
        if times >= MOST_FAILURES:
            self.note(f"it stopped {what} after {times} failures in a row ({reason}); training goes on")
        elif times == 1:
            self.note(f"{what} failed once ({reason}); it is tried again, and training goes on")

    def note(self, sentence: str, kind: str = "note", *, where: str = "", step: int | None = None) -> None:
        """Say something once, in the log, in the report and in the file of events.

        Args:
            sentence: what is said.
            kind: what it is as an event, see :data:`~lightning_qk.record.events.KINDS`.
            where: the layer.
            step: that it is about; None for the one that the trainer is at.
        """
        if sentence in self.notes:
            return
        self.notes.append(sentence)
        trainer, _ = self.running()
        told = sentence
        what, colon, _ = sentence.partition(": ")
        # A layer that no monitor can measure has its reason once.
        if colon and any(
            other is not self and sentence in getattr(other, "notes", ())
            for other in (trainer.callbacks if trainer is not None else ())
        ):
            told = f"{what}, as said above"
        say(f"{type(self).__name__}: {told}")
        if trainer is not None:
            at = logging_step(trainer) if step is None else step
            write_events(trainer, [Event(at, kind, type(self).__name__, sentence, where)])
