"""Where monitors stand among a trainer's callbacks: behind everything that may change weights."""

from lightning.pytorch import Callback, Trainer


def observe_last(trainer: Trainer) -> None:
    """Move monitors behind all other callbacks, but before those that write checkpoints.

    A monitor reads the weights in the hook in which QKClip, weight averaging or a callback of the user's own
    changes them, and hooks run in the order of the list. What it logs is then what the step's checkpoint has. A
    guard whose remedies edit counts as an editor; another one comes behind the monitors that it reads, so that it
    acts on a step at once. Otherwise nothing changes its order.

    To be called in ``setup``. Lightning goes on with the list that it began with, and every later hook has the new
    one.
    """
    from lightning_qk.callbacks.guard.guard import CollapseGuard
    from lightning_qk.callbacks.monitors._base import Monitor

    def place(callback: Callback) -> int:
        if _writes_checkpoints(callback):
            return 3
        if isinstance(callback, CollapseGuard):
            return 0 if callback.remedies else 2
        return 1 if isinstance(callback, Monitor) else 0

    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    ordered = sorted(callbacks, key=place)
    if any(one is not other for one, other in zip(callbacks, ordered, strict=True)):
        trainer.callbacks = ordered  # type: ignore[attr-defined]


def _writes_checkpoints(callback: Callback) -> bool:
    """Whether Lightning, of either package, moves it to the end."""
    homes = ("lightning.pytorch.", "pytorch_lightning.")
    return any(
        base.__name__ == "Checkpoint" and base.__module__.startswith(homes) for base in type(callback).__mro__
    )
