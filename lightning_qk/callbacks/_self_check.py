"""One check of a fit's model, shared by all callbacks: is what is read of it what its attention computes with?"""

import weakref
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.verification import SelfCheck, Status, Verified, summary

# Training batches that are looked at until every layer was called: networks may take turns.
_BATCHES = 4
# By how much one process may know more than another: the worst word counts.
_RANKING = (Status.UNCHECKED, Status.VERIFIED, Status.REREAD, Status.DIFFERS)


def shorten(names: Sequence[str]) -> str:
    """The first three of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class FitCheck:
    """The self-check of one fit: begun with a training batch, ended before anybody acts on what was read.

    Whichever callback comes first does the work: :meth:`begin` before a batch, :meth:`end` before its first
    optimizer step or after it. What is found is known to every reader of the model at its next ``refresh``.

    Attributes:
        verdicts: qualified layer name → what was found, the same on every process; empty until :meth:`end`.
        lines: what was found in words, for the log and the report.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.verdicts: dict[str, Verified] = {}
        self.lines: list[str] = []
        self._module = weakref.ref(pl_module)
        self._batches = 0
        self._is_looking = False
        self._is_over = False
        self._check: SelfCheck | None = None
        try:
            reader = ProjectionReader(pl_module, root=trainer.strategy.model, allow_empty=True)
            if reader.layers or reader.unread:
                self._check = SelfCheck(pl_module, reader)
        except Exception as error:
            self._give_up(error)

    def begin(self) -> None:
        """Look at the forwards of the batch that comes, where layers are left that were not called."""
        if self._check is None or self._is_looking or self._is_over:
            return
        try:
            self._check.install()
            self._is_looking = True
        except Exception as error:
            self._give_up(error)

    def end(self, trainer: Trainer) -> None:
        """Stop to look, agree with the other processes, and let all readers know; a collective call.

        Every process calls it at the same places: after the forwards of a batch that :meth:`begin` preceded.
        """
        if self._is_over or (self._check is None and trainer.world_size == 1):
            return
        is_first, self._batches = self._batches == 0, self._batches + 1
        self._is_looking = False
        own: dict[str, Verified] = {}
        if self._check is not None:
            try:
                self._check.remove()
                own = self._check.conclude()
            except Exception as error:
                self._give_up(error)
        self._is_over = self._batches >= _BATCHES
        agreed = _agreed(trainer, own)
        if agreed is None:
            self._is_over = True
            return
        before, self.verdicts = self.verdicts, agreed
        if self._check is not None:
            self._check.settle(agreed)
        missing = [name for name, verdict in agreed.items() if verdict.status is Status.UNCHECKED]
        self._is_over = self._is_over or not missing
        if (is_first or before != agreed) and agreed:
            self._say()

    def remove(self) -> None:
        """Leave the model as it was."""
        self._is_looking, self._is_over = False, True
        if self._check is not None:
            self._check.remove()

    def _say(self) -> None:
        lines = summary(self.verdicts, shorten)
        for place, line in enumerate(lines):
            if line in self.lines:
                continue
            if place and ": " in line and "left out" in line:
                rank_zero_warn(f"lightning-qk: {line}")
            else:
                rank_zero_info(f"lightning-qk: {line}")
        self.lines = lines

    def _give_up(self, error: Exception) -> None:
        self._check = None
        rank_zero_warn(
            "lightning-qk: what was read of the attention layers is not verified "
            f"({type(error).__name__}: {error}); training goes on"
        )


_CHECKS: "weakref.WeakKeyDictionary[LightningModule, tuple[int, FitCheck]]" = weakref.WeakKeyDictionary()


def fit_check(trainer: Trainer, pl_module: LightningModule) -> FitCheck:
    """The check of the fit that runs, made by the first callback that asks; from ``on_fit_start``."""
    known = _CHECKS.get(pl_module)
    if known is None or known[0] != id(trainer.fit_loop):
        known = _CHECKS[pl_module] = id(trainer.fit_loop), FitCheck(trainer, pl_module)
    return known[1]


def forget_check(pl_module: LightningModule) -> None:
    """End the check of a fit; a next fit makes its own."""
    known = _CHECKS.pop(pl_module, None)
    if known is not None:
        known[1].remove()


def _agreed(trainer: Trainer, own: dict[str, Verified]) -> dict[str, Verified] | None:
    """What all processes can act on: a layer that differs on one is left out on all; None where they cannot agree.

    A collective call. Layers that were read again on some processes and not called on others are left out too,
    since the others do not know how to read them.
    """
    distributed = torch.distributed
    if trainer.world_size == 1 or not (distributed.is_available() and distributed.is_initialized()):
        return own
    known = {name: _RANKING.index(verdict.status) for name, verdict in own.items()}
    every: list[dict[str, int]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(every, known)
    if any(other.keys() != known.keys() for other in every):
        return None
    agreed = {}
    for name, verdict in own.items():
        words = [_RANKING[other[name]] for other in every]
        worst = max(words, key=_RANKING.index)
        if worst is Status.REREAD and any(word is not Status.REREAD for word in words):
            reason = "it has to be read by running it as it was called, and was not called on every process"
            verdict = Verified(Status.DIFFERS, verdict.query, verdict.key, reason)
        elif worst is Status.DIFFERS and verdict.status is not Status.DIFFERS:
            reason = "on another process its queries or keys are not W x + b as read from its weights"
            verdict = Verified(Status.DIFFERS, verdict.query, verdict.key, reason)
        elif worst is Status.VERIFIED and verdict.status is Status.UNCHECKED:
            verdict = Verified(Status.VERIFIED, verdict.query, verdict.key)
        agreed[name] = verdict
    return agreed
