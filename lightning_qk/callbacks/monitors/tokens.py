"""Callback: spectra of heads by the tokens that they see, and the attention that follows, while a model trains."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_qk.callbacks._layers import WatchedReader
from lightning_qk.callbacks._output import log_at_step
from lightning_qk.callbacks._ranks import fill_from_others
from lightning_qk.callbacks._trainer import ends_with_epoch
from lightning_qk.callbacks.monitors._base import at_least
from lightning_qk.callbacks.monitors._captured import CaptureMonitor, CaptureOptions
from lightning_qk.callbacks.monitors._predictions import LENGTH, Predictions, nothing_predicted
from lightning_qk.callbacks.monitors._round import Part
from lightning_qk.callbacks.monitors.spectrum import checked_offsets
from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.spectrum import MOMENTS, Support, support_size
from lightning_qk.functional.token_sums import TokenSums, token_sums
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.live_weights import ModuleGone
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.metrics.collector import AttentionCollector, SumAccumulator
from lightning_qk.metrics.spectrum import at_offset
from lightning_qk.metrics.tokens import TokenLayer, TokenStatistics
from lightning_qk.record.history import RunRecord
from lightning_qk.record.statistics import logged_as_heatmap, logged_by_layer, logged_extremes
from lightning_qk.tokens.calls import TokenCalls, call_facts, sees_itself_last


class TokenMonitor(CaptureMonitor):
    """Logs token-aware spectra: those of ``s Σ^½ W_QK Σ^½``, Σ the covariance of the tokens that a layer sees.

    Queries and keys are taken as the attention function receives them in the job's own forward, by the same
    capture as :class:`~lightning_qk.AttentionMonitor`'s: there is no further forward, and outputs, losses,
    gradients and random numbers of the job stay bit-identical. A known rotation by position is undone, and
    compared with the projections of what entered the layer. The spectrum is that of a token's key-query
    covariance, ``d_head`` wide: it needs no weights, and is in units of logits, the softmax scale ``s`` in, so
    that layers and models compare. The first token of each sequence, a sink in most language models, is apart.

    It is a monitor of its own, and no option of QKSpectrumMonitor, since it measures calls and not weights: on
    steps that are not logged it costs nothing, and micro-batches and ranks are pooled, by sums in one reduction.

    Logged keys:

    - ``qk/tokens/<statistic>/mean`` over all heads, for each moment of
      :func:`~lightning_qk.functional.qk_moments`; ``/min`` and ``/max`` of eig_mean and eig_var, ``/max`` of
      sym_var and frobenius_sq; ``trainer.callback_metrics`` has all three of each;
    - ``qk/tokens/layer_03/<statistic>`` for eig_var, or those in ``per_layer``, means over the layer's heads, and
      ``qk/tokens/layer_03/head_05/<statistic>`` with ``per_head=True``;
    - with ``offsets``, ``qk/tokens/offset_16/<statistic>/mean`` and so on, in layers with rotary encoding;
    - ``pred/<statistic>/mean``, statistics of the attention that follows from the moments alone
      (:func:`~lightning_qk.predict_attention`), for sequences as long as those seen; in the history, the report
      and ``trainer.callback_metrics`` too;
    - ``pred/semantic_share/mean``, where AttentionMonitor measures at the same step: the share of attention that
      has to be moved, at least, to come from what the moments predict to what was measured. It is logged with the
      next measurement, under the step that it belongs to.

    Layers whose queries and keys before rotation cannot be had are named once and left out.

    Sampled are ``tokens`` tokens of each sequence besides its first one. Of 4 sequences of 512 tokens of
    WikiText-2, 64 tokens each give the moments of SmolLM2's and MiniLM's heads with median errors of 0.5 % (mean)
    to 6 % (variances) of the spectrum's size, 128 of 0.3 to 3 %, and 256 of 0.2 to 1.5 %. Predictions draw
    ``surrogates`` sequences of at most 2048 tokens for every head at every ``predict_every``-th measurement and
    at the end, each process for its share of the layers. Memory is about ``24 d_head² + 1600 d_head``
    bytes a head, twice while a step is reduced and once until the next: 27 MiB for the 144 heads of GPT-2.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's ``log_every_n_steps``.
        tokens: tokens to sample in each sequence; None for all of them.
        support: what the spectrum is averaged over, see :func:`~lightning_qk.functional.qk_moments`.
        offsets: how many positions keys precede their query, see :class:`~lightning_qk.QKSpectrumMonitor`.
        predict_every: predict at the first measurement, every n-th after it, and the last one; 0 for never.
        surrogates: how many sequences to draw for a prediction.
        options: see :class:`~lightning_qk.callbacks.monitors.CaptureMonitor`.
    """

    group = "qk/tokens"
    statistics: tuple[str, ...] = MOMENTS
    layer_statistics: tuple[str, ...] = logged_by_layer("qk/tokens", MOMENTS)
    extremes = logged_extremes("qk/tokens", MOMENTS)
    figure_statistics = logged_as_heatmap("qk/tokens", MOMENTS)
    subject = "queries and keys"
    witness = "trace"
    is_of_self_attention = True

    live: ClassVar[tuple[str, ...]] = ("_calls", "_pooled")

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        tokens: int | None = 128,
        support: Support = "model",
        offsets: Sequence[int] = (),
        predict_every: int = 10,
        surrogates: int = 2,
        **options: Unpack[CaptureOptions],
    ) -> None:
        at_least(2, tokens=tokens)
        at_least(1, surrogates=surrogates)
        if predict_every < 0:
            raise ValueError(f"expected predict_every to be 0 (never) or more, got {predict_every}")
        support_size(torch.empty(1, 1), support)
        self.tokens = tokens
        self.support: Support = support
        self.offsets = checked_offsets(offsets)
        self.predict_every = predict_every
        self.surrogates = surrogates
        at_offsets = [at_offset(name, offset) for offset in self.offsets for name in MOMENTS]
        self.statistics = (*MOMENTS, *at_offsets)
        self.layer_statistics = (
            *type(self).layer_statistics,
            *(at_offset(name, offset) for offset in self.offsets for name in type(self).layer_statistics),
        )
        super().__init__(every_n_steps, **options)

    def begin(self) -> None:
        """Nothing was predicted yet."""
        super().begin()
        self._predictions = Predictions()

    def begin_listening(self) -> None:
        """Forget the calls of the layers found before."""
        super().begin_listening()
        # What is known of layers without their weights, the same on every process.
        self._known: dict[str, HeadProjections] = {}
        self._unread: set[str] = set()
        self._calls = TokenCalls(self._known, self._weights)
        self._positions: list[Any] = []
        # What calls say besides: of the newest step with a prediction.
        self._facts: dict[str, dict[str, Any]] = {}
        self._renewed: set[str] = set()
        self._measured = 0
        # The newest measurement, reduced over ranks.
        self._pooled: TokenStatistics | None = None
        self._pooled_step = -1
        self._predicts_now = False

    # Layers

    def also_captured(self, modules: Mapping[str, nn.Module], reader: WatchedReader) -> dict[str, Any]:
        """Operands of softmaxes, and what enters layers that rotate."""
        turned = {
            name: modules[name]
            for name, layer in reader.layers.items()
            if name in modules and layer.rotary is not None
        }
        self._positions = [self._calls.hook_positions(name, module) for name, module in turned.items()]
        return {"operands": True, "entered": (self._calls.enter, turned) if turned else None}

    def _take_facts(self, collector: AttentionCollector, reader: WatchedReader) -> list[str]:
        """Take what the weights say; of layers of which they say nothing there are no moments."""
        changed = super()._take_facts(collector, reader)
        for name, layer in reader.layers.items():
            self._known[name] = known_of(layer)
        for name in collector.modules:
            reason = reader.unread.get(name)
            if reason is not None:
                collector.left_out.setdefault(name, reason)
            elif name in self._unread:
                collector.left_out.pop(name, None)  # its call has shown how it is read
        self._unread = set(reader.unread)
        return changed

    def _weights(self, name: str) -> HeadProjections:
        """The projections of a layer as they are now; no collective call."""
        reader = self._reader
        try:
            return self._read(name)
        except ModuleGone:  # an adapter was merged and unloaded, say
            if reader is None:
                raise
            reader.refresh()
            reader.go_by(self.labels, self.known_layers())
            return self._read(name)

    def _read(self, name: str) -> HeadProjections:
        layer = None if self._reader is None else self._reader.layers.get(name)
        if layer is None:
            raise UnsupportedCallError(
                "its weights cannot be read, so that an undone rotation cannot be checked"
            )
        if layer.is_sharded():
            raise UnsupportedCallError(
                "its weights are spread over processes, so that an undone rotation cannot be checked"
            )
        return layer.read()

    def known_layers(self) -> dict[str, int]:
        """Layers with weights that could be read once, and their numbers of heads."""
        return {name: self._known[name].heads for name in self._names if name in self._known}

    def watched(self) -> Mapping[str, Any]:
        """Name of each layer → its shape."""
        return {name: (own.heads, own.kv_heads, own.d_head) for name, own in self._known.items()}

    def release(self) -> None:
        """Remove the hooks."""
        super().release()
        for handle in self._positions:
            handle.remove()
        self._positions = []
        self._calls.clear()

    # Measuring

    def begin_batch(self, is_due: bool) -> None:
        """Listen during batches of a logged step."""
        super().begin_batch(is_due)
        self._calls.clear()

    def measure_call(self, name: str, call: CapturedCall) -> TokenSums:
        """Sums over sampled tokens, and what the call says besides where a prediction is due."""
        head = self._known.get(name)
        if head is None:
            raise UnsupportedCallError("its weights cannot be read")
        if call.heads not in (None, head.heads):
            raise UnsupportedCallError(
                "its heads are spread over processes, whose moments are not put together"
            )
        tokens = self._calls.read(name, call, tokens=self.tokens, generator=self._generator)
        if name not in self._facts or (self._prediction_is_due() and name not in self._renewed):
            facts = call_facts(tokens, call, head, longest=LENGTH // 2)
            self._facts[name] = facts | {"is_causal": sees_itself_last(tokens.logits)}
            self._renewed.add(name)
        return token_sums(
            tokens.query,
            tokens.key,
            tokens.query_weight,
            tokens.key_weight,
            tokens.query_place,
            tokens.key_place,
            self_attention=head.self_attention,
        )

    def metric(self, heads: dict[str, int]) -> TokenStatistics:
        """Sums over tokens."""
        layers = {}
        for name in heads:
            own = self._known[name]
            rotary = own.rotary if self.offsets else None
            layers[name] = TokenLayer(
                own.heads, own.kv_heads, own.d_head, own.width[0], own.scaling, own.self_attention, rotary
            )
        return TokenStatistics(layers, self.support, self.offsets)

    def fill(self, metrics: Sequence[TokenStatistics], pool: SumAccumulator) -> None:
        """Add what was pooled to the metric."""
        metrics[0].update(pool.sums())

    def adjust(self, metric: TokenStatistics, values: dict[str, Tensor]) -> None:
        """Remember the moments of a step."""
        if self._predicts and self._pool is self._step_pool:
            self._pooled = metric

    def begin_measuring(self) -> int:
        """With predictions where they are due."""
        self._predicts_now = self._prediction_is_due()
        self._measured += 1
        self.pool_into(self._step_pool)
        self._pooled = None
        return super().begin_measuring()

    # Predictions

    def _prediction_is_due(self) -> bool:
        return self._predicts and self._measured % self.predict_every == 0

    @property
    def _predicts(self) -> bool:
        """Whether attention is predicted: where no logger is to get it, it is not worth its time."""
        return self.predict_every > 0 and self.logs_family("predictions")

    def gaps(self, part: Part) -> dict[str, Tensor]:
        """Predictions of this process' share of the layers, where they are due."""
        return self._own_predictions(part.trainer) if self._predicts_now and self.known_layers() else {}

    def filled(self, part: Part, values: dict[str, Tensor]) -> None:
        """Take the predictions of all layers."""
        self._renewed.clear()
        is_measured = self._predicts and part.error is None and part.values is not None
        self._pooled_step = self.step_of(part.trainer) if is_measured else -1
        if is_measured and values:
            self._take_predictions(values)

    def _own_predictions(self, trainer: Trainer) -> dict[str, Tensor]:
        """Predictions of the newest measurement, of this process' share of the layers; NaN elsewhere."""
        heads = {name: self._known[name] for name in self.known_layers()}
        if self._pooled is None:
            return nothing_predicted(heads)
        return self._predictions.own_share(
            trainer,
            heads,
            self._pooled,
            self._facts,
            surrogates=self.surrogates,
            seed=self.seed,
            note=self.note,
        )

    def _take_predictions(self, values: dict[str, Tensor]) -> None:
        self._predictions.take(self._pooled_step, self.labels, values, self.history.heads, self.states)

    def share(
        self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, Tensor], **where: Any
    ) -> None:
        """Give ``trainer.callback_metrics`` the aggregates, of predictions too where there are new ones."""
        super().share(trainer, pl_module, values, **where)
        if self._predictions.step == self._pooled_step:
            log_at_step(trainer, pl_module, self._predictions.overall(self.counted))

    def publish(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        """Send spectra, and predictions where there are new ones, to histories and loggers."""
        super().publish(trainer, pl_module, values)
        if self._predictions.step == self._pooled_step:
            self.attempt(lambda: self._predictions.publish(trainer, self), "remembering")

    def log_late(self, trainer: Trainer, pl_module: LightningModule | None = None) -> None:
        """Compare predictions with what AttentionMonitor measured at the same step; then as every monitor."""
        self.attempt(lambda: self._predictions.compare(trainer, self), "comparing predictions")
        super().log_late(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict the attention of the last measurement, where that was not done; then as every monitor."""
        self._predict_the_last(trainer)
        super().on_train_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict the attention of the last measurement while ``trainer.callback_metrics`` can have it."""
        if ends_with_epoch(trainer) and self._predict_the_last(trainer):
            log_at_step(trainer, pl_module, self._predictions.overall(self.counted))

    def _predict_the_last(self, trainer: Trainer) -> bool:
        """Whether there is a new prediction; a collective call."""
        if self.idle or self._pooled_step < 0 or self._predictions.step == self._pooled_step:
            return False
        own = self._own_predictions(trainer)
        self._take_predictions(fill_from_others(trainer, own))
        self.attempt(lambda: self._predictions.publish(trainer, self), "remembering")
        return True

    def state_dict(self) -> dict[str, Any]:
        """The histories."""
        state = super().state_dict()
        history = self._predictions.history
        return {**state, "predictions": history.state_dict()} if history.layers else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the histories of a checkpoint."""
        super().load_state_dict(state_dict)
        if "predictions" in state_dict:
            self._predictions.load(state_dict["predictions"])

    def contribute(self, record: RunRecord) -> None:
        """Add both histories to the record."""
        super().contribute(record)
        for name, history in (("tokens", self.history), ("pred", self._predictions.history)):
            if history.layers:
                record.histories = {**record.histories, name: history}
        if self.tokens is not None and self.history.layers:
            record.notes.append(
                f"Token-aware spectra are those of {self.tokens} sampled tokens of each sequence, not its first."
            )


def known_of(layer: LayerReader) -> HeadProjections:
    """What is known of a layer, its weights on the meta device."""
    sizes = layer.sizes

    def nothing(heads: int, width: int) -> Tensor:
        return torch.empty(heads, sizes.d_head, width, device="meta")

    return HeadProjections(
        query=nothing(sizes.heads, layer.width[0]),
        key=nothing(sizes.kv_heads, layer.width[1]),
        query_bias=None,
        key_bias=None,
        scaling=float(layer.scaling),
        layout=layer.layout,
        rotary=layer.rotary,
        position=layer.position,
        self_attention=layer.self_attention,
        key_layer=layer.key_layer,
    )
