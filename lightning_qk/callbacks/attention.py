"""Callback: where attention goes while a model trains."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_qk.callbacks._monitor import Monitor, flat_values, shorten
from lightning_qk.capture.call import AttentionCall, statistics_arguments
from lightning_qk.capture.interface import AttentionCapture
from lightning_qk.functional.localization import AttentionSums, attention_sums
from lightning_qk.heads.reader import find_attention, head_projections
from lightning_qk.logging.history import RunRecord
from lightning_qk.metrics.attention import AttentionStatistics

# Statistics of positions, which mean nothing between two sequences.
_OF_POSITIONS = ("distance", "distance_spread", "diagonal")


class AttentionMonitor(Monitor):
    """Logs per-head attention statistics, taken at the attention call during training.

    Query, key and mask are taken as the attention function receives them, so that the numbers are those of
    the real softmax, in training mode and before dropout, whatever the model does around it. The model's
    outputs, losses and gradients stay bit-identical. It costs nothing on the steps that it does not log.

    Logged keys, for each statistic of :func:`~lightning_qk.functional.attention_statistics`:

    - ``attn/<statistic>/mean``, ``/min``, ``/max`` over all heads, also in ``trainer.callback_metrics``;
    - ``attn/layer_03/<statistic>`` for entropy, max_logit, distance and sink_first, means over the layer's
      heads (``encoder_layer_03`` and so on where a model has several stacks);
    - ``attn/layer_03/head_05/<statistic>`` with ``per_head=True``;
    - ``attn/heatmap/<statistic>`` layer × head figures, to loggers that can show them.

    All micro-batches of a logged step and all ranks are pooled. Attention layers that were not captured are
    named once in the log, with what to do.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's
            ``log_every_n_steps``.
        rows: query rows to sample in each sequence, without bias; None for all of them. Maxima over sampled
            rows are lower bounds.
        seed: of the monitor's own random generator; torch's global one is never touched.
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
        per_head: bool = False,
        figures_every: int = 10,
        report: bool = True,
    ) -> None:
        super().__init__(every_n_steps, per_head=per_head, figures_every=figures_every, report=report)
        if rows is not None and rows < 1:
            raise ValueError(f"expected rows to be at least 1, or None for all rows, got {rows}")
        self.rows = rows
        self.seed = seed
        self._generator = torch.Generator()
        self._capture: AttentionCapture | None = None
        self._metric: AttentionStatistics | None = None
        self._sums: dict[str, list[AttentionSums]] = {}
        self._modules: dict[str, nn.Module] = {}
        # Known before the first call wherever the weights can be read, so that every rank has the same layers.
        self._heads: dict[str, int] = {}
        self._self_attention: dict[str, bool] = {}
        self._seen: set[str] = set()

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {"every_n_steps": self.every_n_steps, "rows": self.rows, "seed": self.seed}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and stand at the attention interface before the first forward."""
        super().on_fit_start(trainer, pl_module)
        self._modules = find_attention(pl_module)
        try:
            with torch.no_grad():
                projections = head_projections(pl_module)
        except ValueError:
            if not self._modules:
                raise
            projections = {}  # no layout is known, but calls can still be captured
        self._heads = {name: head.heads for name, head in projections.items()}
        self._self_attention = {name: head.self_attention for name, head in projections.items()}
        self._seen, self._sums = set(), {}
        self._metric = None
        self._generator.manual_seed(self.seed + trainer.global_rank)
        self._capture = AttentionCapture({module: name for name, module in self._modules.items()}, self._hear)
        self._capture.install()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the attention interface as it was."""
        if self._capture is not None:
            self._capture.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the report, and the attention interface as it was: teardown may not follow."""
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "fit")

    def begin_batch(self, is_due: bool) -> None:
        """Listen during batches of a logged step."""
        if self._capture is not None:
            self._capture.enabled = is_due

    def end_batch(self) -> None:
        """Stop listening: a validation between two micro-batches is not training."""
        if self._capture is not None:
            self._capture.enabled = False

    def _hear(self, name: str, call: AttentionCall) -> None:
        arguments = statistics_arguments(call, self_attention=self._self_attention.get(name))
        sums = attention_sums(**arguments, rows=self.rows, generator=self._generator)
        self._sums.setdefault(name, []).append(sums)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        """Statistics of all heads over the step's micro-batches, reduced over ranks."""
        sums, self._sums = self._sums, {}
        self._name_missing()
        metric = self._metric
        if metric is None or any(name not in metric.heads for name in sums):
            known = {**self._heads, **{name: calls[0].total.shape[-1] for name, calls in sums.items()}}
            heads = {name: known[name] for name in self._modules if name in known}
            if not heads:
                return None
            self._heads = heads
            self.remember_layers(heads, {name for name, own in self._self_attention.items() if not own})
            self._metric = metric = AttentionStatistics(heads)
        metric.to(pl_module.device).reset()
        metric.update(sums)
        values = flat_values(metric)
        for statistic in _OF_POSITIONS:
            for key in (statistic, f"{statistic}_se"):
                for name, part in metric.split(values[key]).items():
                    if not self._self_attention.get(name, True):
                        part.fill_(torch.nan)
        parts = metric.split(values["max_logit"]).items()
        self._seen |= {name for name, part in parts if part.isfinite().any()}
        return values

    def _name_missing(self) -> None:
        capture = self._capture
        assert capture is not None  # on_fit_start
        self.note_left_out(capture.problems)
        missing = [
            name for name in self._modules if name not in capture.heard and name not in capture.problems
        ]
        if missing:
            kinds = ", ".join(sorted({type(self._modules[name]).__name__ for name in missing}))
            self.note(
                f"no attention call of {len(missing)} of {len(self._modules)} layers was seen "
                f"({shorten(missing)}; class {kinds}): such a layer was not run, has attention of its own, or was "
                "compiled before training; only attention that goes through transformers' AttentionInterface "
                "is captured"
            )

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
