"""Callback: how positional the attention of heads is while a model trains."""

import torch
from typing_extensions import Unpack

from lightning_qk.callbacks.monitors._base import at_least
from lightning_qk.callbacks.monitors._captured import CaptureMonitor, CaptureOptions
from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import MeanSums
from lightning_qk.functional.position import positional_share
from lightning_qk.metrics.means import HeadMeans
from lightning_qk.record.statistics import logged_as_heatmap, logged_by_layer, logged_extremes

POSITION = "positional_share"


class PositionMonitor(CaptureMonitor):
    """Logs how much of each head's logits is explained by the distance between query and key alone.

    The measure is :func:`~lightning_qk.functional.positional_share`: 1 for a head that looks at places whatever
    stands there, near 0 for one that follows content. It is taken of the logits as the attention function computes
    them, by the same capture as :class:`~lightning_qk.AttentionMonitor`'s, with outputs, losses and gradients
    bit-identical, and at no cost on steps that are not logged. All pairs of query and key count, so that it is
    measured on a few sequences, and of long ones on a stretch of ``length`` tokens that begins at a random place:
    one function of the distance is fitted to those of a micro-batch.

    Cross-attention, whose queries and keys are of different sequences, has no value.

    Logged keys, next to AttentionMonitor's:

    - ``attn/positional_share/mean``, ``/min``, ``/max`` over all heads, also in ``trainer.callback_metrics``;
    - ``attn/layer_03/positional_share`` with ``per_layer=True``, means over the layer's heads;
    - ``attn/layer_03/head_05/positional_share`` with ``per_head=True``;
    - ``attn/heatmap/positional_share`` as a layer × head figure.

    Micro-batches of a logged step and ranks are averaged, and validation and test loops are measured under
    ``attn/val/…`` and ``attn/test/…``, as AttentionMonitor does.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's ``log_every_n_steps``.
        sequences: how many sequences of each micro-batch to measure, drawn at random; None for all of them.
        length: how many consecutive tokens of a longer sequence to measure; None for all of them.
        options: see :class:`~lightning_qk.callbacks.monitors.CaptureMonitor`.
    """

    statistics = (POSITION,)
    layer_statistics = logged_by_layer("attn", (POSITION,))
    extremes = logged_extremes("attn", (POSITION,))
    curve_statistics = (POSITION,)
    figure_statistics = logged_as_heatmap("attn", (POSITION,))
    record_field = "position"
    subject = "attention logits"
    witness = POSITION
    is_of_self_attention = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        sequences: int | None = 1,
        length: int | None = 512,
        **options: Unpack[CaptureOptions],
    ) -> None:
        super().__init__(every_n_steps, **options)
        at_least(1, sequences=sequences)
        if length is not None and length < 3:
            raise ValueError(
                f"expected a length of at least 3 tokens, of which the distance explains not all, got {length}: "
                "pass None for whole sequences"
            )
        self.sequences = sequences
        self.length = length

    def measure_call(self, name: str, call: CapturedCall) -> MeanSums | None:
        """The share of some sequences; nothing of cross-attention."""
        if call.self_attention is False:
            return None
        logits = call.logits().some_sequences(self.sequences, self._generator)
        logits = logits.crop_tokens(self.length, self._generator)
        if logits.query_offset is None:
            raise UnsupportedCallError(
                "its queries have no place among its keys, so that there is no distance"
            )
        share = positional_share(logits)[None, None]
        # Every sequence counts the same; tokens of padding, whose logits do not vary, not at all.
        weight = (share.isfinite() | ~logits.finite_heads()) * logits.shape[0]
        return MeanSums(torch.where(weight > 0, share * weight, 0.0), weight.to(share))

    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """Means over the sequences that were drawn."""
        return HeadMeans(heads, (POSITION,))
