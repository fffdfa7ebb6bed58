"""What the monitors of captured attention share: layers, the capture, pools of evaluation loops."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_qk.architecture.labels import matches, shorten
from lightning_qk.callbacks._layers import WatchedReader
from lightning_qk.callbacks._output import log_agreed
from lightning_qk.callbacks._trainer import logging_step
from lightning_qk.callbacks.monitors._base import MonitorOptions
from lightning_qk.callbacks.monitors._keys import without_errors
from lightning_qk.callbacks.monitors._listening import CallsPart, ListeningMonitor
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.heads.projections import NotTokenAttention
from lightning_qk.heads.reader import find_attention
from lightning_qk.heads.sites import label_layers
from lightning_qk.loggers.loggers import log_scalars
from lightning_qk.metrics.collector import AttentionCollector, SumAccumulator
from lightning_qk.record.states import NO_VALUE

_MANY = 2**31
"""More heads than any layer has."""


class CaptureOptions(MonitorOptions, total=False):
    """Types of the options that all monitors of captured attention share; see :class:`CaptureMonitor`."""

    seed: int
    every_n_eval_batches: int
    cached_calls: bool


class CaptureMonitor(ListeningMonitor):
    """Base of the monitors that measure at the attention call, with options of :class:`Monitor` and those below.

    A subclass says what one call comes to (:meth:`measure_call`) and what it is pooled in (:meth:`metric`).

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's ``log_every_n_steps``.
        seed: of the monitor's own random generator; torch's global one is never touched.
        every_n_eval_batches: in validation and test loops, measure the first batch of each dataloader and every
            n-th after it; 0 for never.
        cached_calls: also measure calls within transformers' ``generate``, and calls of self-attention with keys
            of earlier tokens from a cache. By default they are left out, and named once: statistics are those of
            the loss's own forwards.
        options: see :class:`Monitor`.
    """

    group = "attn"
    is_of_self_attention: bool = False
    """Whether it measures nothing of cross-attention."""

    live: ClassVar[tuple[str, ...]] = ("_reader", "_collector", "_evaluation")

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        seed: int = 0,
        every_n_eval_batches: int = 10,
        cached_calls: bool = False,
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(every_n_steps, **options)
        if every_n_eval_batches < 0:
            raise ValueError(
                f"expected every_n_eval_batches to be 0 (never) or more, got {every_n_eval_batches}"
            )
        self.seed = seed
        self.every_n_eval_batches = every_n_eval_batches
        self.cached_calls = cached_calls

    def begin_listening(self) -> None:
        """Forget the calls of the layers found before."""
        super().begin_listening()
        self._reader: WatchedReader | None = None
        # All attention layers of the model: name → whether it is cross-attention.
        self._every: dict[str, bool] = {}
        self._collector: AttentionCollector | None = None
        self._evaluation: dict[int, SumAccumulator] = {}
        # Known before the first call wherever the weights can be read; of the others once processes have agreed.
        self._heads: dict[str, int] = {}
        self._self_attention: dict[str, bool] = {}
        # Layers whose calls have other numbers of heads on other processes.
        self._apart: set[str] = set()

    # What a subclass says

    @abstractmethod
    def measure_call(self, name: str, call: CapturedCall) -> Any:
        """Additive statistics of one call, parts ``(..., batch, heads)``; None where the layer has none of these.

        Raises:
            UnsupportedCallError: the call cannot be measured.
        """

    @abstractmethod
    def metric(self, heads: dict[str, int]) -> Any:
        """What the calls of all ranks are pooled in: layer name → heads."""

    def also_captured(self, modules: Mapping[str, nn.Module], reader: WatchedReader) -> dict[str, Any]:
        """Further arguments of the AttentionCollector, for the modules that are watched."""
        return {}

    # Listening

    def watched(self) -> Mapping[str, Any]:
        """Name of each layer → its heads, where the weights tell."""
        return {name: self._heads.get(name) for name in self._names}

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and hook the attention interface before the first forward."""
        found = find_attention(pl_module)
        if not self.choose(
            found,
            {},
            kind="attention layer",
            nothing=(
                f"expected a model that contains transformer attention, found none in {type(pl_module).__name__}: "
                "build the network in __init__ or configure_model"
            ),
            unread="whose calls can be captured",
        ):
            return
        self.begin_listening()
        modules = {name: module for name, module in found.items() if matches(name, self.modules)}
        self._names = tuple(modules)
        # Where the weights cannot be read, calls can still be captured.
        reader = self._reader = WatchedReader(pl_module, self.modules, root=trainer.strategy.model)
        self._collector = AttentionCollector(
            pl_module,
            self.measure_call,
            modules=modules,
            layers=reader.layers,
            cached_calls=self.cached_calls,
            retry=True,
            **self.also_captured(modules, reader),
        )
        self._take_facts(self._collector, reader)
        self.listen(trainer, self._collector)

    def _take_facts(self, collector: AttentionCollector, reader: WatchedReader) -> list[str]:
        """Take what the weights say of heads and inputs; names of the layers of which it is new."""
        changed = collector.know(reader.layers)
        self._every = dict(reader.found)
        self._heads |= {name: layer.heads for name, layer in reader.layers.items()}
        self._self_attention = {name: layer.self_attention for name, layer in reader.layers.items()}
        # Their softmax is none over tokens.
        for name, refusal in reader.refusals.items():
            if isinstance(refusal, NotTokenAttention) and name in collector.modules:
                collector.left_out.setdefault(name, str(refusal))
        return changed

    def layers_settled(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with what the layers' calls have shown; what was measured by other facts does not count."""
        reader, collector = self._reader, self._collector
        if not self.idle and reader is not None and collector is not None and reader.refresh():
            self._step_pool.leave_out(self._take_facts(collector, reader))

    def known_layers(self) -> dict[str, int]:
        """Layers with known numbers of heads, and these numbers."""
        return {name: self._heads[name] for name in self._names if name in self._heads}

    def remember_known(self, heads: dict[str, int]) -> None:
        """Fix the layers of the history."""
        # Calls may have shown that a layer is none.
        every = {**dict.fromkeys(heads, False), **self._every}
        self.remember_layers(heads, label_layers(every, self._self_attention))

    def nothing_measured(self, sentence: str) -> None:
        """Say so in place of a verdict too."""
        super().nothing_measured(sentence)
        if not len(self.history) and (heads := self.known_layers()):
            self.remember_known(heads)
            self.history.reasons = dict.fromkeys(self.history.layers, sentence)

    def empty_state(self, name: str) -> int | None:
        """Cross-attention has no value where self-attention alone is measured."""
        is_cross = self._self_attention.get(name) is False
        return NO_VALUE if is_cross and self.is_of_self_attention else None

    def facts_of_calls(self, name: str) -> Sequence[int]:
        """Most and, negated, fewest heads of a layer that only its calls tell."""
        seen = {} if self._collector is None else self._collector.heads_of_calls
        return seen.get(name, -1), -seen.get(name, _MANY)

    def learn(self, name: str, facts: Sequence[int]) -> str | None:
        """Take the heads of the calls, where they are the same on every process."""
        most, least = facts
        if most >= 0 and most != -least:
            self._apart.add(name)
        elif most >= 0:
            self._heads.setdefault(name, most)
        return "its attention was called with other heads on other processes" if name in self._apart else None

    def name_missing(self, seen: Collection[str]) -> None:
        """Name the layers that were not captured, and those of which calls were left out."""
        missing = [name for name in self._names if name not in seen]
        if missing:
            modules = {} if self._collector is None else self._collector.modules
            kinds = ", ".join(sorted({type(modules[name]).__name__ for name in missing if name in modules}))
            self.note(
                f"no attention call of {len(missing)} of {len(self._names)} layers was seen "
                f"({shorten(missing)}; class {kinds}): such a layer was not run, or computes its softmax "
                "where it cannot be seen (inside a compiled graph, say); what goes through transformers' "
                "AttentionInterface, scaled_dot_product_attention or nn.MultiheadAttention is captured in any case"
            )
        if self._generated and not self._generated_was_told:
            self._generated_was_told = True
            self.note_cached_calls([name for name in self._names if name in self._generated])

    def note_cached_calls(self, names: Sequence[str]) -> None:
        """Say that calls were left out."""
        self.note(
            f"{len(names)} of {len(self._names)} layers ({shorten(names)}) were also called by generate or "
            "with a cache of keys: these calls are not measured; cached_calls=True measures them too"
        )

    # Validation and test loops

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a loop."""
        self._evaluation = {}
        if self._capture is None and self._measures_evaluation(trainer):
            # Validation or test without a fit around it.
            self.start_together(trainer, lambda: self.find_layers(trainer, pl_module))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen, when the batch is to be measured."""
        if self._capture is None or not self._measures_evaluation(trainer):
            return
        self.pool_into(self._evaluation.setdefault(dataloader_idx, SumAccumulator()))
        self._capture.enabled = trainer.fast_dev_run or batch_idx % self.every_n_eval_batches == 0  # type: ignore[attr-defined]

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop listening."""
        self.end_batch()

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the loop's statistics."""
        self._end_evaluation(trainer, pl_module, "val", len(trainer.num_val_batches))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the loop's statistics."""
        self._end_evaluation(trainer, pl_module, "test", len(trainer.num_test_batches))

    def _measures_evaluation(self, trainer: Trainer) -> bool:
        return self.every_n_eval_batches > 0 and not trainer.sanity_checking

    def _end_evaluation(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, dataloaders: int
    ) -> None:
        if self._capture is None or not self._measures_evaluation(trainer):
            return
        # Over all dataloaders and not those that this rank saw: every rank makes the same collective calls.
        for index in range(dataloaders):
            suffix = f"/dataloader_idx_{index}" if dataloaders > 1 else ""
            pool = self._evaluation.get(index, SumAccumulator())
            self.measure_alone(_EvaluationPart(self, trainer, pl_module, pool, stage, suffix))

    def share_evaluation(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        values: dict[str, Tensor],
        stage: str,
        suffix: str,
    ) -> None:
        """Log the statistics of a loop, on every process."""
        self.count_layers(trainer, pl_module)
        means = without_errors(values)
        overall = self.over_the_model(means, f"{self.group}/{stage}", states=self.states)
        overall = {key + suffix: value for key, value in overall.items()}
        # On every process, whatever fails on one of them. Not through Lightning to the loggers: trainer.test
        # would print a table of them all.
        log_agreed(pl_module, overall, add_dataloader_idx=False)
        self.attempt(partial(self._publish_evaluation, trainer, means, stage, suffix))

    def _publish_evaluation(
        self, trainer: Trainer, means: dict[str, Tensor], stage: str, suffix: str
    ) -> None:
        prefix = f"{self.group}/{stage}"
        layers = self.by_layer_and_head(self.history, means, prefix, states=self.states)
        over_all = self.over_the_model(means, prefix, states=self.states)
        logged = self.worth_logging(over_all, is_evaluation=True)
        scalars = {key + suffix: value for key, value in (logged | layers).items()}
        log_scalars(trainer, scalars, logging_step(trainer))


class _EvaluationPart(CallsPart):
    """Statistics of the calls of a dataloader's loop, which are logged and not remembered."""

    monitor: CaptureMonitor

    def __init__(
        self,
        monitor: CaptureMonitor,
        trainer: Trainer,
        pl_module: LightningModule,
        pool: SumAccumulator,
        stage: str,
        suffix: str,
    ) -> None:
        super().__init__(monitor, trainer, pl_module, pool, is_step=False)
        self._stage, self._suffix = stage, suffix

    def remember(self) -> None:
        """Nothing."""

    def gaps(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def filled(self, values: dict[str, Tensor]) -> None:
        """Nothing."""

    def publish(self) -> None:
        """Log the loop's statistics."""
        self.monitor.share_evaluation(
            self.trainer, self.pl_module, self.values or {}, self._stage, self._suffix
        )
