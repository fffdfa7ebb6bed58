"""What the monitors of captured attention share: layers, the capture, pools of a step and of evaluation loops."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_qk.callbacks._monitor import Monitor, OnUnreadable, PerLayer, flat_values, shorten
from lightning_qk.callbacks._pool import SumsPool
from lightning_qk.callbacks._trainer import logging_step
from lightning_qk.callbacks._watched import Patterns, WatchedReader, matches
from lightning_qk.capture.call import output_arguments, statistics_arguments
from lightning_qk.capture.interface import AttentionCapture
from lightning_qk.capture.record import AttentionCall, SoftmaxCall, UnsupportedCallError
from lightning_qk.functional._sums import MeanSums
from lightning_qk.functional.localization import AttentionSums
from lightning_qk.heads.errors import NotTokenAttention
from lightning_qk.heads.local import local_heads
from lightning_qk.heads.reader import find_attention
from lightning_qk.logging.history import RunRecord
from lightning_qk.logging.loggers import log_scalars
from lightning_qk.logging.states import DID_NOT_RUN, KNOWN, LEFT_OUT, NO_DATA, NO_VALUE, NOT_FINITE
from lightning_qk.metrics.means import HeadMeans


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


def tensors_of(
    call: AttentionCall | SoftmaxCall, *, self_attention: bool | None, value: bool
) -> dict[str, Any]:
    """Arguments of the functions of query and key, and of value where asked.

    Raises:
        UnsupportedCallError: the call is an observed softmax, or cannot be read.
    """
    if isinstance(call, SoftmaxCall):
        needed = "queries, keys and values" if value else "queries and keys"
        raise UnsupportedCallError(
            f"it takes its softmax in its own forward, where logits are seen but not {needed}: AttentionMonitor "
            "measures what follows from logits alone"
        )
    read = output_arguments if value else statistics_arguments
    return read(call, self_attention=self_attention)


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
        self._generator = torch.Generator()
        self._capture: AttentionCapture | None = None
        self._modules: dict[str, nn.Module] = {}
        self._reader: WatchedReader | None = None
        # Known before the first call wherever the weights can be read, so that every rank has the same layers.
        self._heads: dict[str, int] = {}
        self._self_attention: dict[str, bool] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        # Where calls are added up now: the step's pool, or that of an evaluation's dataloader.
        self._step_pool = SumsPool()
        self._evaluation: dict[int, SumsPool] = {}
        self._pool = self._step_pool

    # What a subclass says

    @abstractmethod
    def measure_call(self, name: str, call: AttentionCall | SoftmaxCall) -> Measured | None:
        """Additive statistics of one call; None where the layer has none of these.

        Raises:
            UnsupportedCallError: the call cannot be measured.
        """

    @abstractmethod
    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """What the calls of all ranks are pooled in: layer name → heads."""

    def adjust(self, metric: HeadMeans, values: dict[str, Tensor]) -> None:
        """Change values in place, before anything is logged."""

    # Listening

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and stand at the attention interface before the first forward."""
        super().on_fit_start(trainer, pl_module)
        self._listen_to(trainer, pl_module)

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
        self._shapes = {}
        self._step_pool.reset()
        self._generator.manual_seed(self.seed + trainer.global_rank)
        names = {module: name for name, module in self._modules.items()}
        self._capture = AttentionCapture(names, self._hear, model=pl_module)
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

    def _hear(self, name: str, call: AttentionCall | SoftmaxCall) -> None:
        found = self.measure_call(name, call)
        if found is not None:
            heads, where = self._check_shape(name, call.module, found)
            self._pool.add(name, found.sums, heads=heads, where=where)

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
        heads = self._heads.setdefault(name, shape[0])
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
        self._name_missing()
        assert self._capture is not None  # _listen_to
        pool.leave_out(self._capture.problems)
        self._agree_on_heads(trainer)
        heads = {name: self._heads[name] for name in self._modules if name in self._heads}
        if not heads:
            return None
        self.remember_layers(heads, {name for name, own in self._self_attention.items() if not own})
        metric = self.metric(heads).to(pl_module.device)
        ran = pool.names
        pool.into(metric)
        pool.reset()
        values = flat_values(metric)
        self.states = self._states(metric, values, ran)
        self.adjust(metric, values)
        return values

    def _states(self, metric: HeadMeans, values: Mapping[str, Tensor], ran: Collection[str]) -> Tensor:
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
            problem = self._capture.problems.get(name)
            if problem is not None:
                self.history.reasons[self.labels[name]] = problem
            own = self._self_attention.get(name)
            part[empty] = (
                LEFT_OUT
                if problem is not None
                else NO_VALUE
                if own is False and self.is_of_self_attention
                else NO_DATA
                if name in ran
                else DID_NOT_RUN
            )
        return states

    def _agree_on_heads(self, trainer: Trainer) -> None:
        """Learn the layers whose heads only the calls tell from all ranks, lest their metrics differ in shape."""
        distributed = torch.distributed
        if trainer.world_size < 2 or self._heads.keys() >= self._modules.keys():
            return
        if distributed.is_available() and distributed.is_initialized():
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, self._heads)
            for heads in found:
                self._heads |= heads

    def _name_missing(self) -> None:
        capture = self._capture
        assert capture is not None  # _listen_to
        self.note_left_out(capture.problems)
        missing = [
            name for name in self._modules if name not in capture.heard and name not in capture.problems
        ]
        if missing:
            kinds = ", ".join(sorted({type(self._modules[name]).__name__ for name in missing}))
            self.note(
                f"no attention call of {len(missing)} of {len(self._modules)} layers was seen "
                f"({shorten(missing)}; class {kinds}): such a layer was not run, or computes its softmax "
                "where it cannot be seen (inside a compiled graph, say); what goes through transformers' "
                "AttentionInterface, scaled_dot_product_attention or nn.MultiheadAttention is captured in any case"
            )

    # Validation and test loops

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a loop."""
        self._evaluation = {}
        if self._capture is None and self._measures_evaluation(trainer):
            self._listen_to(trainer, pl_module)  # validation or test without a fit around it

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
            values = self.attempt(partial(self._compute, trainer, pl_module, pool))
            if values is not None:
                publish = partial(self._publish_evaluation, trainer, pl_module, values, stage, suffix)
                self.attempt(publish, "logging")

    def _publish_evaluation(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        values: dict[str, Tensor],
        stage: str,
        suffix: str,
    ) -> None:
        assert self.history is not None  # _compute
        means = {name: flat for name, flat in values.items() if not name.endswith("_se")}
        prefix = f"{self.group}/{stage}"
        over_all = self.over_the_model(means, prefix, states=self.states)
        overall = {key + suffix: value for key, value in over_all.items()}
        layers = self.by_layer_and_head(self.history, means, prefix, states=self.states)
        # Not through Lightning to the loggers: trainer.test would print a table of them all.
        pl_module.log_dict(overall, logger=False, on_step=False, on_epoch=True, add_dataloader_idx=False)
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
