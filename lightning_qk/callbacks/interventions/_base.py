"""What all callbacks that change a training have in common: what belongs to one fit, and what is kept of it.

They refuse at the start, in one sentence. Once training has begun they raise nothing: what cannot be changed any
more is left alone, which is said once.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._self_check import add_self_check
from lightning_qk.callbacks._trainer import Callback, say
from lightning_qk.callbacks.monitors._base import shorten

When = Literal["always", "unfrozen"]

# Where states are kept in a checkpoint: by Lightning's own key of a callback, and which of those that share it.
KEY = "lightning_qk"


class Intervention(Callback):
    """Base of the callbacks that change weights, gradients or attention calls.

    What belongs to one fit is made in :meth:`begin`, which ``__init__`` and the ``setup`` of each fit call: a
    second fit with the same object is that of a new one. A checkpoint is restored after ``setup``.
    """

    reads_weights: ClassVar[bool] = True
    """Whether it acts on query and key weights as they are read, which are checked then."""
    live: ClassVar[Mapping[str, Callable[[], Any]]] = {}
    """Attributes that hold parts of a running model or trainer, and what they are in a copy or a pickle."""

    def __init__(self) -> None:
        super().__init__()
        self._is_fit = True
        self.begin()

    def begin(self) -> None:
        """Forget the fit before; a subclass adds its own."""
        self._said: set[str] = set()
        # How many times it has agreed with other processes.
        self.agreements = 0
        self._cannot_log = False

    def begin_stage(self, trainer: Trainer, stage: str) -> None:
        """To be called first in ``setup``."""
        self._is_fit = stage == "fit"
        if self._is_fit:
            self.begin()
            if self.reads_weights:
                add_self_check(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to a running model."""
        idle = {name: make() for name, make in self.live.items() if name in self.__dict__}
        kept = {**self.__dict__, **idle}
        for name in ("log", "log_dict"):  # Lightning puts the module's own there
            kept.pop(name, None)
        return kept

    # Checkpoints

    def kept(self) -> dict[str, Any]:
        """What a resumed run has to know, as tensors on the CPU and plain values."""
        return {}

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """Go on where :meth:`kept` was called."""

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what a resumed run has to know."""
        kept = self.kept()
        if kept:
            checkpoint.setdefault(KEY, {})[self._place(trainer)] = kept

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with what was kept; a test or validation from a checkpoint changes nothing."""
        states = checkpoint.get(KEY)
        kept = states.get(self._place(trainer)) if isinstance(states, Mapping) else None
        if kept and self._is_fit:
            self.go_on(copy.deepcopy(kept))

    def _place(self, trainer: Trainer) -> str:
        """Which callback this is. Not in ``state_dict``: Lightning refuses two of one key that have one."""
        same = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Intervention) and callback.state_key == self.state_key
        ]
        number = next((index for index, callback in enumerate(same) if callback is self), 0)
        return f"{self.state_key}#{number}"

    # Several processes

    def agrees_in(self, hook: str, *, has_stepped: bool) -> bool:
        """Whether a hook begins its collective calls with :func:`~lightning_qk.callbacks._ranks.agree`.

        Who calls the hooks and finds that one has raised before that, on one process alone, agrees in its place.

        Args:
            hook: its name.
            has_stepped: whether the optimizer has stepped since the batch began.
        """
        return False

    # What is said

    def say(self, sentence: str, key: str | None = None) -> None:
        """Warn once.

        Args:
            sentence: what is said.
            key: what makes it the same sentence; None: itself.
        """
        key = sentence if key is None else key
        if key not in self._said:
            self._said.add(key)
            say(f"{type(self).__name__}: {sentence}")

    def log_safely(self, action: Callable[[], None]) -> None:
        """Send something to loggers; one that raises ends the sending and not the run. No collective calls."""
        if self._cannot_log:
            return
        try:
            action()
        except Exception as error:
            self._cannot_log = True
            self.say(f"nothing more is logged ({type(error).__name__}: {error}); it goes on to work")


class StatefulIntervention(Intervention):
    """Base of those that keep their state where Lightning keeps callbacks' own, and a guard its remedies'."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return self.kept()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as in a checkpoint."""
        if self._is_fit:
            self.go_on(state_dict)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nothing: ``state_dict`` is kept."""


def check_when(when: str) -> None:
    """Check the argument.

    Raises:
        ValueError: it is none of the two.
    """
    if when not in get_args(When):
        raise ValueError(
            f"expected when to be 'always' or 'unfrozen', got {when!r}: 'unfrozen' begins with a layer once its "
            "weights train"
        )


def refuse_frozen(names: Sequence[str], when: When) -> None:
    """Refuse layers whose query or key weights are frozen at the start, unless they are to be waited for.

    Raises:
        ValueError: there are some.
    """
    if names and when == "always":
        raise ValueError(
            f"expected query and key weights that train, got frozen ones in {shorten(names)}: pass "
            "when='unfrozen' to begin with a layer once its weights train, leave such layers out with modules=, "
            "or unfreeze them"
        )
