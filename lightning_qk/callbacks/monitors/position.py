"""Callback: how positional the attention of heads is while a model trains."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from lightning_qk.callbacks.monitors._captured import CaptureMonitor, Measured
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.capture.record import UnsupportedCallError
from lightning_qk.functional.attention import MeanSums
from lightning_qk.functional.position import positional_share
from lightning_qk.metrics.means import HeadMeans
from lightning_qk.record.history import RunRecord

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

    statistics = (POSITION,)
    layer_statistics = ()
    extremes = {POSITION: ("min", "max")}  # noqa: RUF012 (never changed)
    curve_statistics = (POSITION,)
    figure_statistics = (POSITION,)
    subject = "attention logits"
    witness = POSITION
    presence = POSITION
    is_of_self_attention = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        sequences: int | None = 1,
        length: int | None = 512,
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
        if sequences is not None and sequences < 1:
            raise ValueError(f"expected sequences to be at least 1, or None for all of them, got {sequences}")
        if length is not None and length < 3:
            raise ValueError(
                f"expected a length of at least 3 tokens, of which the distance explains not all, got {length}: "
                "pass None for whole sequences"
            )
        self.sequences = sequences
        self.length = length

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {
            "every_n_steps": self.every_n_steps,
            "sequences": self.sequences,
            "length": self.length,
            "seed": self.seed,
            "every_n_eval_batches": self.every_n_eval_batches,
            "cached_calls": self.cached_calls,
        }

    def measure_call(self, name: str, call: CapturedCall) -> Measured | None:
        """The share of some sequences; nothing of cross-attention."""
        own = self._self_attention.get(name)
        if own is False:
            return None
        logits = self.logits_of(name, call).some_sequences(self.sequences, self._generator)
        logits = logits.crop_tokens(self.length, self._generator)
        if logits.query_offset is None:
            raise UnsupportedCallError(
                "its queries have no place among its keys, so that there is no distance"
            )
        share = positional_share(logits)[None, None]
        # Every sequence counts the same; tokens of padding, whose logits do not vary, not at all.
        weight = (share.isfinite() | ~logits.finite_heads()) * logits.shape[0]
        return Measured(
            MeanSums(torch.where(weight > 0, share * weight, 0.0), weight.to(share)),
            logits.shape[1],
            call.d_head,
        )

    def metric(self, heads: dict[str, int]) -> HeadMeans:
        """Means over the sequences that were drawn."""
        return HeadMeans(heads, (POSITION,))

    def contribute(self, record: RunRecord) -> None:
        """Add the history, and its mean as a curve."""
        super().contribute(record)
        record.position = self.history
