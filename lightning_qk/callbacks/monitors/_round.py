"""One measurement of a step by all monitors that are due, with as few collective calls as one of them would make.

Monitors do their parts side by side: each prepares on its own process, all sums and maxima are reduced in two
collective calls, all values come to the host in one copy, and a third collective call tells every process whose
part has failed and completes what one process could not compute. Whatever fails on one process is given up on all
of them, and no process waits for another.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.callbacks._ranks import (
    FailedTogether,
    combine,
    every_process,
    failed_together,
    fill_from_others,
    is_distributed,
    reduce_packed,
    widest,
)
from lightning_qk.callbacks._trainer import describe_error

_T = TypeVar("_T")


class Measuring(Protocol):
    """What a measurement asks of a monitor, see :class:`~lightning_qk.callbacks.monitors.Monitor`."""

    states: Tensor | None

    def check_whole(self) -> None: ...
    def here(self, action: Callable[[], None], *, always: bool = False) -> None: ...
    def count_measurement(self, error: Exception | None) -> None: ...
    def remember_step(
        self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]
    ) -> None: ...
    def gaps(self, part: Any) -> dict[str, Tensor]: ...
    def filled(self, part: Any, values: dict[str, Tensor]) -> None: ...
    def publish(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]) -> None: ...


class Part:
    """What one monitor does in a measurement. Methods are called in the order in which they stand here.

    What raises in one of them ends the part, on every process; the others go on.

    Args:
        monitor: whose part it is.
        trainer: the trainer.
        pl_module: its module.

    Attributes:
        error: why the part has ended, or None; the same on every process when values are published.
        metrics: their states are reduced over processes; of the same shapes on every process.
        values: statistic → flat values of all heads on the host; None where there is nothing to measure.
    """

    def __init__(self, monitor: Measuring, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor, self.trainer, self.pl_module = monitor, trainer, pl_module
        self.error: Exception | None = None
        self.metrics: Sequence[Metric] = ()
        self.values: dict[str, Tensor] | None = None

    def attempt(self, action: Callable[[], _T]) -> _T | None:
        """Do something unless the part has ended; what it raises ends it."""
        if self.error is not None:
            return None
        try:
            return action()
        except Exception as error:
            self.error = error
            return None

    def is_new(self) -> bool:
        """Whether shapes are not settled yet, the same on every process: two more collective calls settle them."""
        return False

    def facts(self) -> Sequence[Sequence[int]]:
        """Where it is new: whole numbers of which every process learns the largest. May not fail."""
        return ()

    def settle(self, facts: Sequence[Sequence[int]]) -> None:
        """Where it is new: build :attr:`metrics` by the largest of each of :meth:`facts`."""

    def unsettle(self) -> None:
        """Where :meth:`settle` failed on some process: nothing is reduced now, and shapes are new again."""
        self.metrics = ()

    def prepare(self) -> None:
        """Fill :attr:`metrics` with what this process has."""

    def words(self) -> Sequence[float]:
        """Numbers of which every process gets the largest, always as many. May not fail."""
        return ()

    def results(self) -> Sequence[Tensor]:
        """What is computed of the reduced states, on the device."""
        return ()

    def agree(self, words: Sequence[float]) -> bool:
        """Take the largest of all words.

        Returns:
            Whether :meth:`reasons` are to be exchanged, the same on every process.
        """
        return False

    def reasons(self) -> Any:
        """What the other processes want to know."""
        return None

    def learn(self, reasons: Sequence[Any]) -> None:
        """Take the reasons of all processes."""

    def conclude(self, results: Sequence[Tensor]) -> None:
        """Make :attr:`values` of the results, which are on the host now."""

    def remember(self) -> None:
        """Keep the values, before anything is logged."""
        self.monitor.remember_step(self.trainer, self.pl_module, self.values or {})

    def gaps(self) -> dict[str, Tensor]:
        """Values that another process may have where they are NaN here; always the same names and shapes."""
        return self.monitor.gaps(self)

    def filled(self, values: dict[str, Tensor]) -> None:
        """Take the values of :meth:`gaps`, which are the same on every process now."""
        self.monitor.filled(self, values)

    def publish(self) -> None:
        """Log the values, on every process."""
        self.monitor.publish(self.trainer, self.pl_module, self.values or {})

    def close(self) -> None:
        """Let go of what was measured; called in any case."""


def measure_together(parts: Sequence[Part]) -> None:
    """Measure what all parts are of; collective calls, three of them where no shape is new and nothing fails.

    Every process comes with parts of the same monitors, in the same order. What fails is noted by the monitor.

    Args:
        parts: of one trainer; one at least.
    """
    try:
        _measure(parts[0].trainer, parts)
    finally:
        for part in parts:
            part.close()


def _measure(trainer: Trainer, parts: Sequence[Part]) -> None:
    _settle(trainer, parts)
    for part in parts:
        part.attempt(part.prepare)
    words = [[float(part.error is not None), *part.words()] for part in parts]
    largest = reduce_packed(
        trainer,
        [metric for part in parts for metric in part.metrics],
        [word for own in words for word in own],
    )
    results = [part.attempt(part.results) or () for part in parts]
    largest, *rest = _to_host([largest, *(tensor for own in results for tensor in own)])
    _agree(trainer, parts, largest.numpy().tolist(), [len(own) for own in words])
    for part, own in zip(parts, results, strict=True):
        on_host, rest = rest[: len(own)], rest[len(own) :]
        part.attempt(partial(part.conclude, on_host))
    for part in parts:
        if part.values is not None:
            part.attempt(part.remember)
    _fill(trainer, parts)
    for part in parts:
        part.monitor.count_measurement(part.error)
        if part.error is None and part.values is not None:
            part.monitor.here(part.publish, always=True)


def _settle(trainer: Trainer, parts: Sequence[Part]) -> None:
    """Agree on the shapes of what is reduced, where they are new."""
    new = [part for part in parts if part.is_new()]
    if not new:
        return
    facts = [[(), *part.facts()] for part in new]
    largest = iter(_largest(trainer, [row for own in facts for row in own]))
    for part, own in zip(new, facts, strict=True):
        rows = [next(largest) for _ in own][1:]
        part.attempt(partial(part.settle, rows))
    failed = [bool(flag) for (flag,) in _largest(trainer, [(int(part.error is not None),) for part in new])]
    _give_up(trainer, new, failed, [False] * len(new))
    for part, has_failed in zip(new, failed, strict=True):
        if has_failed:
            part.unsettle()


def _largest(trainer: Trainer, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The largest of each number over processes; rows differ in length. A collective call."""
    flat = combine(trainer, [[number for row in rows for number in row]])[0]
    found = []
    for row in rows:
        own, flat = flat[: len(row)], flat[len(row) :]
        found.append(own)
    return found


def _agree(trainer: Trainer, parts: Sequence[Part], words: Sequence[float], counts: Sequence[int]) -> None:
    """Give every part the largest words, and end those that have failed on some process."""
    failed, asks = [], []
    for part, count in zip(parts, counts, strict=True):
        own, words = words[:count], words[count:]
        failed.append(own[0] > 0)
        # Before what has failed here alone since: all take part in what follows of it.
        asks.append(not failed[-1] and part.agree(own[1:]))
    _give_up(trainer, parts, failed, asks)


def _give_up(trainer: Trainer, parts: Sequence[Part], failed: Sequence[bool], asks: Sequence[bool]) -> None:
    """End parts on every process and exchange reasons; a collective call where there is something to say."""
    if not any(failed) and not any(asks):
        return
    own = [
        (None if part.error is None else describe_error(part.error), part.reasons() if is_asked else None)
        for part, is_asked in zip(parts, asks, strict=True)
    ]
    every = every_process(trainer, own)
    for index, part in enumerate(parts):
        if failed[index] and is_distributed(trainer) and not isinstance(part.error, FailedTogether):
            part.error = failed_together([of_rank[index][0] for of_rank in every], part.error)
        if asks[index]:
            part.attempt(partial(part.learn, [one[index][1] for one in every]))


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host, by one copy from the device; of the type that holds all numbers."""
    wide = widest(tensors[0].device)
    flat = torch.cat([tensor.detach().reshape(-1).to(tensors[0].device, wide) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _fill(trainer: Trainer, parts: Sequence[Part]) -> None:
    """Let processes complete each other's values, and end what has failed on some of them since."""
    gaps = {(part, name): value for part in parts for name, value in part.gaps().items()}
    flags = torch.tensor([float(part.error is not None) for part in parts])
    # The mean over processes: none of what failed nowhere.
    filled = fill_from_others(trainer, {(None, ""): flags} | gaps)
    failed = (filled[None, ""] > 0).numpy().tolist()
    _give_up(trainer, parts, failed, [False] * len(parts))
    for part in parts:
        own = {name: value for (whose, name), value in filled.items() if whose is part}
        part.monitor.here(partial(part.filled, own), always=True)
