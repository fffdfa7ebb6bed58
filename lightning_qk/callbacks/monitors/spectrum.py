"""Callback: per-head QK-eigenspectra while a model trains."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import Unpack

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._layers import WatchedReader
from lightning_qk.callbacks._ranks import all_or_none, alone, fill_from_others
from lightning_qk.callbacks._self_check import self_check_of
from lightning_qk.callbacks.monitors._base import Monitor, MonitorOptions
from lightning_qk.callbacks.monitors._round import Part
from lightning_qk.callbacks.monitors._weights import StartPart, WeightLayers, WeightsPart
from lightning_qk.functional.spectrum import Support, support_size
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.position import ADDED_TO_LOGITS, ALIBI, RELATIVE_BIAS, RELATIVE_PRODUCT
from lightning_qk.loggers.loggers import log_histogram
from lightning_qk.metrics.eigenvalues import Cores, EigenvalueWorker, Solved
from lightning_qk.metrics.singular import SINGULAR_STATISTICS, UPDATE_STATISTICS, SingularValues
from lightning_qk.metrics.spectrum import (
    MOMENTS,
    SPECTRUM_STATISTICS,
    QKSpectrum,
    at_offset,
    extreme_values,
)
from lightning_qk.record.history import History, LayerShape, RunRecord
from lightning_qk.record.statistics import logged_as_heatmap, logged_by_layer, logged_extremes

_ADDED = {
    ALIBI: "linear biases (ALiBi)",
    RELATIVE_BIAS: "a bias for each relative position",
    RELATIVE_PRODUCT: "products with embeddings of relative positions",
}
"""What is added to the logits, in words."""

_REPLACED = "it was replaced during training by something of another shape"


class QKSpectrumMonitor(Monitor):
    """Logs the eigenspectrum of ``W_QK`` of every head, read from the weights after an optimizer step.

    Works in any job whose LightningModule holds Hugging Face transformers, wherever they hang; nothing in the
    module changes. It costs nothing on the steps that it does not log.

    Logged keys, for each statistic of :class:`~lightning_qk.metrics.spectrum.QKSpectrum`:

    - ``qk/<statistic>/mean`` over all heads; ``/min`` and ``/max`` of eig_mean, eig_var and localization, ``/max``
      of sym_var, spectral_radius and singular_max; ``trainer.callback_metrics`` has all three of each;
    - ``qk/layer_03/<statistic>`` for eig_var, or those in ``per_layer``, means over the layer's heads
      (``encoder_layer_03`` and so on where a model has several stacks);
    - ``qk/layer_03/head_05/<statistic>`` with ``per_head=True``;
    - with ``offsets``, ``qk/offset_16/<statistic>/mean`` and so on, for the moments and the spectral radius of the
      form between a query and the key 16 positions before it, in layers with rotary position encoding;
    - with ``singular``, ``qk/sigma_1``, ``qk/energy_top_1``, ``qk/energy_top_4``, ``qk/effective_rank``,
      ``qk/logit_bound`` and ``qk/update_ratio`` (since the measurement before), ``/mean`` and ``/max``, and
      sigma_1 and update_ratio for each layer, cross-attention included: see
      :class:`~lightning_qk.metrics.singular.SingularValues`;
    - with ``updates``, ``qk/update_delta2_<statistic>`` and ``qk/update_delta3_<statistic>`` for norm, sigma_1,
      stable_rank and effective_rank: what ``W_QK`` has changed by since the measurement before, in first and
      second order, see :func:`~lightning_qk.functional.update_spectra`; ``/mean``, with ``/max`` of norms and
      ``/min`` of ranks, and update_delta2_norm and update_delta2_stable_rank for each layer;
    - ``qk/heatmap/<statistic>`` layer × head figures and ``qk/eigenvalues/modulus``, ``qk/eigenvalues/real``
      histograms, to loggers that can show them.

    Traces and norms are logged at once. The eigenproblems are solved in a worker thread while training goes
    on: what comes of them (``spectral_radius``, ``singular_max``, the histograms, all of ``singular`` and
    ``updates``) is logged at the next measurement, before a validation, at the end of the epoch, with a checkpoint
    or at the end of training, whichever comes first, under the step that it belongs to.

    At the end of training the monitors print a table of the layers' health and write one HTML report into the
    run's folder. Weights that are not finite are named and training goes on, as it does whatever the model looks
    like. A run in which no step was due is measured at its last one.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's
            ``log_every_n_steps``.
        support: what the spectrum is averaged over, see :func:`~lightning_qk.functional.qk_moments`.
        fold_norm: read the weights with the gain of the norm that feeds them, see
            :func:`~lightning_qk.head_projections`.
        offsets: how many positions keys precede their query, such as ``(0, 1, 16)``; negative: after it,
            which causal models do not see. Rotary position encoding makes a form of its own at each:
            ``W_q^T R_Δ W_k`` with Δ = −offset, see :func:`~lightning_qk.functional.qk_eigenvalues`.
        singular: also log singular values and the size of updates. Keeps a copy of all query and key weights in
            the host's memory.
        updates: also log norms and ranks of updates. Keeps the same copy; checkpoints between two measurements
            have it too, so that a resumed run misses none.
        options: see :class:`~lightning_qk.callbacks.monitors.Monitor`.
    """

    group = "qk"
    statistics: tuple[str, ...] = SPECTRUM_STATISTICS
    layer_statistics: tuple[str, ...] = logged_by_layer("qk", SPECTRUM_STATISTICS)
    extremes = logged_extremes("qk", (*SPECTRUM_STATISTICS, *SINGULAR_STATISTICS, *UPDATE_STATISTICS))
    figure_statistics = logged_as_heatmap("qk", SPECTRUM_STATISTICS)
    witness = "trace"
    subject = "query and key weights"

    record_field = "spectrum"

    live: ClassVar[tuple[str, ...]] = (
        "_reader",
        "weight_layers",
        "cores",
        "_worker",
        "_unshared",
        "_late_values",
    )

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        support: Support = "model",
        fold_norm: bool = False,
        offsets: Sequence[int] = (),
        singular: bool = False,
        updates: bool = False,
        **options: Unpack[MonitorOptions],
    ) -> None:
        support_size(torch.empty(1, 1), support)
        self.support: Support = support
        self.offsets = checked_offsets(offsets)
        self.layer_statistics = (
            *type(self).layer_statistics,
            *(at_offset(name, offset) for offset in self.offsets for name in type(self).layer_statistics),
        )
        at_offsets = (*MOMENTS, "spectral_radius")
        self.statistics = (
            *type(self).statistics,
            *(at_offset(name, offset) for offset in self.offsets for name in at_offsets),
        )
        self.singular = singular
        if singular:
            self.layer_statistics = (*self.layer_statistics, "sigma_1", "update_ratio")
            self.statistics = (*self.statistics, *SINGULAR_STATISTICS)
        self.updates = updates
        if updates:
            by_layer = ("update_delta2_norm", "update_delta2_stable_rank")
            self.layer_statistics = (*self.layer_statistics, *by_layer)
            self.statistics = (*self.statistics, *UPDATE_STATISTICS)
        self.fold_norm = fold_norm
        super().__init__(every_n_steps, **options)

    def begin(self) -> None:
        """Nothing was measured yet."""
        super().begin()
        self._reader: WatchedReader | None = None
        # None while no layer can be read.
        self.weight_layers: WeightLayers | None = None
        self._shapes: dict[str, LayerShape] = {}
        self._cross: set[str] = set()
        self.cores: list[Cores] = []
        self._worker = EigenvalueWorker()
        self._eigenvalues: Mapping[str, Tensor] = {}
        self._eigenvalues_step: int | None = None
        # Layers that cannot be read are not named yet: the first batches may tell how they are read.
        self._awaits = False
        # Whether a checkpoint was loaded, and what it had of the singular values.
        self._goes_on = False
        self._singular_state: dict[str, Any] | None = None
        # Whether it was said that an eigenproblem failed.
        self._told_failed = False
        # The trainer's step after which weights were measured last.
        self.step_of_weights: int | None = None
        # The step with spectra that ``trainer.callback_metrics`` have yet to get, the same on every process.
        self._unshared: int | None = None
        # Values of solved spectra that are not shared yet.
        self._late_values: dict[str, Tensor] = {}

    @property
    def _heads(self) -> dict[str, int]:
        return {} if self.weight_layers is None else self.weight_layers.metric.heads

    def watched(self) -> Mapping[str, Any]:
        """Name of each layer → its heads."""
        return self._heads

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        self._reader = reader = WatchedReader(
            pl_module, self.modules, fold_norm=self.fold_norm, root=trainer.strategy.model
        )
        layers = reader.layers
        check = self_check_of(trainer)
        # A layer that cannot be read alone may be read at its first call.
        self._awaits = self.on_unreadable == "warn" and check is not None and check.is_awaited
        if not self._choose(reader, {} if self._awaits else reader.unread):
            return
        if not layers:
            self.weight_layers = None
            return
        if self.fold_norm and (plain := [name for name, layer in layers.items() if not layer.norm_folded]):
            self.note(f"no norm was found to fold into {shorten(plain)}: their weights are taken as they are")
        heads = {name: layer.heads for name, layer in layers.items()}
        self._cross = {name for name, layer in layers.items() if not layer.self_attention}
        self.remember_layers(heads, reader.labels)
        self._shapes = {
            self.labels[name]: LayerShape(layer.sizes.d_head, layer.width[0], float(layer.scaling))
            for name, layer in layers.items()
        }
        self._note_positions(layers)
        metric = alone(QKSpectrum(heads, self.support, offsets=self.offsets, eigenvalues=False))
        singular = SingularValues(heads, values=self.singular, updates=self.updates)
        self.weight_layers = WeightLayers(reader, metric, singular if singular.statistics else None)
        self._late_values = self._no_late_values()

    def _choose(self, reader: WatchedReader, left_out: Mapping[str, str]) -> bool:
        return self.choose(
            reader.found,
            left_out,
            kind="attention layer",
            nothing=(
                "expected a model that contains transformer attention, found none in "
                f"{type(reader.model).__name__}: build the network in __init__ or configure_model"
            ),
            unread="whose weights can be read",
        )

    def _note_positions(self, layers: Mapping[str, LayerReader]) -> None:
        """Say once where positions do something to the logits that the spectra do not show."""
        own = {name: layer for name, layer in layers.items() if layer.self_attention}
        for position in sorted(ADDED_TO_LOGITS):
            names = [name for name, layer in own.items() if layer.position == position]
            if names:
                self.note(
                    f"the logits of {shorten(names)} also have {_ADDED[position]}: their spectra are those of the "
                    "content part, q · k"
                )
        still = [name for name, layer in own.items() if layer.rotary is None] if self.offsets else []
        if still:
            self.note(
                f"no rotation of queries and keys by position was found in {shorten(still)}: nothing is logged "
                "for them at offsets"
            )

    def layers_settled(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the layers as their calls have shown that they are to be read; before the first step."""
        reader = self._reader
        if self.idle or reader is None:
            return
        is_changed, _ = all_or_none(trainer, lambda: self._settle(trainer, pl_module, reader), facts=repr)
        if not is_changed:
            return
        if not self.idle and trainer.global_step == 0:
            self.measure_alone(StartPart(self, trainer, pl_module))

    def _settle(
        self, trainer: Trainer, pl_module: LightningModule, reader: WatchedReader
    ) -> tuple[bool, object]:
        """Whether layers are read in another way than before, and what is watched now; no collective call."""
        if reader.refresh():
            self._worker.collect()
            self.history = History([], [])
            self.find_layers(trainer, pl_module)
            return True, (self.idle, self.watched())
        if self._awaits:
            self._awaits = False
            self._choose(reader, reader.unread)
        return False, self.idle

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where a fresh run started from, as step −1 since loggers count from 0; not logged."""
        if self._goes_on:
            self.attempt(self._recall_weights, "remembering weights")
        elif trainer.global_step == 0:
            self.measure_alone(StartPart(self, trainer, pl_module))

    def remember_start(self, values: dict[str, Tensor]) -> None:
        """Keep what a run starts from, and begin to solve its eigenproblems."""
        self.history.append(-1, values, self.states)
        self.note_non_finite(self.states, -1)
        self._worker.submit(-1, self.cores)

    def _recall_weights(self) -> None:
        """Load the weights that the next change is measured against, in a resumed run."""
        if self.weight_layers is None or self.weight_layers.singular is None or self._singular_state is None:
            return
        reader, _, singular = self.weight_layers
        assert singular is not None  # checked above
        # Where there are none, they were measured at the step of the checkpoint, and are the weights that were
        # loaded.
        is_read = not self._singular_state.get("before")
        with reader.to_the_end(singular.reading_order(reader.layers) if is_read else []):
            singular.load_state_dict(self._singular_state)
            if is_read:
                singular.cores(reader)
        self._singular_state = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the worker still has, where ``trainer.callback_metrics`` can have it too."""
        self.log_late(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Log what the worker still has: a resumed run could not."""
        self.log_late(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The history, with what the worker still has, eigenvalues of a few steps, and weights measured last.

        Of the weights only what a resumed run could not read again: they changed since.
        """
        self._end_step_before_saving()
        if self._worker.pending is not None:
            self.attempt(self._complete_history)
        state = super().state_dict()
        trainer, _ = self.running()
        if trainer is not None and (singular := self.singular_state(trainer.global_step)) is not None:
            state["singular"] = singular
        return state

    def singular_state(self, global_step: int) -> dict[str, Any] | None:
        """What the next change of the weights is against, if anything; weights only where they changed since."""
        if self.weight_layers is None or self.weight_layers.singular is None:
            return None
        is_new = global_step == self.step_of_weights
        state = self.weight_layers.singular.state_dict(weights=not is_new)
        return state if is_new or state["before"] else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        super().load_state_dict(state_dict)
        self._goes_on = True
        self._singular_state = state_dict.get("singular")

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the worker still has; then as every monitor."""
        self.log_late(trainer)
        super().finish(trainer, pl_module)

    def release(self) -> None:
        """End the worker's thread."""
        self._worker.close()

    def can_measure_at_the_end(self) -> bool:
        """The weights are there."""
        return True

    def part(self, trainer: Trainer, pl_module: LightningModule) -> Part:
        """Moments of all heads; nothing while no layer can be read yet."""
        return WeightsPart(self, trainer, pl_module)

    def keep_known(self, layers: WeightLayers) -> None:
        """Where modules were replaced, go on with the layers that are what they were at the start."""
        reader, heads = layers.reader, layers.metric.heads
        reader.go_by(self.labels, heads)
        kept = {name: layer for name, layer in reader.layers.items() if heads.get(name) == layer.heads}
        lost = {name: reader.unread.get(name, _REPLACED) for name in heads if name not in kept}
        reader.layers = kept
        self.note_left_out(lost)
        self.history.reasons |= {self.labels[name]: reason for name, reason in lost.items()}

    def after_measuring(self, trainer: Trainer) -> None:
        """Start on the eigenvalues."""
        step = self.step_of(trainer)
        self._unshared = step
        self.attempt(lambda: self._worker.submit(step, self.cores), "solving eigenproblems")

    def gaps(self, part: Part) -> dict[str, Tensor]:
        """Spectra of the measurement before: every process solves the same, and one that could not has none."""
        return self._late_values if self._unshared is not None else {}

    def filled(self, part: Part, values: dict[str, Tensor]) -> None:
        """Share the spectra of the measurement before."""
        if values:
            self._share_late(part.trainer, part.pl_module, values)

    def log_late(self, trainer: Trainer, pl_module: LightningModule | None = None) -> None:
        """Log spectra that were left to the worker; then as every monitor.

        Every process solves the same eigenproblems. With a module, which every process comes with, one that could
        not solve some takes the others' values, in a collective call; without, nothing is reduced, so that it may
        run after an exception, and before the next measurement, which reduces them with its own.
        """
        if self._worker.pending is not None:
            late = self.attempt(self._take, "solving eigenproblems")
            if late is not None:
                self._late_values = late[1]
                self.attempt(lambda: self._log_solved(trainer, *late), "remembering")
        if pl_module is not None and self._unshared is not None:
            self._share_late(trainer, pl_module, fill_from_others(trainer, self._late_values))
        super().log_late(trainer, pl_module)

    def _share_late(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        """Give ``trainer.callback_metrics`` late values, and the history those that others have solved."""
        step, self._unshared = self._unshared, None
        is_own = all(values[name] is own for name, own in self._late_values.items())
        self._late_values = self._no_late_values()
        self.share(trainer, pl_module, values)
        if not is_own and step in self.history.steps:
            self.attempt(lambda: self.history.complete(step, values), "remembering")

    def _take(self) -> tuple[Solved, dict[str, Tensor]] | None:
        try:
            return self._solved()
        finally:
            self._worker.collect()

    def _solved(self) -> tuple[Solved, dict[str, Tensor]] | None:
        """What the worker has solved, waited for, and the values; None where it has nothing."""
        solved = self._worker.peek()
        if solved is None:
            return None
        values = extreme_values(solved.spectra, self._heads, self.offsets)
        if self.weight_layers is not None and self.weight_layers.singular is not None:
            values |= self.weight_layers.singular.values(solved.step, solved.spectra)
        if solved.failed and not self._told_failed:
            self._told_failed = True
            self.note(
                f"{len(solved.failed)} eigenproblems at step {solved.step} did not converge "
                f"({shorten(list(solved.failed))}): these heads have no eigenvalues there; training goes on"
            )
        return solved, values

    def _no_late_values(self) -> dict[str, Tensor]:
        """What a process has where it solved nothing."""
        nothing_solved = extreme_values({}, self._heads, self.offsets)
        if self.weight_layers is not None and self.weight_layers.singular is not None:
            nothing = torch.full((sum(self._heads.values()),), torch.nan)
            nothing_solved |= {name: nothing.clone() for name in self.weight_layers.singular.statistics}
        return nothing_solved

    def _complete_history(self) -> None:
        late = self._solved()
        if late is not None:
            self._complete(*late)

    def _complete(self, solved: Solved, values: Mapping[str, Tensor]) -> None:
        self.history.complete(solved.step, values)
        self._eigenvalues = {name: solved.spectra[name] for name in self._heads if name in solved.spectra}
        self._eigenvalues_step = solved.step
        self._snapshots.append(solved.step, self._complex_by_label())

    def _complex_by_label(self) -> dict[str, Tensor]:
        return {self.labels[name]: value for name, value in self._eigenvalues.items() if value.is_complex()}

    def _log_solved(self, trainer: Trainer, solved: Solved, values: dict[str, Tensor]) -> None:
        self._complete(solved, values)
        if solved.step < 0:
            return
        self.attempt(lambda: self.log_values(trainer, values, solved.step))
        eigenvalues = [value.flatten() for value in self._eigenvalues.values() if value.is_complex()]
        if trainer.is_global_zero and eigenvalues and self.is_logged("eigenvalues"):
            flat = torch.cat(eigenvalues)
            log_histogram(trainer, "qk/eigenvalues/modulus", flat.abs(), solved.step)
            log_histogram(trainer, "qk/eigenvalues/real", flat.real, solved.step)

    def has_value(self, name: str, flat: Tensor) -> Tensor:
        """Cross-attention has singular values alone, and self-attention these where they are asked for."""
        has = super().has_value(name, flat)
        heads = self._heads
        if not heads or name in (*SINGULAR_STATISTICS, *UPDATE_STATISTICS):
            return has
        for layer, part in zip(heads, has.split(list(heads.values())), strict=True):
            part.fill_((layer in self._cross) == (name == "singular_max"))
        return has

    def contribute_history(self, record: RunRecord) -> None:
        """Add the history, and the widths that it is compared with."""
        super().contribute_history(record)
        record.shapes = dict(self._shapes)

    def contribute(self, record: RunRecord) -> None:
        """Add the history, the eigenvalues and what they are compared with to the record."""
        super().contribute(record)
        record.eigenvalues = self._complex_by_label()
        record.eigenvalues_step = self._eigenvalues_step
        if len(self._snapshots):
            record.snapshots["eigenvalues"] = self._snapshots


def checked_offsets(offsets: Sequence[int]) -> tuple[int, ...]:
    """Distances between key and query, each once, in the order of their first mention."""
    given = tuple(offsets)
    if any(isinstance(offset, bool) or not isinstance(offset, int) for offset in given):
        raise ValueError(
            f"expected offsets to be integers, got {offsets!r}: pass distances such as (0, 1, 16)"
        )
    return tuple(dict.fromkeys(given))
