"""Callback: where attention goes while a model trains."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_qk.callbacks._monitor import Monitor, flat_values, shorten
from lightning_qk.callbacks._pool import AttentionPool
from lightning_qk.callbacks._trainer import logging_step, projection_reader
from lightning_qk.capture.interface import AttentionCapture
from lightning_qk.capture.record import AttentionCall, SoftmaxCall, UnsupportedCallError
from lightning_qk.capture.statistics import CallSums, call_sums
from lightning_qk.heads.local import local_heads
from lightning_qk.heads.reader import find_attention
from lightning_qk.logging.history import RunRecord
from lightning_qk.logging.loggers import log_scalars

# Statistics of positions, which mean nothing between two sequences.
_OF_POSITIONS = ("distance", "distance_spread", "diagonal")


class AttentionMonitor(Monitor):
    """Logs per-head attention statistics, taken at the attention call during training.

    Query, key and mask are taken as the attention function receives them, so that the numbers are those of
    the real softmax, in training mode and before dropout, whatever the model does around it. The model's
    outputs, losses and gradients stay bit-identical. It costs nothing on the steps that it does not log.

    Captured are calls through transformers' attention interface, of
    ``torch.nn.functional.scaled_dot_product_attention`` and of ``nn.MultiheadAttention``, in compiled models
    too; and, outside of compiled ones, the softmax of layers that multiply queries and keys themselves. What a
    function other than torch's and transformers' own computes is found by calling it once more on random
    numbers, at the first measured step; where its arguments do not tell, its own softmax is observed, and a
    function that has none is left out.

    Logged keys, for each statistic of :func:`~lightning_qk.functional.attention_statistics`:

    - ``attn/<statistic>/mean``, ``/min``, ``/max`` over all heads, also in ``trainer.callback_metrics``;
    - ``attn/layer_03/<statistic>`` for entropy, max_logit, distance and sink_first, means over the layer's
      heads (``encoder_layer_03`` and so on where a model has several stacks);
    - ``attn/layer_03/head_05/<statistic>`` with ``per_head=True``;
    - ``attn/heatmap/<statistic>`` layer × head figures, to loggers that can show them.

    All micro-batches of a logged step and all ranks are pooled. Attention layers that were not captured are
    named once in the log, with what to do.

    Validation and test loops are measured too: ``attn/val/<statistic>/mean`` and so on, ``attn/test/…`` there,
    pooled over the loop, with ``/dataloader_idx_1`` at the end where there are several dataloaders. The sanity
    check is not.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's
            ``log_every_n_steps``.
        rows: query rows to sample in each sequence, without bias; None for all of them. Maxima over sampled
            rows are lower bounds.
        seed: of the monitor's own random generator; torch's global one is never touched.
        every_n_eval_batches: in validation and test loops, measure the first batch of each dataloader and every
            n-th after it; 0 for never.
        per_head: also log one scalar a head.
        figures_every: draw figures at every n-th measurement and at the end; 0 for never.
        report: write the report at the end.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: the module holds no transformer attention, or an argument is out of range.
    """

    group = "attn"
    layer_statistics = ("entropy", "max_logit", "distance", "sink_first")
    figure_statistics = ("entropy_normalized", "distance", "sink_first")
    subject = "attention logits"
    witness = "entropy"

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        rows: int | None = 64,
        seed: int = 0,
        every_n_eval_batches: int = 10,
        per_head: bool = False,
        figures_every: int = 10,
        report: bool = True,
    ) -> None:
        super().__init__(every_n_steps, per_head=per_head, figures_every=figures_every, report=report)
        if rows is not None and rows < 1:
            raise ValueError(f"expected rows to be at least 1, or None for all rows, got {rows}")
        if every_n_eval_batches < 0:
            raise ValueError(
                f"expected every_n_eval_batches to be 0 (never) or more, got {every_n_eval_batches}"
            )
        self.rows = rows
        self.seed = seed
        self.every_n_eval_batches = every_n_eval_batches
        self._generator = torch.Generator()
        self._capture: AttentionCapture | None = None
        self._modules: dict[str, nn.Module] = {}
        # Known before the first call wherever the weights can be read, so that every rank has the same layers.
        self._heads: dict[str, int] = {}
        self._self_attention: dict[str, bool] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._seen: set[str] = set()
        # Where calls are added up now: the step's pool, or that of an evaluation's dataloader.
        self._step_pool = AttentionPool()
        self._evaluation: dict[int, AttentionPool] = {}
        self._pool = self._step_pool

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {
            "every_n_steps": self.every_n_steps,
            "rows": self.rows,
            "seed": self.seed,
            "every_n_eval_batches": self.every_n_eval_batches,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and stand at the attention interface before the first forward."""
        super().on_fit_start(trainer, pl_module)
        self._listen_to(trainer, pl_module)

    def _listen_to(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._modules = find_attention(pl_module)
        try:
            layers = projection_reader(trainer, pl_module).layers
        except ValueError:
            if not self._modules:
                raise
            layers = {}  # no layout is known, but calls can still be captured
        self._heads = {name: layer.heads for name, layer in layers.items()}
        self._self_attention = {name: layer.self_attention for name, layer in layers.items()}
        self._shapes, self._seen = {}, set()
        self._step_pool.reset()
        self._generator.manual_seed(self.seed + trainer.global_rank)
        names = {module: name for name, module in self._modules.items()}
        self._capture = AttentionCapture(names, self._hear, model=pl_module)
        self._capture.install()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the attention interface as it was."""
        if self._capture is not None:
            self._capture.remove()
            self._capture = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the report, and the attention interface as it was: teardown may not follow."""
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "fit")

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
        found = call_sums(
            call,
            self_attention=self._self_attention.get(name),
            heads=self._heads_here(name, call.module) if isinstance(call, SoftmaxCall) else None,
            rows=self.rows,
            generator=self._generator,
        )
        heads, where = self._check_shape(name, call.module, found)
        self._pool.add(name, found.sums, heads=heads, where=where)

    def _heads_here(self, name: str, module: nn.Module) -> int | None:
        """How many of a layer's heads this process computes; None where its weights do not say."""
        heads = self._heads.get(name)
        where = None if heads is None else local_heads(module, heads)
        return heads if where is None else where.stop - where.start

    def _check_shape(self, name: str, module: nn.Module, found: CallSums) -> tuple[int, slice | None]:
        """How many heads the layer has, and which of them this call had (None: all)."""
        shape = found.shape[1], found.d_head
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

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        """Statistics of all heads over the step's micro-batches, reduced over ranks."""
        return self._compute(trainer, pl_module, self._step_pool)

    def _compute(
        self, trainer: Trainer, pl_module: LightningModule, pool: AttentionPool
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
        metric = pool.metric(heads, pl_module.device)
        pool.reset()
        values = flat_values(metric)
        for statistic in _OF_POSITIONS:
            for key in (statistic, f"{statistic}_se"):
                for name, part in metric.split(values[key]).items():
                    if not self._self_attention.get(name, True):
                        part.fill_(torch.nan)
        parts = metric.split(values["max_logit"]).items()
        self._seen |= {name for name, part in parts if part.isfinite().any()}
        return values

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
        self._pool = self._evaluation.setdefault(dataloader_idx, AttentionPool())
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
            pool = self._evaluation.get(index, AttentionPool())
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
        overall = {key + suffix: value for key, value in self.over_the_model(means, prefix).items()}
        layers = self.by_layer_and_head(self.history, means, prefix)
        # Not through Lightning to the loggers: trainer.test would print a table of them all.
        pl_module.log_dict(overall, logger=False, on_step=False, on_epoch=True, add_dataloader_idx=False)
        scalars = overall | {key + suffix: value for key, value in layers.items()}
        log_scalars(trainer, scalars, logging_step(trainer))

    def expects(self, label: str) -> bool:
        """A layer that was never captured has no value, and that was said already."""
        return any(self.labels[name] == label for name in self._seen)

    def contribute(self, record: RunRecord) -> None:
        """Add the history to the record."""
        record.attention = self.history
        if self.rows is not None:
            record.notes.append(
                f"Attention statistics are means over {self.rows} sampled query rows of each sequence; maximum "
                "logits are lower bounds."
            )
