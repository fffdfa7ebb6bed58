"""Callback: attention sinks, and what they do to the output of heads while a model trains."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning_qk.callbacks.monitors._captured import CaptureMonitor, Measured
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.sinks import SINK_STATISTICS, sink_sums
from lightning_qk.metrics.means import HeadMeans
from lightning_qk.record.history import RunRecord
from lightning_qk.record.statistics import logged_as_heatmap, logged_by_layer, logged_extremes


class SinkMonitor(CaptureMonitor):
    """Logs attention sinks per head: how many there are, what they do to the output, attention that is waived.

    Queries, keys, values and mask are taken as the attention function receives them, by the same capture as
    :class:`~lightning_qk.AttentionMonitor`'s: in training mode, whatever the implementation, with outputs, losses
    and gradients bit-identical, and at no cost on steps that are not logged. A layer that takes its softmax in
    its own forward shows logits but no values: it is named once in the log and left out.

    Logged keys, for each statistic of :func:`~lightning_qk.functional.sink_statistics` (``sink_number``,
    ``sink_share``, ``sink_output``, ``waiver_rate``, ``waiver_mass``, ``waiver_position``), next to
    AttentionMonitor's:

    - ``attn/<statistic>/mean`` over all heads, and ``/max`` of sink_output and waiver_mass;
      ``trainer.callback_metrics`` has the mean, minimum and maximum of each;
    - ``attn/layer_03/<statistic>`` for those in ``per_layer``, means over the layer's heads;
    - ``attn/layer_03/head_05/<statistic>`` with ``per_head=True``;
    - ``attn/heatmap/<statistic>`` layer × head figures for sink_output and waiver_mass.

    All micro-batches of a logged step and all ranks are pooled, and validation and test loops are measured under
    ``attn/val/…`` and ``attn/test/…``, as AttentionMonitor does. waiver_position compares the sequences of one
    call: it has no value where a micro-batch is a single sequence.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's ``log_every_n_steps``.
        rows: query rows to sample in each sequence; None for all of them.
        sequences: how many sequences of each micro-batch to measure, drawn at random; None for all of them.
        seed: of the monitor's own random generator; torch's global one is never touched.
        every_n_eval_batches: in validation and test loops, measure the first batch of each dataloader and every
            n-th after it; 0 for never.
        per_layer: names of statistics to log for each layer; None or False for none; True for all of them, in
            evaluation loops too.
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

    statistics = SINK_STATISTICS
    layer_statistics = logged_by_layer("attn", SINK_STATISTICS)
    extremes = logged_extremes("attn", SINK_STATISTICS)
    curve_statistics = ("sink_number", "sink_output", "waiver_mass")
    figure_statistics = logged_as_heatmap("attn", SINK_STATISTICS)
    subject = "attention probabilities or values"
    witness = "waiver_mass"
    presence = "sink_number"

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        rows: int | None = 64,
        sequences: int | None = 4,
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
        for name, value in (("rows", rows), ("sequences", sequences)):
            if value is not None and value < 1:
                raise ValueError(f"expected {name} to be at least 1, or None for all of them, got {value}")
        self.rows = rows
        self.sequences = sequences

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {
            "every_n_steps": self.every_n_steps,
            "rows": self.rows,
            "sequences": self.sequences,
            "seed": self.seed,
            "every_n_eval_batches": self.every_n_eval_batches,
            "cached_calls": self.cached_calls,
        }

    def measure_call(self, name: str, call: CapturedCall) -> Measured:
        """All statistics of some rows of some sequences."""
        logits, value = call.output(self_attention=self._self_attention.get(name))
        heads = logits.shape[1]
        if self.sequences is not None and self.sequences < len(value):
            drawn = logits.draw(self.sequences, self._generator)
            logits, value = logits.sequences(drawn), value[drawn]
        sums = sink_sums(logits, value=value, rows=self.rows, generator=self._generator)
        return Measured(sums, heads, call.d_head)

    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """Means over sequences, rows and keys."""
        return HeadMeans(heads, SINK_STATISTICS)

    def contribute(self, record: RunRecord) -> None:
        """Add the history, and its means as curves."""
        super().contribute(record)
        record.sinks = self.history
