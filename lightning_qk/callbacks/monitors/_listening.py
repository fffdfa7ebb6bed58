"""What the monitors that listen to a running model share: the capture, its pool, which layers are left out."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk.callbacks._guarded import MOST_FAILURES
from lightning_qk.callbacks._ranks import all_or_none, alone, combine, packed, reasons_of_all, reduce_states
from lightning_qk.callbacks.monitors._base import Monitor, flat_values
from lightning_qk.capture.hidden import HiddenCapture
from lightning_qk.metrics.collector import AttentionCollector, SumAccumulator
from lightning_qk.record.states import DID_NOT_RUN, KNOWN, LEFT_OUT, NO_DATA, NOT_FINITE


class ListeningMonitor(Monitor):
    """Base of the monitors that measure calls of a running model, pooled over micro-batches and processes.

    A layer that cannot be read on one process is left out on all: a mean over some of the batch would be taken for
    one over all of it.
    """

    live: ClassVar[tuple[str, ...]] = ("_capture", "_generator", "_step_pool", "_pool")

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

    def fill(self, metric: Any, pool: SumAccumulator) -> None:
        """Add what was pooled to a metric."""
        pool.into(metric)

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

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        """Statistics of all layers over the step's micro-batches, reduced over ranks."""
        return self.compute(trainer, pl_module, self._step_pool)

    def compute(
        self, trainer: Trainer, pl_module: LightningModule, pool: SumAccumulator
    ) -> dict[str, Tensor] | None:
        """Statistics of what was pooled, reduced over ranks; a collective call. The pool is empty then."""
        try:
            pool.make()
            left_out = self._agree_on_layers(trainer, pool)
            self._generated |= pool.left_out_calls
            seen = set() if self._capture is None else self._capture.seen
            self.attempt(lambda: self.name_missing(seen | self._told | self._generated), "naming layers")
            heads = self.known_layers()
            return self._reduce(trainer, pl_module, pool, left_out, heads) if heads else None
        finally:
            pool.reset()

    def _reduce(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        pool: SumAccumulator,
        left_out: set[str],
        heads: dict[str, int],
    ) -> dict[str, Tensor]:
        ran = pool.names | pool.left_out_calls

        def pooled() -> Any:
            self.remember_known(heads)
            metric = self.metric(heads).to(pl_module.device)
            pool.leave_out(left_out)
            self.fill(metric, pool)
            return packed(trainer, metric)

        metric, sums = all_or_none(trainer, pooled)
        reduce_states(trainer, alone(metric), sums)
        values = flat_values(metric)
        self.states = self._states(metric, values, ran, left_out)
        self.adjust(metric, values)
        return values

    def _states(
        self, metric: Any, values: Mapping[str, Tensor], ran: Collection[str], left_out: Collection[str]
    ) -> Tensor:
        """State of every head, by how much was counted of it."""
        counted = metric.weight[metric.statistics.index(self.witness)].cpu().numpy()
        witness = values[self.witness].numpy()
        infinite = np.isinf(torch.stack(list(values.values())).numpy()).any(0)
        states = np.where((counted != 0) & ~np.isfinite(witness) | infinite, NOT_FINITE, KNOWN)
        end = 0
        for (name, label), heads in zip(self.labels.items(), self.history.heads, strict=True):
            own, end = slice(end, end + heads), end + heads
            state = NO_DATA if name in ran else DID_NOT_RUN
            if name in left_out:
                state = LEFT_OUT
                self.history.reasons[label] = self.problems.get(name, "its newest measurement failed")
            elif (expected := self.empty_state(name)) is not None:
                state = expected
            states[own][(counted[own] == 0) & (states[own] == KNOWN)] = state
        return torch.from_numpy(states)

    def _agree_on_layers(self, trainer: Trainer, pool: SumAccumulator) -> set[str]:
        """Names of the layers that are left out this time, the same on every process; a collective call."""
        problems = self.problems
        for name in self._names:
            if name not in pool.lost:
                self._losses.pop(name, None)
                continue
            times = self._losses[name] = self._losses.get(name, 0) + 1
            if times >= MOST_FAILURES:
                problems.setdefault(name, f"{pool.lost[name]}, {times} times in a row")
        rows = [(name in problems, name in pool.lost, *self.facts_of_calls(name)) for name in self._names]
        out: set[str] = set()
        lost: set[str] = set()
        apart: dict[str, str] = {}
        for name, (is_out, is_lost, *facts) in zip(self._names, combine(trainer, rows), strict=True):
            reason = self.learn(name, facts)
            if reason is not None:
                apart[name] = reason
            if is_out or reason is not None:
                out.add(name)
            elif is_lost:
                lost.add(name)
        if out - self._told:
            self.note_left_out(reasons_of_all(trainer, problems) | apart)
            self._told |= out
        if lost and not self._loss_was_told:
            self._loss_was_told = True
            self.note_lost(reasons_of_all(trainer, pool.lost))
        return out | lost
