"""What the monitors that listen to a running model share: the capture, its pool, which layers are left out."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk.callbacks._guarded import MOST_FAILURES
from lightning_qk.callbacks._ranks import alone, first_of_each
from lightning_qk.callbacks.monitors._base import Monitor
from lightning_qk.callbacks.monitors._round import Part
from lightning_qk.capture.hidden import HiddenCapture
from lightning_qk.metrics.collector import AttentionCollector, SumAccumulator
from lightning_qk.record.states import DID_NOT_RUN, KNOWN, LEFT_OUT, NO_DATA, NOT_FINITE


class ListeningMonitor(Monitor):
    """Base of the monitors that measure calls of a running model, pooled over micro-batches and processes.

    A layer that cannot be read on one process is left out on all: a mean over some of the batch would be taken for
    one over all of it.
    """

    live: ClassVar[tuple[str, ...]] = ("_capture", "_generator", "_step_pool", "_pool", "step_metrics")

    seed: int

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self._capture: AttentionCollector | HiddenCapture | None = None
        self._generator = torch.Generator()
        self._step_pool = SumAccumulator()
        # Where calls are added up now: the step's pool, or that of an evaluation's dataloader.
        self._pool = self._step_pool
        self.begin_listening()

    def begin_listening(self) -> None:
        """Forget the calls of the layers found before."""
        self._names: tuple[str, ...] = ()
        # Layers of which processes have agreed on why they are left out.
        self._told: set[str] = set()
        # Layers that also had calls of generation, or with a cache, that are not measured.
        self._generated: set[str] = set()
        self._generated_was_told = False
        # What steps are reduced in, and the heads of the layers that it was built for.
        self.step_metrics: list[Any] = []
        self.heads_of_step: dict[str, int] = {}
        # Layer → how many of its measurements were lost one after the other.
        self._losses: dict[str, int] = {}
        self._loss_was_told = False

    # What a subclass says

    @abstractmethod
    def known_layers(self) -> dict[str, int]:
        """Name of each layer that can be measured → number of its heads."""

    @abstractmethod
    def metric(self, heads: dict[str, int]) -> Any:
        """What the calls of all ranks are pooled in: layer name → heads."""

    @abstractmethod
    def name_missing(self, seen: Collection[str]) -> None:
        """Say once which layers had no call that could be measured, and why calls were left out."""

    def remember_known(self, heads: dict[str, int]) -> None:
        """Fix the layers of the history, where that was not done when they were found."""

    def facts_of_calls(self, name: str) -> Sequence[int]:
        """What only calls tell of a layer; processes learn the largest of each number."""
        return ()

    def learn(self, name: str, facts: Sequence[int]) -> str | None:
        """Use the largest of :meth:`facts_of_calls`; why the layer is left out, where processes differ."""
        return None

    def empty_state(self, name: str) -> int | None:
        """State of the heads of a layer that are empty when all is well; None where there is no such layer."""
        return None

    def metrics(self, heads: dict[str, int]) -> list[Any]:
        """:meth:`metric`, and what else may be reduced at a step: layer name → heads."""
        return [self.metric(heads)]

    def begin_measuring(self) -> int:
        """Begin the measurement of a step; how many of :meth:`metrics` it needs, the same on every process."""
        return 1

    def fill(self, metrics: Sequence[Any], pool: SumAccumulator) -> None:
        """Add what was pooled to those of :meth:`metrics` that are needed."""
        pool.into(metrics[0])

    def take_more(self, tables: Sequence[Tensor], left_out: Collection[str]) -> None:
        """Take the values of the metrics besides the first, ``(statistics, heads)`` on the host.

        Args:
            tables: of each metric that was needed.
            left_out: layers that do not count.
        """

    def adjust(self, metric: Any, values: dict[str, Tensor]) -> None:
        """Change values in place, before anything is logged."""

    # Listening

    @property
    def problems(self) -> dict[str, str]:
        """Layer → why its calls cannot be measured, as this process knows it."""
        if isinstance(self._capture, AttentionCollector):
            return self._capture.left_out
        return {} if self._capture is None else self._capture.problems

    def listen(self, trainer: Trainer, capture: AttentionCollector | HiddenCapture) -> None:
        """Hook the model, switched off until a batch is to be measured."""
        self._step_pool.reset()
        self._generator.manual_seed(self.seed + trainer.global_rank)
        self._capture = capture
        capture.install()

    def release(self) -> None:
        """Remove the hooks."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.remove()

    def pool_into(self, pool: SumAccumulator) -> None:
        """Add calls up there from now on."""
        self._pool = pool
        if isinstance(self._capture, AttentionCollector):
            self._capture.pool = pool

    def begin_batch(self, is_due: bool) -> None:
        """Listen during batches of a logged step."""
        self.pool_into(self._step_pool)
        if self._capture is not None:
            self._capture.enabled = is_due

    def end_batch(self) -> None:
        """Stop listening: a validation between two micro-batches is not training."""
        if self._capture is not None:
            self._capture.enabled = False

    # Measuring

    def part(self, trainer: Trainer, pl_module: LightningModule) -> Part:
        """Statistics of all layers over the step's micro-batches."""
        return CallsPart(self, trainer, pl_module, self._step_pool)

    def count_losses(self, pool: SumAccumulator) -> dict[str, str]:
        """Layer → why it is not measured any more; those that were lost too often are among them from here on."""
        problems = self.problems
        for name in self._names:
            if name not in pool.lost:
                self._losses.pop(name, None)
                continue
            times = self._losses[name] = self._losses.get(name, 0) + 1
            if times >= MOST_FAILURES:
                problems.setdefault(name, f"{pool.lost[name]}, {times} times in a row")
        return problems

    def states_of(
        self,
        values: Mapping[str, Tensor],
        counted: Tensor,
        ran: Collection[str],
        left_out: Collection[str],
    ) -> Tensor:
        """State of every head, by how much was counted of it."""
        weight = counted.numpy()
        witness = values[self.witness].numpy()
        infinite = np.isinf(torch.stack(list(values.values())).numpy()).any(0)
        states = np.where((weight != 0) & ~np.isfinite(witness) | infinite, NOT_FINITE, KNOWN)
        end = 0
        for (name, label), heads in zip(self.labels.items(), self.history.heads, strict=True):
            own, end = slice(end, end + heads), end + heads
            state = NO_DATA if name in ran else DID_NOT_RUN
            if name in left_out:
                state = LEFT_OUT
                self.history.reasons[label] = self.problems.get(name, "its newest measurement failed")
            elif (expected := self.empty_state(name)) is not None:
                state = expected
            states[own][(weight[own] == 0) & (states[own] == KNOWN)] = state
        return torch.from_numpy(states)


class CallsPart(Part):
    """Statistics of the calls in a pool, which is empty then. A layer that is lost on a process is so on all.

    Args:
        monitor: whose part it is.
        trainer: the trainer.
        pl_module: its module.
        pool: of the calls.
        is_step: they are those of a training step.
    """

    monitor: ListeningMonitor

    def __init__(
        self,
        monitor: ListeningMonitor,
        trainer: Trainer,
        pl_module: LightningModule,
        pool: SumAccumulator,
        *,
        is_step: bool = True,
    ) -> None:
        super().__init__(monitor, trainer, pl_module)
        self._pool, self._is_step = pool, is_step
        # The same on every process.
        self._names = monitor._names
        self._needed = monitor.begin_measuring() if is_step else 1
        self.metrics = monitor.step_metrics[: self._needed] if is_step else []
        self._left_out: set[str] = set()
        self._statistics: list[str] = []

    # Shapes

    def is_new(self) -> bool:
        """Whether layers' numbers of heads are not known, or others than at the measurement before."""
        monitor = self.monitor
        heads = monitor.known_layers()
        is_unknown = any(name not in heads and name not in monitor._told for name in self._names)
        return is_unknown or not self.metrics or monitor.heads_of_step != heads

    def facts(self) -> list[Sequence[int]]:
        """What only calls tell."""
        return [self.monitor.facts_of_calls(name) for name in self._names]

    def settle(self, facts: Sequence[Sequence[int]]) -> None:
        """Build the metric of the layers with known heads."""
        monitor = self.monitor
        for name, own in zip(self._names, facts, strict=True):
            reason = monitor.learn(name, own)
            if reason is not None:
                monitor.problems.setdefault(name, reason)
        heads = monitor.known_layers()
        found = [alone(one).to(self.pl_module.device) for one in monitor.metrics(heads)] if heads else []
        if self._is_step:
            monitor.step_metrics, monitor.heads_of_step = found, heads
        self.metrics = found[: self._needed]

    def unsettle(self) -> None:
        """The next measurement builds the metric."""
        super().unsettle()
        if self._is_step:
            self.monitor.step_metrics, self.monitor.heads_of_step = [], {}

    # What this process has

    def prepare(self) -> None:
        """Pool the calls."""
        monitor, pool = self.monitor, self._pool
        monitor.check_whole()
        pool.make()
        monitor._generated |= pool.left_out_calls
        if self.metrics:
            monitor.remember_known(monitor.known_layers())
            for metric in self.metrics:
                metric.reset()
            monitor.fill(self.metrics, pool)

    def words(self) -> list[float]:
        """Of each layer whether it is left out for good, and whether this measurement is lost."""
        problems, lost = self.monitor.count_losses(self._pool), self._pool.lost
        return [float(flag) for name in self._names for flag in (name in problems, name in lost)]

    # What all processes have

    def results(self) -> list[Tensor]:
        """Values, what the witness was counted of, and the values of further metrics."""
        if not self.metrics:
            return []
        metric: Any = self.metrics[0]
        values = metric.compute()
        self._statistics = list(values)
        # torchmetrics makes scalars of a model's only head.
        tables = [torch.stack([value.reshape(-1) for value in values.values()])]
        tables.append(metric.weight[metric.statistics.index(self.monitor.witness)])
        more = [one.compute().values() for one in self.metrics[1:]]
        return [*tables, *(torch.stack([value.reshape(-1) for value in values]) for values in more)]

    def agree(self, words: Sequence[float]) -> bool:
        """Which layers are left out; whether something is new."""
        monitor = self.monitor
        out = {name for name, flag in zip(self._names, words[::2], strict=True) if flag > 0}
        lost = {name for name, flag in zip(self._names, words[1::2], strict=True) if flag > 0} - out
        self._left_out = out | lost
        self._is_out_new, self._is_lost_new = (
            bool(out - monitor._told),
            bool(lost) and not monitor._loss_was_told,
        )
        monitor._told |= out
        monitor._loss_was_told = monitor._loss_was_told or bool(lost)
        return self._is_out_new or self._is_lost_new

    def reasons(self) -> tuple[dict[str, str], dict[str, str]]:
        """Why layers are left out, and lost, on this process."""
        return dict(self.monitor.problems), dict(self._pool.lost)

    def learn(self, reasons: Sequence[Any]) -> None:
        """Name the layers that are left out, and those that are lost the first time."""
        problems, lost = (first_of_each([own[index] for own in reasons if own]) for index in range(2))
        if self._is_out_new:
            self.monitor.note_left_out(problems)
        if self._is_lost_new:
            self.monitor.note_lost(lost)

    def conclude(self, results: Sequence[Tensor]) -> None:
        """Values and states of all heads."""
        monitor, pool, left_out = self.monitor, self._pool, self._left_out
        seen = set() if monitor._capture is None else monitor._capture.seen
        monitor.attempt(
            lambda: monitor.name_missing(seen | monitor._told | monitor._generated), "naming layers"
        )
        if not results:
            return
        table, counted, *more = results
        if left_out:
            table, counted = (self._without(left_out, part) for part in (table, counted))
            for metric in self.metrics:
                metric.leave_out(left_out)  # type: ignore[operator]
        values = dict(zip(self._statistics, table.float().unbind(), strict=True))
        monitor.states = monitor.states_of(values, counted, pool.names | pool.left_out_calls, left_out)
        monitor.adjust(self.metrics[0], values)
        monitor.take_more(more, left_out)
        self.values = values

    def _without(self, left_out: Collection[str], table: Tensor) -> Tensor:
        """NaN in the columns of some layers; of numbers of what was counted 0."""
        labels = self.monitor.labels
        is_out = torch.tensor([name in left_out for name in labels])
        is_out = is_out.repeat_interleave(torch.tensor(self.monitor.history.heads))
        return torch.where(is_out, torch.nan if table.dim() > 1 else 0.0, table)

    def close(self) -> None:
        """Empty the pool."""
        self._pool.reset()
