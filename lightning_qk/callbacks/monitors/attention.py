"""Callback: where attention goes while a model trains."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk.callbacks._ranks import all_or_none, alone, reduce_states
from lightning_qk.callbacks.monitors._captured import CaptureMonitor, Measured
from lightning_qk.callbacks.monitors._pool import SumsPool
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import POSITION_STATISTICS, STATISTICS, attention_sums
from lightning_qk.functional.propagation import PROFILE_BINS, profile_sums
from lightning_qk.metrics.attention import AttentionStatistics
from lightning_qk.metrics.means import HeadMeans
from lightning_qk.record.history import RunRecord

# The report's curve over positions is measured on few rows of few sequences, at few steps: the first ones, in
# doubling distance, and every tenth. It is not logged.
_PROFILE_ROWS, _PROFILE_SEQUENCES, _PROFILE_EVERY = 16, 4, 10


class AttentionMonitor(CaptureMonitor):
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

    - ``attn/<statistic>/mean`` over all heads; ``/min`` and ``/max`` of entropy and entropy_normalized, ``/max``
      of max_logit, max_abs_logit, query_norm, key_norm, sink_first and sink_rate, ``/min`` of linear_share;
      ``trainer.callback_metrics`` has all three of each;
    - ``attn/layer_03/<statistic>`` for entropy and max_logit, or those in ``per_layer``, means over the layer's
      heads (``encoder_layer_03`` and so on where a model has several stacks);
    - ``attn/layer_03/head_05/<statistic>`` with ``per_head=True``;
    - ``attn/heatmap/<statistic>`` layer × head figures, to loggers that can show them.

    All micro-batches of a logged step and all ranks are pooled. Attention layers that were not captured are
    named once in the log, with what to do.

    Validation and test loops are measured too: ``attn/val/<statistic>/mean``, ``attn/test/…`` there,
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
        per_layer: names of statistics to log for each layer; None for entropy and max_logit; True for all of them,
            in evaluation loops too; False for none.
        per_head: also log one scalar a head.
        figures_every: draw figures at every n-th measurement and at the end; 0 for never.
        report: write the report at the end.
        modules: glob pattern or patterns on qualified names of attention layers, such as ``"*.encoder.*"``; None
            for all of them.
        on_unreadable: what to do where a layer that is asked for cannot be watched, or there is none: ``"warn"``
            watches the rest and names it once with the reason, ``"raise"`` refuses at the start of training.
        cached_calls: also measure calls within transformers' ``generate``, and calls of self-attention with keys
            of earlier tokens from a cache. By default they are left out, and named once: statistics are those of
            the loss's own forwards.

    Raises:
        ValueError: an argument is out of range; with ``on_unreadable="raise"``, at the start of training: a layer
            cannot be watched.
    """

    statistics = STATISTICS
    layer_statistics = ("entropy", "max_logit")
    extremes = {  # noqa: RUF012 (never changed)
        "entropy": ("min", "max"),
        "entropy_normalized": ("min", "max"),
        "max_logit": ("max",),
        "max_abs_logit": ("max",),
        "query_norm": ("max",),
        "key_norm": ("max",),
        "sink_first": ("max",),
        "sink_rate": ("max",),
        "linear_share": ("min",),
    }
    figure_statistics = ("entropy_normalized", "distance", "sink_first")
    subject = "attention logits"
    witness = "entropy"
    presence = "max_logit"

    fit_state = {"_measured": int}  # noqa: RUF012 (never changed)
    running_state = {  # noqa: RUF012 (never changed)
        "_profile_pool": SumsPool,
        "_profile_generator": torch.Generator,
    }

    _measured: int
    _profile_pool: SumsPool
    _profile_generator: torch.Generator

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        rows: int | None = 64,
        seed: int = 0,
        every_n_eval_batches: int = 10,
        per_layer: bool | str | Sequence[str] | None = None,
        per_head: bool = False,
        figures_every: int = 10,
        report: bool = True,
        modules: str | Sequence[str] | None = None,
        on_unreadable: Literal["warn", "raise"] = "warn",
        cached_calls: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps,
            seed=seed,
            every_n_eval_batches=every_n_eval_batches,
            per_layer=per_layer,
            per_head=per_head,
            figures_every=figures_every,
            report=report,
            modules=modules,
            on_unreadable=on_unreadable,
            cached_calls=cached_calls,
        )
        if rows is not None and rows < 1:
            raise ValueError(f"expected rows to be at least 1, or None for all rows, got {rows}")
        self.rows = rows

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {
            "every_n_steps": self.every_n_steps,
            "rows": self.rows,
            "seed": self.seed,
            "every_n_eval_batches": self.every_n_eval_batches,
            "cached_calls": self.cached_calls,
        }

    def measure_call(self, name: str, call: CapturedCall) -> Measured:
        """All statistics of sampled rows."""
        logits = self.logits_of(name, call)
        sums = attention_sums(logits, rows=self.rows, generator=self._generator)
        return Measured(sums, logits.shape[1], call.d_head)

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As every monitor of attention."""
        super().find_layers(trainer, pl_module)
        self._profile_generator.manual_seed(self.seed + trainer.global_rank)
        self._measured = 0
        self._profile_pool.reset()

    def _hear(self, name: str, call: CapturedCall) -> None:
        super()._hear(name, call)
        if self._pool is self._step_pool and self._profile_is_due():
            self.attempt(
                lambda: self._add_profile(name, call), "measuring the report's curves over positions"
            )

    def _add_profile(self, name: str, call: CapturedCall) -> None:
        few = self.logits_of(name, call).sequences(slice(_PROFILE_SEQUENCES))
        sums = profile_sums(few, rows=_PROFILE_ROWS, generator=self._profile_generator)
        heads, where = self._check_shape(name, call.module, Measured(sums, sums.total.shape[2], call.d_head))
        self._profile_pool.add(name, sums, heads=heads, where=where)

    def _profile_is_due(self) -> bool:
        count = self._measured
        return self.report and (count % _PROFILE_EVERY == 0 or count & (count - 1) == 0)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        """Statistics of all heads, and the report's curves where they are due; a collective call."""
        is_due = self._profile_is_due()
        self._measured += 1
        try:
            values = super().measure(trainer, pl_module)
            if values is not None and is_due:
                self._measure_profile(trainer, pl_module)
        finally:
            self._profile_pool.reset()
        return values

    def _measure_profile(self, trainer: Trainer, pl_module: LightningModule) -> None:
        history = self.history
        assert history is not None  # super().measure

        def pooled() -> HeadMeans:
            heads = dict(zip(self.labels, history.heads, strict=True))
            metric = HeadMeans(heads, [str(part) for part in range(PROFILE_BINS)]).to(pl_module.device)
            self._profile_pool.leave_out(self._told | self._profile_pool.lost.keys())
            self._profile_pool.into(metric)
            return metric

        metric = alone(all_or_none(trainer, pooled))
        reduce_states(trainer, metric)
        curves = torch.stack(list(metric.compute().values())).reshape(PROFILE_BINS, -1).mT.float().cpu()
        parts = zip(self.labels.values(), curves.split(list(history.heads)), strict=True)
        self._snapshots.append(self.step_of(trainer), dict(parts))

    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """Means and maxima."""
        return AttentionStatistics(heads)

    def has_value(self, name: str, flat: Tensor) -> Tensor:
        """Positions mean nothing between two sequences."""
        has = super().has_value(name, flat)
        if self.history is not None and name in POSITION_STATISTICS:
            for (layer, _), part in zip(self.labels.items(), self.history.split(has), strict=True):
                part.fill_(self._self_attention.get(layer, True))
        return has

    def adjust(self, metric: HeadMeans, values: dict[str, Tensor]) -> None:
        """Positions mean nothing between two sequences."""
        for statistic in POSITION_STATISTICS:
            for key in (statistic, f"{statistic}_se"):
                for name, part in metric.split(values[key]).items():
                    if not self._self_attention.get(name, True):
                        part.fill_(torch.nan)

    def contribute(self, record: RunRecord) -> None:
        """Add the history to the record."""
        record.attention = self.history
        if len(self._snapshots):
            record.snapshots["linear_profile"] = self._snapshots
        if self.rows is not None:
            record.notes.append(
                f"Attention statistics are means over {self.rows} sampled query rows of each sequence; maximum "
                "logits are lower bounds."
            )
