"""Callback: where attention goes while a model trains."""

from typing import Any

import torch
from torch import Tensor

from lightning_qk.callbacks._captured import CaptureMonitor, Measured
from lightning_qk.capture.record import AttentionCall, SoftmaxCall
from lightning_qk.capture.statistics import call_sums
from lightning_qk.functional.localization import POSITION_STATISTICS
from lightning_qk.logging.history import RunRecord
from lightning_qk.metrics.attention import AttentionStatistics
from lightning_qk.metrics.means import HeadMeans


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

    layer_statistics = ("entropy", "max_logit", "distance", "sink_first")
    figure_statistics = ("entropy_normalized", "distance", "sink_first")
    subject = "attention logits"
    witness = "entropy"
    presence = "max_logit"

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
        super().__init__(
            every_n_steps,
            seed=seed,
            every_n_eval_batches=every_n_eval_batches,
            per_head=per_head,
            figures_every=figures_every,
            report=report,
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
        }

    def measure_call(self, name: str, call: AttentionCall | SoftmaxCall) -> Measured:
        """All statistics of sampled rows."""
        found = call_sums(
            call,
            self_attention=self._self_attention.get(name),
            heads=self._heads_here(name, call.module) if isinstance(call, SoftmaxCall) else None,
            rows=self.rows,
            generator=self._generator,
        )
        return Measured(found.sums, found.shape[1], found.d_head)

    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """Means and maxima."""
        return AttentionStatistics(heads)

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
        if self.rows is not None:
            record.notes.append(
                f"Attention statistics are means over {self.rows} sampled query rows of each sequence; maximum "
                "logits are lower bounds."
            )
