"""What the monitors of captured attention share: layers, the capture, pools of a step and of evaluation loops."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_qk.callbacks._fit_state import nothing
from lightning_qk.callbacks._ranks import all_or_none, alone, combine, reasons_of_all, reduce_states
from lightning_qk.callbacks._trainer import logging_step
from lightning_qk.callbacks.monitors._base import Monitor, OnUnreadable, PerLayer, flat_values, shorten
from lightning_qk.callbacks.monitors._losses import Losses, lost_reason
from lightning_qk.callbacks.monitors._pool import SumsPool
from lightning_qk.callbacks.monitors._watched import Patterns, WatchedReader, matches
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.capture.generation import CachedCalls
from lightning_qk.capture.interface import AttentionCapture
from lightning_qk.capture.record import UnsupportedCallError
from lightning_qk.functional.attention import AttentionSums, MeanSums
from lightning_qk.functional.logits import AttentionLogits
from lightning_qk.heads.errors import NotTokenAttention
from lightning_qk.heads.local import local_heads
from lightning_qk.heads.reader import find_attention
from lightning_qk.loggers.loggers import log_scalars
from lightning_qk.metrics.means import HeadMeans
from lightning_qk.record.history import RunRecord
from lightning_qk.record.states import DID_NOT_RUN, KNOWN, LEFT_OUT, NO_DATA, NO_VALUE, NOT_FINITE

_MANY = 2**31
"""More heads than any layer has."""


class Measured(NamedTuple):
    """What one call comes to.

    Attributes:
        sums: additive statistics of its heads.
        heads: how many the call has.
        d_head: width of what is multiplied.
    """

    sums: AttentionSums | MeanSums
    heads: int
    d_head: int


class CaptureMonitor(Monitor):
    """Base of the monitors that measure at the attention call; see :class:`~lightning_qk.AttentionMonitor`.

    A subclass says what one call comes to (:meth:`measure_call`) and what it is pooled in (:meth:`metric`).
    """

    group = "attn"
    presence: str
    """A statistic that is finite of a head that is finite and of which anything was measured."""
    is_of_self_attention: bool = False
    """Whether it measures nothing of cross-attention."""
    curve_statistics: tuple[str, ...] = ()
    """Statistics whose means are curves of the report."""

    fit_state = {  # noqa: RUF012 (never changed)
        "_heads": dict,
        "_heads_of_calls": dict,
        "_self_attention": dict,
        "_shapes": dict,
        "_apart": set,
        "_told": set,
        "_cached": set,
        "_cached_was_told": bool,
        "_cached_calls": CachedCalls,
        "_losses": Losses,
    }
    running_state = {  # noqa: RUF012 (never changed)
        "_generator": torch.Generator,
        "_capture": nothing,
        "_reader": nothing,
        "_modules": dict,
        "_step_pool": SumsPool,
        "_evaluation": dict,
        "_pool": SumsPool,
    }

    _generator: torch.Generator
    _capture: AttentionCapture | None
    _reader: WatchedReader | None
    _modules: dict[str, nn.Module]
    _heads: dict[str, int]
    """Known before the first call wherever the weights can be read; of the others once processes have agreed."""
    _heads_of_calls: dict[str, int]
    """Of layers whose weights do not tell, as this process sees them."""
    _self_attention: dict[str, bool]
    _shapes: dict[str, tuple[int, int]]
    _apart: set[str]
    """Layers whose calls have other numbers of heads on other processes."""
    _told: set[str]
    """Layers of which processes have agreed on why they are left out."""
    _cached: set[str]
    """Layers of which calls of generation, or with a cache, were left out."""
    _cached_was_told: bool
    _cached_calls: CachedCalls
    _losses: Losses
    _step_pool: SumsPool
    _evaluation: dict[int, SumsPool]
    _pool: SumsPool
    """Where calls are added up now: the step's pool, or that of an evaluation's dataloader."""

    def __init__(
        self,
        every_n_steps: int | None,
        *,
        seed: int,
        every_n_eval_batches: int,
        per_head: bool,
        figures_every: int,
        report: bool,
        per_layer: PerLayer = None,
        modules: Patterns = None,
        on_unreadable: OnUnreadable = "warn",
        cached_calls: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps,
            per_layer=per_layer,
            per_head=per_head,
            figures_every=figures_every,
            report=report,
            modules=modules,
            on_unreadable=on_unreadable,
        )
        self.check_layer_statistics()
        if every_n_eval_batches < 0:
            raise ValueError(
                f"expected every_n_eval_batches to be 0 (never) or more, got {every_n_eval_batches}"
            )
        self.seed = seed
        self.every_n_eval_batches = every_n_eval_batches
        self.cached_calls = cached_calls

    # What a subclass says

    @abstractmethod
    def measure_call(self, name: str, call: CapturedCall) -> Measured | None:
        """Additive statistics of one call; None where the layer has none of these.

        Raises:
            UnsupportedCallError: the call cannot be measured.
        """

    def logits_of(self, name: str, call: CapturedCall) -> AttentionLogits:
        """The logits of a call.

        Raises:
            UnsupportedCallError: they cannot be told.
        """
        return call.logits(
            self_attention=self._self_attention.get(name), heads=self._heads_here(name, call.module)
        )

    @abstractmethod
    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """What the calls of all ranks are pooled in: layer name → heads."""

    def adjust(self, metric: HeadMeans, values: dict[str, Tensor]) -> None:
        """Change values in place, before anything is logged."""

    # Listening

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and stand at the attention interface before the first forward."""
        self._listen_to(trainer, pl_module)

    def watched(self) -> Mapping[str, Any]:
        """Name of each layer → its heads, where the weights tell."""
        return {name: self._heads.get(name) for name in self._modules}

    def _listen_to(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = find_attention(pl_module)
        self._modules = {name: module for name, module in found.items() if matches(name, self.modules)}
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
        # Where the weights cannot be read, calls can still be captured.
        reader = self._reader = WatchedReader(pl_module, self.modules, root=trainer.strategy.model)
        self._take_facts(reader)
        self._heads_of_calls = {}
        self._shapes, self._apart, self._told = {}, set(), set()
        self._cached, self._cached_was_told, self._cached_calls = set(), False, CachedCalls()
        self._losses = Losses()
        self._step_pool.reset()
        self._generator.manual_seed(self.seed + trainer.global_rank)
        names = {module: name for name, module in self._modules.items()}
        self._capture = AttentionCapture(
            names, self._take, model=pl_module, generated=None if self.cached_calls else self._leave_call_out
        )
        self._leave_out_channels(reader)
        self._capture.install()

    def _take_facts(self, reader: WatchedReader) -> None:
        """Take what the weights say of the layers' heads and inputs."""
        self._heads = {name: layer.heads for name, layer in reader.layers.items()}
        self._self_attention = {name: layer.self_attention for name, layer in reader.layers.items()}

    def _leave_out_channels(self, reader: WatchedReader) -> None:
        """Leave layers out whose softmax is none over tokens."""
        assert self._capture is not None  # both callers make sure
        for name, refusal in reader.refusals.items():
            if isinstance(refusal, NotTokenAttention) and name in self._modules:
                self._capture.problems.setdefault(name, str(refusal))

    def layers_settled(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with what the layers' calls have shown; what was measured by other facts does not count."""
        reader = self._reader
        if self.idle or reader is None or self._capture is None or not reader.refresh():
            return
        heads, is_self = dict(self._heads), dict(self._self_attention)
        self._take_facts(reader)
        self._leave_out_channels(reader)
        changed = [
            name
            for name in self._modules
            if heads.get(name) != self._heads.get(name, heads.get(name))
            or is_self.get(name) != self._self_attention.get(name, is_self.get(name))
        ]
        self._heads = {**heads, **self._heads}
        self._step_pool.leave_out(changed)

    def release(self) -> None:
        """Leave the attention interface as it was."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.remove()

    def begin_batch(self, is_due: bool) -> None:
        """Listen during batches of a logged step."""
        self._pool = self._step_pool
        if self._capture is not None:
            self._capture.enabled = is_due

    def end_batch(self) -> None:
        """Stop listening: a validation between two micro-batches is not training."""
        if self._capture is not None:
            self._capture.enabled = False

    def _take(self, name: str, call: CapturedCall) -> None:
        is_self = self._self_attention.get(name, False)
        if not self.cached_calls and is_self and self._cached_calls.has(name, call):
            self._leave_call_out(name)
        else:
            self._hear(name, call)

    def _leave_call_out(self, name: str) -> None:
        self._cached.add(name)
        self._pool.left_out_calls.add(name)

    def _hear(self, name: str, call: CapturedCall) -> None:
        pool = self._pool
        if name in pool.lost:
            return
        try:
            found = self.measure_call(name, call)
            if found is not None:
                heads, where = self._check_shape(name, call.module, found)
                pool.add(name, found.sums, heads=heads, where=where)
        except UnsupportedCallError:
            raise
        except Exception as error:
            # It says nothing of the layer's calls: memory that ran out, say. This measurement is lost.
            pool.lost[name] = lost_reason(error)

    def _heads_here(self, name: str, module: nn.Module) -> int | None:
        """How many of a layer's heads this process computes; None where its weights do not say."""
        heads = self._heads.get(name)
        where = None if heads is None else local_heads(module, heads)
        return heads if where is None else where.stop - where.start

    def _check_shape(self, name: str, module: nn.Module, found: Measured) -> tuple[int, slice | None]:
        """How many heads the layer has, and which of them this call had (None: all)."""
        shape = found.heads, found.d_head
        before = self._shapes.setdefault(name, shape)
        if shape != before:
            raise UnsupportedCallError(
                f"its attention was called with {before[0]} heads of width {before[1]} and then with {shape[0]} "
                f"of width {shape[1]}, which cannot be pooled: give each of the two a module of its own"
            )
        # Processes agree on what only calls tell before it is relied on.
        heads = self._heads.get(name) or self._heads_of_calls.setdefault(name, shape[0])
        if shape[0] == heads:
            return heads, None
        where = local_heads(module, heads)
        if where is None or where.stop - where.start != shape[0]:
            raise UnsupportedCallError(
                f"its weights have {heads} heads and its attention was called with {shape[0]}: check how the "
                "layer splits its heads"
            )
        return heads, where

    def nothing_measured(self, sentence: str) -> None:
        """Say so in place of a verdict too."""
        super().nothing_measured(sentence)
        if self.history is not None and len(self.history):
            return
        heads = {name: self._heads[name] for name in self._modules if name in self._heads}
        if heads:
            self.remember_layers(heads, {name for name, own in self._self_attention.items() if not own})
            assert self.history is not None
            self.history.reasons = dict.fromkeys(self.history.layers, sentence)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        """Statistics of all heads over the step's micro-batches, reduced over ranks."""
        return self._compute(trainer, pl_module, self._step_pool)

    def _compute(
        self, trainer: Trainer, pl_module: LightningModule, pool: SumsPool
    ) -> dict[str, Tensor] | None:
        """Statistics of what was pooled, reduced over ranks; a collective call. The pool is empty then."""
        try:
            left_out = self._agree_on_layers(trainer, pool)
            self.attempt(self._name_missing, "naming layers")
            self.attempt(self.name_cached_calls, "naming layers")
            return self._reduce(trainer, pl_module, pool, left_out)
        finally:
            pool.reset()

    def _reduce(
        self, trainer: Trainer, pl_module: LightningModule, pool: SumsPool, left_out: set[str]
    ) -> dict[str, Tensor] | None:
        heads = {name: self._heads[name] for name in self._modules if name in self._heads}
        if not heads:
            return None
        ran = pool.names | pool.left_out_calls

        def pooled() -> HeadMeans:
            self.remember_layers(heads, {name for name, own in self._self_attention.items() if not own})
            metric = self.metric(heads).to(pl_module.device)
            pool.leave_out(left_out)
            pool.into(metric)
            return metric

        metric = all_or_none(trainer, pooled)
        alone(metric)
        reduce_states(trainer, metric)
        values = flat_values(metric)
        self.states = self._states(metric, values, ran, left_out)
        self.adjust(metric, values)
        return values

    def _states(
        self,
        metric: HeadMeans,
        values: Mapping[str, Tensor],
        ran: Collection[str],
        left_out: Collection[str],
    ) -> Tensor:
        """State of every head, by how much was counted of it."""
        assert metric.counted is not None  # it was computed
        assert self._capture is not None  # _listen_to
        assert self.history is not None  # _compute
        rows = metric.counted[metric.statistics.index(self.witness)].cpu()
        infinite = torch.stack([value.isinf() for value in values.values()]).any(0)
        broken = (rows != 0) & ~values[self.witness].isfinite() | infinite
        states = torch.where(broken, NOT_FINITE, KNOWN)
        for name, part in metric.split(states).items():
            empty = (metric.split(rows)[name] == 0) & (part == KNOWN)
            if name in left_out:
                reason = self._capture.problems.get(name, "its newest measurement failed")
                self.history.reasons[self.labels[name]] = reason
            own = self._self_attention.get(name)
            part[empty] = (
                LEFT_OUT
                if name in left_out
                else NO_VALUE
                if own is False and self.is_of_self_attention
                else NO_DATA
                if name in ran
                else DID_NOT_RUN
            )
        return states

    def _agree_on_layers(self, trainer: Trainer, pool: SumsPool) -> set[str]:
        """Learn what every process knows of the layers: heads that only calls tell, and which are left out.

        A collective call. What is lost or cannot be read on one process is left out on all: a mean over some of
        the batch would be taken for one over all of it.

        Returns:
            The names of those that are left out this time.
        """
        capture = self._capture
        assert capture is not None  # _listen_to
        self._losses.end(self._modules, pool.lost, capture.problems)
        rows = [
            (
                name in capture.problems,
                name in pool.lost,
                self._heads_of_calls.get(name, -1),
                -self._heads_of_calls.get(name, _MANY),
            )
            for name in self._modules
        ]
        out: set[str] = set()
        lost: set[str] = set()
        for name, (is_out, is_lost, most, least) in zip(self._modules, combine(trainer, rows), strict=True):
            if is_out:
                out.add(name)
            elif is_lost:
                lost.add(name)
            if most >= 0 and most != -least:
                self._apart.add(name)
            elif most >= 0:
                self._heads.setdefault(name, most)
        out |= self._apart
        if out - self._told:
            apart = dict.fromkeys(self._apart, "its attention was called with other heads on other processes")
            self.note_left_out(reasons_of_all(trainer, capture.problems) | apart)
            self._told |= out
        if lost and not self._losses.was_told:
            self._losses.was_told = True
            self.note_lost(reasons_of_all(trainer, pool.lost))
        return out | lost

    def _name_missing(self) -> None:
        capture = self._capture
        assert capture is not None  # _listen_to
        seen = capture.heard | self._told | self._cached
        missing = [name for name in self._modules if name not in seen]
        if missing:
            kinds = ", ".join(sorted({type(self._modules[name]).__name__ for name in missing}))
            self.note(
                f"no attention call of {len(missing)} of {len(self._modules)} layers was seen "
                f"({shorten(missing)}; class {kinds}): such a layer was not run, or computes its softmax "
                "where it cannot be seen (inside a compiled graph, say); what goes through transformers' "
                "AttentionInterface, scaled_dot_product_attention or nn.MultiheadAttention is captured in any case"
            )

    def name_cached_calls(self) -> None:
        """Say once that calls were left out."""
        if self._cached and not self._cached_was_told:
            self._cached_was_told = True
            names = [name for name in self._modules if name in self._cached]
            self.note(
                f"{len(names)} of {len(self._modules)} layers ({shorten(names)}) were also called by generate or "
                "with a cache of keys: these calls are not measured; cached_calls=True measures them too"
            )

    # Validation and test loops

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a loop."""
        self._evaluation = {}
        if self._capture is None and self._measures_evaluation(trainer):
            # Validation or test without a fit around it.
            self._start_together(trainer, lambda: self._listen_to(trainer, pl_module))

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
        self._pool = self._evaluation.setdefault(dataloader_idx, SumsPool())
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
            pool = self._evaluation.get(index, SumsPool())
            values = self.together(trainer, partial(self._compute, trainer, pl_module, pool))
            if values is not None:
                # Where it fails here, no process goes on with the next dataloader.
                self._here(partial(self._share_evaluation, trainer, pl_module, values, stage, suffix))

    def _share_evaluation(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        values: dict[str, Tensor],
        stage: str,
        suffix: str,
    ) -> None:
        self.count_layers(trainer, pl_module)
        means = {name: flat for name, flat in values.items() if not name.endswith("_se")}
        overall = self.over_the_model(means, f"{self.group}/{stage}", states=self.states)
        overall = {key + suffix: value for key, value in overall.items()}
        # On every process, whatever fails on one of them. Not through Lightning to the loggers: trainer.test
        # would print a table of them all.
        pl_module.log_dict(overall, logger=False, on_step=False, on_epoch=True, add_dataloader_idx=False)
        self.attempt(partial(self._publish_evaluation, trainer, means, stage, suffix))

    def _publish_evaluation(
        self, trainer: Trainer, means: dict[str, Tensor], stage: str, suffix: str
    ) -> None:
        assert self.history is not None  # _compute
        prefix = f"{self.group}/{stage}"
        layers = self.by_layer_and_head(self.history, means, prefix, states=self.states)
        over_all = self.over_the_model(means, prefix, states=self.states)
        logged = self.worth_logging(over_all, is_evaluation=True)
        scalars = {key + suffix: value for key, value in (logged | layers).items()}
        log_scalars(trainer, scalars, logging_step(trainer))

    def contribute(self, record: RunRecord) -> None:
        """Add the mean over all heads of some statistics, as curves of the run."""
        if self.history is None or not len(self.history):
            return
        for name in self.curve_statistics:
            if name in self.history.values:
                curve = self.history.series(name).nanmean(-1).tolist()
                record.scalars[f"{self.group}/{name}/mean"] = (list(self.history.steps), curve)
