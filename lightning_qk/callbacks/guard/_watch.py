"""What a guard reads: the numbers of the trainer's own monitors, or of quiet ones where there are none."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_qk.callbacks._trainer import logging_step, say, stepped_parameters
from lightning_qk.callbacks.monitors import AttentionMonitor, Monitor, QKSpectrumMonitor
from lightning_qk.capture.hooks import generate
from lightning_qk.capture.hooks.modules import hook_before
from lightning_qk.functional.updates import UPDATE_FORMS
from lightning_qk.guard.reading import Place
from lightning_qk.heads.reader import find_attention
from lightning_qk.metrics.eigenvalues import solve_each
from lightning_qk.record.history import History, RunRecord

ATTENTION = ("entropy_normalized", "logit_std", "max_abs_logit")
SPECTRUM = ("sym_var", "frobenius_sq")
UPDATES = ("update_delta2_norm", "update_delta2_stable_rank")
COSINE = "hidden/cosine"
_TOKENS = 64
_M = TypeVar("_M", bound=Monitor)


class _Quiet(Monitor):
    """A monitor that measures for a guard: it logs nothing and reports nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The guard has checked the trainer."""

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As ``on_fit_start``, but what fails is raised, and nothing is agreed on: the guard does that for all.

        Without a report there is no folder to agree on either.
        """
        self.start_counting(trainer)
        # Steps that a guard does not ask for are not measured, the last of an epoch either.
        self._steps_measured = 1
        self.find_layers(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure, with no other monitor."""
        super().on_train_batch_end(trainer, pl_module, *args)
        self.measure_due_alone(trainer, pl_module)

    def remember_step(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        """Remember the newest values alone."""
        self.history = History(self.history.layers, self.history.heads, max_points=2)
        self.history.append(logging_step(trainer), values)

    def publish(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]) -> None:
        """Nothing is logged."""
        self.after_measuring(trainer)

    def gaps(self, part: Any) -> dict[str, Tensor]:
        """There are no values besides."""
        return {}

    def filled(self, part: Any, values: dict[str, Tensor]) -> None:
        """There are none."""

    def after_measuring(self, trainer: Trainer) -> None:
        """No eigenproblem is solved."""

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is left to log."""

    def note(self, sentence: str, kind: str = "note", **facts: Any) -> None:
        """Say something once, as the guard."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            say(f"CollapseGuard: {sentence}")


class QuietAttention(_Quiet, AttentionMonitor):
    """Attention statistics of a few rows, for a guard."""

    def note_cached_calls(self, names: Sequence[str]) -> None:
        """A guard has no argument for them."""

    def draw_from(self, rank: int, step: int, batch: int) -> None:
        """Rows of a batch depend on these numbers alone."""
        self._generator.manual_seed((self.seed + rank) + 1_000_003 * (step + 1) + 7_919 * batch)


class QuietSpectrum(_Quiet, QKSpectrumMonitor):
    """Traces and norms of the weights, for a guard; no eigenproblem is solved but those of updates."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run's start is of no interest."""

    def after_measuring(self, trainer: Trainer) -> None:
        """Solve the updates' eigenproblems, where they are asked for, in the process that judges; at once."""
        if self.updates and trainer.is_global_zero:
            self.attempt(lambda: self._solve_updates(self.step_of(trainer)), "solving eigenproblems")

    def _solve_updates(self, step: int) -> None:
        if self.weight_layers is None or self.weight_layers.singular is None:
            return
        spectra, _ = solve_each([part for part in self.cores if part.names[0].startswith(UPDATE_FORMS)])
        self.history.complete(step, self.weight_layers.singular.values(step, spectra))

    def recall(self, state: dict[str, Any] | None) -> None:
        """Take up what the next update is against, of a checkpoint; collective where weights are sharded."""
        self._singular_state = state
        self._recall_weights()

    def forget_weights(self) -> None:
        """Weights were put back: the next difference is not an update of training."""
        if self.weight_layers is not None and self.weight_layers.singular is not None:
            self.weight_layers.singular.forget()
            self.step_of_weights = None

    def contribute(self, record: RunRecord) -> None:
        """Nothing is left to report."""


class HiddenCosine:
    """Mean cosine of two tokens of a sequence in what each attention layer is given.

    Forwards without gradients, and those within transformers' ``generate``, do not count. Rank collapse drives it
    to 1. With unit vectors u of T tokens it is ``(‖Σ u‖² − T) / (T² − T)``, at a cost
    linear in T. Tokens are those that the batch's own ``attention_mask`` of shape ``(batch, T)`` keeps; without
    one, all of them. Of each sequence 64 at most are taken, evenly spaced.

    Args:
        model: any module with attention layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = find_attention(model)
        self._model = model
        self._sums: dict[str, Tensor] = {}
        self._give_back: list[Callable[[], None]] = []
        self._keep: Tensor | None = None
        self._problem: Exception | None = None

    @property
    def places(self) -> list[Place]:
        """One a layer."""
        return [Place(name) for name in self.modules]

    def listen(self, batch: Any = None) -> None:
        """Record the inputs of the layers with this batch, until :meth:`stop`."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._keep = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if not self._give_back:
            for name, module in self.modules.items():
                self._give_back.append(hook_before(module, self._hook(name)).remove)
            self._give_back.extend(generate.patch_generate(self._model))

    def stop(self) -> None:
        """Leave the layers as they were."""
        give_back, self._give_back, self._keep = self._give_back, [], None
        for one in reversed(give_back):
            one()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # It is no training: a teacher, or a generation within the step.
            if not torch.is_grad_enabled() or generate.is_running():
                return
            try:
                given = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
                if isinstance(given, Tensor) and given.dim() == 3 and given.is_floating_point():
                    found = self._cosines(given.detach())
                    self._sums[name] = self._sums[name] + found if name in self._sums else found
            except Exception as error:
                # The model's forward goes on.
                self._problem = error

        return hook

    def _cosines(self, hidden: Tensor) -> Tensor:
        """Sum over sequences of their mean cosines, and how many sequences."""
        stride = -(-hidden.shape[1] // _TOKENS)
        unit = nn.functional.normalize(hidden[:, ::stride].float(), dim=-1)
        if self._keep is not None and self._keep.shape == hidden.shape[:2]:
            unit = unit * (self._keep[:, ::stride] != 0).float().unsqueeze(-1)
        # What a mask hides, and states that are zero (a decoder's queries at its first layer): no direction.
        count = (unit != 0).any(-1).float().sum(1)
        pairs = count * (count - 1)
        cosine = (unit.sum(1).square().sum(-1) - count) / pairs.clamp_min(1)
        known = (pairs > 0).float()
        return torch.stack([(cosine * known).sum(), known.sum()])

    def take(self, device: torch.device) -> Tensor:
        """Sum of cosines and number of sequences of all layers since the last call, ``(layers, 2)``, this rank's.

        Raises:
            Exception: what a forward raised in place of them.
        """
        sums, self._sums = self._sums, {}
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
        if not self.modules:
            return torch.zeros(0, 2, device=device)
        return torch.stack([sums.get(name, torch.zeros(2)).to(device) for name in self.modules])


class ReadingSource:
    """Everything that a guard reads of a trainer within one fit, measured at the guard's steps.

    A monitor of the trainer is read where it measures at all of these steps; else a quiet one measures. Without
    attention that can be watched nothing is read, and the training loss is all that a guard has; so before
    :meth:`begin` and after :meth:`leave`.

    Args:
        every_n_steps: cadence of the guard; None follows the trainer's ``log_every_n_steps``.
        rows: query rows that a quiet monitor samples.
        updates: also read :data:`UPDATES`, which a monitor of the trainer has only later: a quiet one measures.
    """

    def __init__(self, every_n_steps: int | None, rows: int, *, updates: bool = False) -> None:
        self.every_n_steps, self.rows, self.updates = every_n_steps, rows, updates
        self.quiet: list[_Quiet] = []
        self.attention: Monitor | None = None
        self.spectrum: Monitor | None = None
        self.hidden = HiddenCosine(nn.Module())

    def begin(self, trainer: Trainer, pl_module: LightningModule, callbacks: Iterable[Any]) -> str:
        """At the start of a fit; no collective call, so that it may fail on one rank.

        Returns:
            What has to be the same on every rank.

        Raises:
            ValueError: the module holds no transformer attention.
        """
        callbacks = list(callbacks)
        every = _cadence(trainer, self.every_n_steps)
        self.quiet, self.spectrum = [], None
        self.attention = _fitting(callbacks, AttentionMonitor, trainer, every)
        if not self.updates:
            self.spectrum = _fitting(callbacks, QKSpectrumMonitor, trainer, every)
        if self.attention is None:
            self.attention = QuietAttention(
                self.every_n_steps, rows=self.rows, every_n_eval_batches=0, figures_every=0, report=False
            )
            self.quiet.append(self.attention)
        if self.spectrum is None:
            self.spectrum = QuietSpectrum(
                self.every_n_steps, updates=self.updates, figures_every=0, report=False
            )
            self.quiet.append(self.spectrum)
        for monitor in self.quiet:
            monitor.start(trainer, pl_module)
            if not monitor.idle:
                continue
            if monitor is self.attention:
                raise ValueError(monitor.notes[-1].removeprefix("nothing is watched: "))
            # Weights that cannot be read leave the attention itself to be watched.
            self.spectrum = None
        self.quiet = [monitor for monitor in self.quiet if not monitor.idle]
        self.hidden = HiddenCosine(pl_module)
        watched = [(type(one).__name__, one.watched()) for one in self.quiet]
        return repr((watched, self.spectrum is None, list(self.hidden.modules)))

    @property
    def updated(self) -> "QuietSpectrum | None":
        """The monitor of updates, where they are looked at."""
        return self.spectrum if self.updates and isinstance(self.spectrum, QuietSpectrum) else None

    def forget_weights(self) -> None:
        """Weights were put back."""
        if self.updated is not None:
            self.updated.forget_weights()

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was: nothing is watched any more."""
        self.hidden.stop()
        quiet, self.quiet = self.quiet, []
        self.attention = self.spectrum = None
        self.hidden = HiddenCosine(nn.Module())
        for monitor in quiet:
            monitor.teardown(trainer, pl_module, "fit")

    def begin_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, is_due: bool
    ) -> None:
        """Before a batch: get ready to listen where it is due."""
        for monitor in self.quiet:
            if isinstance(monitor, QuietAttention):
                # Seeded again for each batch, so that a resumed run samples the rows that it would have sampled.
                monitor.draw_from(trainer.global_rank, logging_step(trainer), batch_idx)
            monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if is_due:
            self.hidden.listen(batch)

    def end_batch(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a batch: measure where due; a collective call then."""
        for monitor in self.quiet:
            monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def skip_batch(self) -> None:
        """After a batch that some rank cannot measure: no rank does."""
        for monitor in self.quiet:
            monitor.end_batch()
            monitor._is_due = False

    def is_ready(self, step: int) -> bool:
        """Whether the trainer's monitors have measured a step; the guard may be called before them."""
        return all(
            monitor is None or not monitor.history.layers or monitor.history.steps[-1:] == [step]
            for monitor in (self.attention, self.spectrum)
        )

    def read(
        self, trainer: Trainer, pl_module: LightningModule, step: int
    ) -> tuple[dict[str, Tensor], dict[str, list[Place]]]:
        """Values and places of the monitors' statistics at a step; those that were not measured are left out.

        Layers that are not trained have none: a teacher or a frozen part does not collapse. Cross-attention has no
        entropy: that it goes to single keys is what an alignment is.
        """
        values: dict[str, Tensor] = {}
        places: dict[str, list[Place]] = {}
        for group, monitor, names in (
            ("attn", self.attention, ATTENTION),
            ("qk", self.spectrum, (*SPECTRUM, *UPDATES * self.updates)),
        ):
            if monitor is None or monitor.history.steps[-1:] != [step]:
                continue
            history = monitor.history
            modules = {label: name for name, label in monitor.labels.items()}
            places[group] = [
                Place(modules.get(label, label), head)
                for label, heads in zip(history.layers, history.heads, strict=True)
                for head in range(heads)
            ]
            own_attention: Mapping[str, bool] = getattr(monitor, "_self_attention", {})
            for name in names:
                if name not in history.values:
                    continue
                newest = self.of_trained(trainer, pl_module, history.values[name][-1], places[group])
                if name == "entropy_normalized":
                    for index, place in enumerate(places[group]):
                        if not own_attention.get(place.layer, True):
                            newest[index] = torch.nan
                values[f"{group}/{name}"] = newest
        return values, places

    @property
    def labels(self) -> dict[str, str]:
        """Qualified layer name → the name that tables, keys and the report give it."""
        monitors = (self.attention, self.spectrum)
        return {name: label for one in monitors if one is not None for name, label in one.labels.items()}

    def with_labels(self, sentence: str) -> str:
        """A sentence whose layers also have their labels."""
        for name, label in self.labels.items():
            if name != label:
                # Not within a longer name.
                found = rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)"
                sentence = re.sub(found, lambda _, new=f"{name} ({label})": new, sentence)  # type: ignore[misc]
        return sentence

    def of_trained(
        self, trainer: Trainer, pl_module: LightningModule, values: Tensor, places: Sequence[Place]
    ) -> Tensor:
        """A copy without the numbers of layers that are not trained."""
        trained = _trained(trainer, pl_module, {place.layer for place in places})
        keep = torch.tensor([place.layer in trained for place in places], dtype=torch.bool)
        return torch.where(keep, values, torch.nan)


def _trained(trainer: Trainer, pl_module: LightningModule, names: set[str]) -> set[str]:
    """Of some layers those that an optimizer changes; those without weights of their own are among them."""
    modules = dict(pl_module.named_modules())
    stepped = set(map(id, stepped_parameters(trainer)))
    own = {name: list(modules[name].parameters()) for name in names if name in modules}
    # A strategy may step flat copies, in which no layer is found.
    is_known = any(id(parameter) in stepped for parameters in own.values() for parameter in parameters)
    return {
        name
        for name in names
        if not own.get(name)
        or any(
            parameter.requires_grad and (not is_known or id(parameter) in stepped) for parameter in own[name]
        )
    }


def _cadence(trainer: Trainer, every_n_steps: int | None) -> int:
    every = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    return int(every)


def _fitting(callbacks: Iterable[Any], kind: type[_M], trainer: Trainer, every: int) -> _M | None:
    """The first monitor of a kind that measures at every multiple of the cadence."""
    for callback in callbacks:
        if isinstance(callback, kind):
            own = _cadence(trainer, callback.every_n_steps)
            if own > 0 and every % own == 0:
                return callback
    return None
