"""Which layers a monitor watches, and what it says of those that it does not."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._guarded import Attempts, Refused
from lightning_qk.callbacks._layers import Patterns, matching, training_layers
from lightning_qk.callbacks._ranks import FailedTogether, all_or_none
from lightning_qk.callbacks.monitors._keys import LogKeys
from lightning_qk.record.history import History

OnUnreadable = Literal["warn", "raise"]


class Watching(LogKeys, Attempts):
    """The part of a monitor that finds its layers.

    Attributes:
        history: statistics of every head at the measured steps, without layers until they are found.
        labels: qualified layer name → label in log keys.
    """

    modules: Patterns
    on_unreadable: OnUnreadable

    def begin(self) -> None:
        """No layers are known yet."""
        super().begin()
        self.history = History([], [])
        self.labels: dict[str, str] = {}
        self.counted = None

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is to be watched, at the start of a fit; no collective call.

        Raises:
            ValueError: there is nothing.
        """

    def watched(self) -> Mapping[str, Any]:
        """Name of each module that is watched → facts that collective calls rely on to be everywhere the same."""
        return {}

    def remember_layers(self, heads: Mapping[str, int], labels: Mapping[str, str]) -> None:
        """Fix the layers; a new history begins where they are others than before (of a changed model).

        Args:
            heads: layer name → number of heads, in the model's order.
            labels: layer name → label in log keys, of these layers among others.
        """
        self.labels = {name: labels[name] for name in heads}
        layers = tuple(self.labels[name] for name in heads)
        if (self.history.layers, self.history.heads) != (layers, tuple(heads.values())):
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
        self.note(f"nothing is watched: {sentence}", "skipped")
        self.stop()
        return False

    def start_together(self, trainer: Trainer, find: Callable[[], None]) -> None:
        """Find what is watched, the same on every process; else be idle on all, or refuse on all."""
        try:
            all_or_none(trainer, find, facts=lambda _: repr((self.idle, self.watched())))
        except FailedTogether as error:
            if self.on_unreadable == "raise":
                raise Refused(str(error)) from error
            self.note(f"nothing is watched: {error}; training goes on", "skipped")
            self.stop()

    def note_left_out(self, reasons: Mapping[str, str]) -> None:
        """Name the layers that are not measured; those with the same reason in one sentence."""
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, own in reasons.items() if own == reason]
            verb = "is" if len(names) == 1 else f"({len(names)} layers) are"
            self.note(f"{shorten(names)} {verb} left out: {reason}", "skipped")

    def note_lost(self, reasons: Mapping[str, str]) -> None:
        """Say, once, that layers have no value at a step that was to be measured."""
        name, reason = next(iter(reasons.items()))
        more = f", as have {len(reasons) - 1} more layers" if len(reasons) > 1 else ""
        sentence = f"{name} has no value at one step{more}: {reason}; it is tried again, and training goes on"
        self.note(sentence, "skipped")

    def count_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave copies that do not train (teachers, references, averaged weights) out of aggregates."""
        self.counted = None
        names = [self.module_of(name) for name in self.labels]
        training = training_layers(trainer, pl_module, names)
        frozen = [name for name in self.labels if self.module_of(name) not in training]
        if not frozen:
            return
        counts = [self.module_of(name) in training for name in self.labels]
        self.counted = torch.tensor(counts).repeat_interleave(torch.tensor(self.history.heads))
        self.note(
            f"{shorten(frozen)} do not train, beside others that do: they keep keys of their own, and means, "
            f"minima and maxima over the model ({self.group}/…/mean) are without them"
        )

    def module_of(self, name: str) -> str:
        """Qualified name of the module that a watched name stands for."""
        return name
