"""Callback: where attention goes while a model trains."""

import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import Unpack

from lightning_qk.callbacks._output import log_at_step
from lightning_qk.callbacks.callback import SUMS_UP
from lightning_qk.callbacks.monitors._base import Monitor, at_least
from lightning_qk.callbacks.monitors._captured import CaptureMonitor, CaptureOptions
from lightning_qk.callbacks.monitors._round import Part
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import (
    POSITION_STATISTICS,
    STATISTICS,
    AttentionSums,
    MeanSums,
    attention_sums,
)
from lightning_qk.functional.logits import AttentionLogits
from lightning_qk.functional.propagation import PROFILE_BINS, profile_sums
from lightning_qk.metrics.attention import AttentionStatistics
from lightning_qk.metrics.collector import SumAccumulator
from lightning_qk.metrics.later import Later, attention_later
from lightning_qk.metrics.means import HeadMeans
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.statistics import logged_as_heatmap, logged_by_layer, logged_extremes
from lightning_qk.record.verdicts import healthy_share

# The report's curve over positions is measured on few rows of few sequences, at few steps: the first ones, in
# doubling distance, and every tenth. It is not logged.
_PROFILE = "profile"
_PROFILE_ROWS, _PROFILE_SEQUENCES, _PROFILE_EVERY = 16, 4, 10

HEALTH = "attn/health"


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
    - ``attn/health``, the share of heads that are not flagged, by what the trainer's monitors have measured until
      then, see :func:`~lightning_qk.record.healthy_share`;
    - ``attn/layer_03/head_05/<statistic>`` with ``per_head=True``;
    - ``attn/heatmap/<statistic>`` layer × head figures, to loggers that can show them.

    All micro-batches of a logged step and all ranks are pooled. Attention layers that were not captured are
    named once in the log, with what to do.

    Validation and test loops are measured too: ``attn/val/<statistic>/mean``, ``attn/test/…`` there,
    pooled over the loop, with ``/dataloader_idx_1`` at the end where there are several dataloaders. The sanity
    check is not.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's ``log_every_n_steps``.
        rows: query rows to sample in each sequence, without bias; None for all of them. Maxima over sampled
            rows are lower bounds.
        options: see :class:`~lightning_qk.callbacks.monitors.CaptureMonitor`.
    """

    statistics = STATISTICS
    layer_statistics = logged_by_layer("attn", STATISTICS)
    extremes = logged_extremes("attn", STATISTICS)
    figure_statistics = logged_as_heatmap("attn", STATISTICS)
    subject = "attention logits"
    witness = "entropy"

    record_field = "attention"

    live: ClassVar[tuple[str, ...]] = ("_profile_generator",)

    def __init__(
        self, every_n_steps: int | None = None, *, rows: int | None = 64, **options: Unpack[CaptureOptions]
    ) -> None:
        super().__init__(every_n_steps, **options)
        at_least(1, rows=rows)
        self.rows = rows

    def begin_listening(self) -> None:
        """Forget the fit before."""
        super().begin_listening()
        self._measured = 0
        self._profile_generator = torch.Generator()

    @property
    def place(self) -> int:
        """After the other monitors, whose numbers of the same step heads are judged by."""
        return SUMS_UP

    def begin(self) -> None:
        """Nothing was judged yet."""
        super().begin()
        self._health = History(["run"], [1])

    def measure_call(self, name: str, call: CapturedCall) -> AttentionSums | Later | dict[str, Any]:
        """All statistics of sampled rows, and the report's curves where they are due."""
        logits = call.logits()
        sums = attention_later(logits, "", self._sums) or self._sums(logits)
        if self._pool is self._step_pool and self._profile_is_due():
            few = logits.sequences(slice(_PROFILE_SEQUENCES))
            profile = attention_later(few, _PROFILE, self._profile_sums) or self._profile_sums(few)
            if profile is not None:
                return {"": sums, _PROFILE: profile}
        return sums

    def _sums(self, logits: AttentionLogits) -> AttentionSums:
        return attention_sums(logits, rows=self.rows, generator=self._generator)

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As every monitor of attention."""
        super().find_layers(trainer, pl_module)
        self._profile_generator.manual_seed(self.seed + trainer.global_rank)

    def _profile_sums(self, logits: AttentionLogits) -> MeanSums | None:
        """None where it fails, which says nothing of the statistics."""
        return self.attempt(
            lambda: profile_sums(logits, rows=_PROFILE_ROWS, generator=self._profile_generator),
            "measuring the report's curves over positions",
        )

    def _profile_is_due(self) -> bool:
        count = self._measured
        return self.report and (count % _PROFILE_EVERY == 0 or count & (count - 1) == 0)

    def metrics(self, heads: dict[str, int]) -> list[Any]:
        """The statistics, and the report's curves."""
        return [*super().metrics(heads), HeadMeans(heads, [str(part) for part in range(PROFILE_BINS)])]

    def begin_measuring(self) -> int:
        """With the report's curves where they are due."""
        is_due = self._profile_is_due()
        self._measured += 1
        return 1 + is_due

    def fill(self, metrics: Sequence[Any], pool: SumAccumulator) -> None:
        """Add statistics and curves."""
        super().fill(metrics, pool)
        for profile in metrics[1:]:
            pool.into(profile, _PROFILE)

    def take_more(self, tables: Sequence[Tensor], left_out: Collection[str]) -> None:
        """Keep the curves of the step."""
        trainer, _ = self.running()
        for table in tables:
            parts = zip(self.labels.items(), table.float().mT.split(list(self.history.heads)), strict=True)
            nothing = torch.full((), torch.nan)
            curves = {
                label: nothing.expand_as(curve).clone() if name in left_out else curve
                for (name, label), curve in parts
            }
            self._snapshots.append(self.step_of(trainer), curves)

    def gaps(self, part: Part) -> dict[str, Tensor]:
        """The share of healthy heads: a process that could not remember the step has none."""
        known = self._health_at(self.step_of(part.trainer))
        return {HEALTH: torch.tensor([known.get(HEALTH, math.nan)])}

    def filled(self, part: Part, values: dict[str, Tensor]) -> None:
        """Give ``trainer.callback_metrics`` what the step comes to."""
        health = float(values[HEALTH].numpy()[0])
        if part.error is None and math.isfinite(health) and not self._at_the_end:  # no module may log then
            log_at_step(part.trainer, part.pl_module, {HEALTH: health})

    def conclude(self, trainer: Trainer, step: int) -> None:
        """Judge the heads that count, by what all monitors have measured."""
        record = RunRecord()
        others = [one for one in trainer.callbacks if isinstance(one, Monitor) and one is not self]  # type: ignore[attr-defined]
        for monitor in (*others, self):
            monitor.contribute_history(record)
        labels = self.history.layers
        if self.counted is not None:
            of_heads = np.repeat(labels, self.history.heads)
            labels = tuple(set(of_heads[self.counted.numpy()].tolist()))
        self._health.append(step, {"health": torch.tensor([healthy_share(record, labels)])})

    def of_run(self, step: int) -> dict[str, float]:
        """The share of heads that are not flagged."""
        return self._health_at(step) if self.is_logged("health") else {}

    def _health_at(self, step: int) -> dict[str, float]:
        """Nothing where no head was judged."""
        if self._health.steps[-1:] != [step]:
            return {}
        value = float(self._health.values["health"][-1].numpy()[0])
        return {HEALTH: value} if math.isfinite(value) else {}

    def state_dict(self) -> dict[str, Any]:
        """The histories."""
        state = super().state_dict()
        return {**state, "health": self._health.state_dict()} if self._health.steps else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the histories of a checkpoint."""
        super().load_state_dict(state_dict)
        if "health" in state_dict:
            self._health = History.from_state_dict(state_dict["health"])

    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """Means and maxima."""
        return AttentionStatistics(heads)

    def has_value(self, name: str, flat: Tensor) -> Tensor:
        """Positions mean nothing between two sequences."""
        has = super().has_value(name, flat)
        if name in POSITION_STATISTICS and self.history.layers:
            for layer, part in zip(self.labels, self.history.split(has), strict=True):
                part.fill_(self._self_attention.get(layer, True))
        return has

    def adjust(self, metric: HeadMeans, values: dict[str, Tensor]) -> None:
        """Positions mean nothing between two sequences."""
        if self._collector is not None:
            self._collector.blank_positions(metric, values)

    def contribute(self, record: RunRecord) -> None:
        """Add the history to the record."""
        super().contribute(record)
        if len(self._snapshots):
            record.snapshots["linear_profile"] = self._snapshots
        curve = self._health.series("health")[:, 0].tolist() if self._health.steps else []
        known = [one for one in zip(self._health.steps, curve, strict=True) if math.isfinite(one[1])]
        if known:
            record.scalars[HEALTH] = [step for step, _ in known], [value for _, value in known]
        if self.rows is not None:
            record.notes.append(
                f"Attention statistics are means over {self.rows} sampled query rows of each sequence; maximum "
                "logits are lower bounds."
            )
