"""The base of all callbacks: of both Lightning packages, with their arguments, order, state of a fit, record."""

import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch
from lightning.pytorch import Trainer
from torch import nn
from typing_extensions import Self

from lightning_qk._deprecated import OldName
from lightning_qk._packages import is_lightning, loaded_package
from lightning_qk.callbacks._event_log import resumed_steps
from lightning_qk.callbacks._types import annotations_of, check_types
from lightning_qk.record.history import RunRecord

EDITS, OBSERVES, SUMS_UP, MEASURES, JUDGES, WRITES = range(6)
"""Places among a trainer's callbacks: what may change weights, monitors, the one of them that judges by what all
have measured, what has them measure, a guard, what writes checkpoints."""


class Callback(lightning.pytorch.Callback):
    """Base of all callbacks here: a callback of ``lightning``, and of ``pytorch_lightning`` once that is imported.

    Trainers call hooks by name, whatever a callback's class is. The class is asked for by a trainer that is given
    one callback without a list, and by a LightningCLI.
    """

    live: ClassVar[tuple[str, ...]] = ()
    """Attributes of :meth:`begin` that only a running fit needs, such as hooks and threads. Copies and pickles
    have their first values; those of all bases count."""

    account = OldName("event_log")

    _fit: "tuple[weakref.ref[Any], weakref.ref[nn.Module]] | None" = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A callback, if its arguments are of the types that it says; copies and pickles come without any."""
        check_types(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(self) -> None:
        super().__init__()
        join_packages()
        self.begin()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            # The type of **options is for type checkers. Without it jsonargparse (LightningCLI) takes them from
            # the signature of the base that they are passed to, with defaults and help.
            cls.__init__.__annotations__.pop("options", None)

    @property
    def place(self) -> int:
        """Where it comes among a trainer's callbacks, see :func:`observe_last`."""
        return EDITS

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {name: _plain(getattr(self, name)) for name in arguments(type(self))}

    def contribute(self, record: RunRecord) -> None:
        """Add what this callback remembers to the run's record."""

    # State of one fit

    def begin(self) -> None:
        """Give everything that belongs to one fit its first value; a subclass adds its own."""
        self._fit = None
        # Whether there was no fit since.
        self._is_fresh = True

    def begin_fit(self, trainer: Any, pl_module: nn.Module) -> bool:
        """Begin, unless the same trainer, with steps behind it, fits the same module again; for ``setup``.

        Lightning loads a checkpoint after it.

        Returns:
            Whether it began.
        """
        before, model = self.running()
        begins = not (trainer.global_step > 0 and before is trainer and model is pl_module)
        if begins and not self._is_fresh:
            self.begin()
        self._is_fresh = False
        self._fit = weakref.ref(trainer), weakref.ref(pl_module)
        return begins

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember at which step the run goes on, for the file of events."""
        if trainer.state.fn == "fit":
            resumed_steps[trainer] = int(checkpoint.get("global_step", 0))

    def running(self) -> tuple[Any, Any]:
        """The trainer and the module of the fit; None where they are gone."""
        return (None, None) if self._fit is None else (self._fit[0](), self._fit[1]())

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is live, and the methods of the module that Lightning puts here."""
        left_out = {"_fit", "log", "log_dict"}.union(
            *(vars(kind).get("live", ()) for kind in type(self).__mro__)
        )
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self.begin()
        vars(self).update(state)


def join_packages() -> None:
    """Make the callbacks those of ``pytorch_lightning`` too, where this process has imported it."""
    other = loaded_package("pytorch_lightning")
    if other is not None and not issubclass(Callback, other.Callback):
        Callback.__bases__ = (lightning.pytorch.Callback, other.Callback)


join_packages()


def check_lightning(trainer: object, name: str) -> None:
    """Raises unless it is a Trainer of ``lightning`` or ``pytorch_lightning``.

    Raises:
        TypeError: it is another object.
    """
    join_packages()
    if not is_lightning(trainer, "Trainer"):
        raise TypeError(
            f"expected {name} in a Trainer of lightning.pytorch or pytorch_lightning, got "
            f"{type(trainer).__module__}.{type(trainer).__qualname__}: pass the callback to such a Trainer"
        )


def arguments(kind: type) -> list[str]:
    """Names of the arguments of a class, with those of the bases that its ``__init__`` passes ``**options`` to."""
    return list(annotations_of(kind))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return getattr(value, "__qualname__", "function") if callable(value) else value


def observe_last(trainer: Trainer) -> None:
    """Move monitors behind all other callbacks, but before those that write checkpoints.

    A monitor reads the weights in the hook in which QKClip, weight averaging or a callback of the user's own
    changes them, and hooks run in the order of the list. What it logs is then what the step's checkpoint has. A
    guard whose remedies edit counts as an editor; another one comes behind the monitors that it reads, so that it
    acts on a step at once. Otherwise nothing changes its order.

    To be called in ``setup``. Lightning goes on with the list that it began with, and every later hook has the new
    one.
    """
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    ordered = sorted(callbacks, key=_place)
    if any(one is not other for one, other in zip(callbacks, ordered, strict=True)):
        trainer.callbacks = ordered  # type: ignore[attr-defined]


def _place(callback: Any) -> int:
    if isinstance(callback, Callback):
        return callback.place
    homes = ("lightning.pytorch.", "pytorch_lightning.")
    # Lightning, of either package, moves them to the end.
    writes = any(
        base.__name__ == "Checkpoint" and base.__module__.startswith(homes) for base in type(callback).__mro__
    )
    return WRITES if writes else EDITS
