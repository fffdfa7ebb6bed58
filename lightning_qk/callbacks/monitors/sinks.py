"""Callback: attention sinks, and what they do to the output of heads while a model trains."""

from typing_extensions import Unpack

from lightning_qk.callbacks.monitors._base import at_least
from lightning_qk.callbacks.monitors._captured import CaptureMonitor, CaptureOptions
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import MeanSums
from lightning_qk.functional.sinks import SINK_STATISTICS, sink_sums
from lightning_qk.metrics.means import HeadMeans
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
        options: see :class:`~lightning_qk.callbacks.monitors.CaptureMonitor`.
    """

    statistics = SINK_STATISTICS
    layer_statistics = logged_by_layer("attn", SINK_STATISTICS)
    extremes = logged_extremes("attn", SINK_STATISTICS)
    curve_statistics = ("sink_number", "sink_output", "waiver_mass")
    figure_statistics = logged_as_heatmap("attn", SINK_STATISTICS)
    record_field = "sinks"
    subject = "attention probabilities or values"
    witness = "waiver_mass"

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        rows: int | None = 64,
        sequences: int | None = 4,
        **options: Unpack[CaptureOptions],
    ) -> None:
        super().__init__(every_n_steps, **options)
        at_least(1, rows=rows, sequences=sequences)
        self.rows = rows
        self.sequences = sequences

    def measure_call(self, name: str, call: CapturedCall) -> MeanSums:
        """All statistics of some rows of some sequences."""
        logits, value = call.output()
        if self.sequences is not None and self.sequences < len(value):
            drawn = logits.draw(self.sequences, self._generator)
            logits, value = logits.sequences(drawn), value[drawn]
        return sink_sums(logits, value=value, rows=self.rows, generator=self._generator)

    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """Means over sequences, rows and keys."""
        return HeadMeans(heads, SINK_STATISTICS)
