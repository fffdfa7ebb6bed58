"""Callback: collapse of rank, alignment of tokens and massive activations while a model trains."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk.architecture.labels import layer_labels
from lightning_qk.callbacks._fit_state import nothing
from lightning_qk.callbacks._ranks import all_or_none, alone, combine, reasons_of_all, reduce_states
from lightning_qk.callbacks.monitors._base import Monitor, flat_values, shorten
from lightning_qk.callbacks.monitors._losses import Losses, lost_reason
from lightning_qk.callbacks.monitors._watched import matches, matching
from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.hidden import HiddenCapture
from lightning_qk.functional.hidden import HIDDEN_MEANS, HIDDEN_STATISTICS, hidden_sums
from lightning_qk.heads.blocks import find_blocks
from lightning_qk.heads.reader import find_attention
from lightning_qk.metrics.hidden import HiddenStatistics
from lightning_qk.record.history import RunRecord
from lightning_qk.record.states import DID_NOT_RUN, KNOWN, LEFT_OUT, NO_DATA, NO_VALUE, NOT_FINITE
from lightning_qk.record.statistics import logged_as_heatmap, logged_by_layer, logged_extremes

_EMBEDDING = "the input of "
"""In front of the name of a stack's first block."""


class HiddenStateMonitor(Monitor):
    """Logs how far the tokens of each layer are from being one, and how large its largest activations are.

    Hidden states are the outputs of the transformer blocks, in training mode, and what goes into the first block
    of each stack. The model's outputs, losses and gradients stay bit-identical, in compiled models too. It costs
    nothing on the steps that it does not log.

    Logged keys, for each statistic of :func:`~lightning_qk.functional.hidden_statistics`:

    - ``hidden/<statistic>/mean`` over all blocks; ``/min`` of rank_residual, rank_residual_relative and
      effective_rank, ``/max`` of cosine, cosine_abs, token_norm, activation_max and massive_count;
      ``trainer.callback_metrics`` has all three of each;
    - ``hidden/layer_03/<statistic>`` for rank_residual_relative, or those in ``per_layer``
      (``encoder_layer_03`` and so on where a model has several stacks), and the same as
      ``hidden/embedding/<statistic>`` of the input of the first block, which is in no aggregate.

    All micro-batches of a logged step and all ranks are pooled; every sequence weighs the same. Padding is left
    out by the ``attention_mask`` that the model is given. Packed documents count as one sequence. Blocks that
    were not heard, and masks that could not be told, are named once in the log.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's
            ``log_every_n_steps``.
        tokens: how many tokens of a sequence are drawn for what needs pairs or singular values; None for all. The
            cosine stays without bias; the effective rank is that of so many tokens and at most their number.
        sequences: how many sequences of each micro-batch are drawn; None for all. Means over sequences stay
            without bias; maxima are lower bounds.
        seed: of the monitor's own random generator; torch's global one is never touched.
        per_layer: names of statistics to log for each block; None for rank_residual_relative; True for all of
            them; False for none.
        report: write the report at the end.
        modules: glob pattern or patterns on qualified names of blocks or of the attention layers in them, such as
            ``"*.encoder.*"``; None for all of them.
        on_unreadable: what to do where a layer that is asked for cannot be watched, or there is none: ``"warn"``
            watches the rest and names it once with the reason, ``"raise"`` refuses at the start of training.
        cached_calls: also measure forwards within transformers' ``generate``. By default they are left out, and
            said once.

    Raises:
        ValueError: an argument is out of range; with ``on_unreadable="raise"``, at the start of training: a layer
            cannot be watched.
    """

    group = "hidden"
    statistics = HIDDEN_STATISTICS
    layer_statistics = logged_by_layer("hidden", HIDDEN_STATISTICS)
    extremes = logged_extremes("hidden", HIDDEN_STATISTICS)
    figure_statistics = logged_as_heatmap("hidden", HIDDEN_STATISTICS)
    subject = "hidden states"
    witness = "token_norm"
    has_heads = False

    fit_state = {  # noqa: RUF012 (never changed)
        "_names": tuple,
        "_told": set,
        "_generated_was_told": bool,
        "_losses": Losses,
    }
    running_state = {  # noqa: RUF012 (never changed)
        "_generator": torch.Generator,
        "_capture": nothing,
        "_metric": nothing,
        "_lost": dict,
        "_ran": set,
        "_generated": set,
        "_ever_generated": set,
    }

    _generator: torch.Generator
    _capture: HiddenCapture | None
    _metric: HiddenStatistics | None
    _names: tuple[str, ...]
    _told: set[str]
    """Layers of which processes have agreed on why they are left out."""
    _generated_was_told: bool
    _losses: Losses
    _ran: set[str]
    """Layers that were heard since the last measurement."""
    _generated: set[str]
    """Layers of which forwards of generation were left out since the last measurement."""
    _ever_generated: set[str]
    _lost: dict[str, str]
    """Layers whose states at this step are not all in the metric, and why."""

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        tokens: int | None = 64,
        sequences: int | None = 8,
        seed: int = 0,
        per_layer: bool | str | Sequence[str] | None = None,
        report: bool = True,
        modules: str | Sequence[str] | None = None,
        on_unreadable: Literal["warn", "raise"] = "warn",
        cached_calls: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps,
            per_layer=per_layer,
            per_head=False,
            figures_every=0,
            report=report,
            modules=modules,
            on_unreadable=on_unreadable,
        )
        self.check_layer_statistics()
        if tokens is not None and tokens < 2:
            raise ValueError(f"expected tokens to be at least 2, or None for all tokens, got {tokens}")
        if sequences is not None and sequences < 1:
            raise ValueError(f"expected sequences to be at least 1, or None for all of them, got {sequences}")
        self.tokens = tokens
        self.sequences = sequences
        self.seed = seed
        self.cached_calls = cached_calls

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {
            "every_n_steps": self.every_n_steps,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "seed": self.seed,
            "cached_calls": self.cached_calls,
        }

    def watched(self) -> Mapping[str, Any]:
        """Names of the blocks."""
        return dict.fromkeys(self._names)

    def module_of(self, name: str) -> str:
        """The block whose input or output is meant."""
        return name.removeprefix(_EMBEDDING)

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks and stand behind them before the first forward."""
        blocks, without = find_blocks(pl_module)
        inside = find_attention(pl_module)
        named_in = {name: [name, *(own for own in inside if own.startswith(f"{name}."))] for name in blocks}
        blocks = {name: blocks[name] for name, names in named_in.items() if matching(names, self.modules)}
        without = {name: reason for name, reason in without.items() if matches(name, self.modules)}
        if not self.choose(
            [*(name for names in named_in.values() for name in names), *without],
            without,
            kind="block",
            nothing=(
                f"expected a model whose attention stands in a list of blocks, found none in "
                f"{type(pl_module).__name__}: build the network in __init__ or configure_model"
            ),
            unread="whose output is known",
        ):
            return
        labels = layer_labels(list(blocks))
        named: dict[str, str] = {}
        for name, block in blocks.items():
            before, is_layer, _ = labels[name].rpartition("layer")
            if block.is_first and is_layer and f"{before}embedding" not in named.values():
                named[_EMBEDDING + name] = f"{before}embedding"
            named[name] = labels[name]
        outputs = {block.module: name for name, block in blocks.items()}
        inputs = {
            block.module: _EMBEDDING + name for name, block in blocks.items() if _EMBEDDING + name in named
        }
        self._names = tuple(named)
        self.remember_layers(dict.fromkeys(named, 1), (), labels=named)
        self._metric = HiddenStatistics(self._names)
        self._ran.clear()
        self._generated.clear()
        self._ever_generated, self._generated_was_told = set(), False
        self._generator.manual_seed(self.seed + trainer.global_rank)
        self._capture = HiddenCapture(
            outputs,
            self._hear,
            inputs=inputs,
            models={block.module: block.models for block in blocks.values()},
            model=pl_module,
            generated=None if self.cached_calls else self._leave_run_out,
        )
        self._capture.install()

    def release(self) -> None:
        """Take the hooks away."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.remove()

    def begin_batch(self, is_due: bool) -> None:
        """Listen during batches of a logged step."""
        if self._capture is not None:
            self._capture.enabled = is_due

    def end_batch(self) -> None:
        """Stop listening: a validation between two micro-batches is not training."""
        if self._capture is not None:
            self._capture.enabled = False

    def _leave_run_out(self, name: str) -> None:
        self._generated.add(name)
        self._ever_generated.add(name)

    def _hear(self, name: str, states: Tensor, mask: Tensor | None) -> None:
        metric = self._metric
        assert metric is not None  # find_layers
        if name in self._lost:
            return
        try:
            if metric.device != states.device:
                metric.to(states.device)
            sums = hidden_sums(
                states, mask=mask, tokens=self.tokens, sequences=self.sequences, generator=self._generator
            )
            metric.update({name: sums})
            self._ran.add(name)
        except UnsupportedCallError:
            raise
        except Exception as error:
            # It says nothing of the block: memory that ran out, say. This measurement is lost.
            self._lost[name] = lost_reason(error)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        """Statistics of all layers over the step's micro-batches, reduced over ranks."""
        metric, capture = self._metric, self._capture
        assert metric is not None  # find_layers
        assert capture is not None
        left_out = self._agree_on_layers(trainer, capture)
        self.attempt(lambda: self._name_missing(capture), "naming layers")

        def pooled() -> None:
            # Every rank takes part, whether or not it heard anything.
            metric.to(pl_module.device).update({})
            metric.leave_out(left_out)

        try:
            all_or_none(trainer, pooled)
            reduce_states(trainer, alone(metric))
            values = flat_values(metric)
            self.states = self._states(metric, values, capture, left_out)
            return values
        finally:
            metric.reset()
            self._lost, self._ran, self._generated = {}, set(), set()

    def _agree_on_layers(self, trainer: Trainer, capture: HiddenCapture) -> set[str]:
        """Names of what is left out, since some process could not read it; a collective call."""
        self._losses.end(self._names, self._lost, capture.problems)
        rows = [(name in capture.problems, name in self._lost) for name in self._names]
        found = list(zip(self._names, combine(trainer, rows), strict=True))
        out = {name for name, (is_out, _) in found if is_out}
        lost = {name for name, (_, is_lost) in found if is_lost} - out
        if out - self._told:
            self.note_left_out(reasons_of_all(trainer, capture.problems))
            self._told |= out
        if lost and not self._losses.was_told:
            self._losses.was_told = True
            self.note_lost(reasons_of_all(trainer, self._lost))
        return out | lost

    def _states(
        self,
        metric: HiddenStatistics,
        values: Mapping[str, Tensor],
        capture: HiddenCapture,
        left_out: Collection[str],
    ) -> Tensor:
        """State of every layer, by how many tokens were counted of it."""
        assert metric.counted is not None  # it was computed
        assert self.history is not None  # on_fit_start
        tokens = metric.counted[HIDDEN_MEANS.index(self.witness)].cpu()
        infinite = torch.stack([value.isinf() for value in values.values()]).any(0)
        broken = (tokens != 0) & ~values[self.witness].isfinite() | infinite
        states = torch.where(broken, NOT_FINITE, KNOWN)
        for place, name in enumerate(self._names):
            if name in left_out:
                reason = capture.problems.get(name, "its newest measurement failed")
                self.history.reasons[self.labels[name]] = reason
            if tokens[place] == 0 and states[place] == KNOWN:
                states[place] = (
                    LEFT_OUT
                    if name in left_out
                    else NO_DATA
                    if name in self._ran or name in self._generated
                    else DID_NOT_RUN
                )
        return states

    def _name_missing(self, capture: HiddenCapture) -> None:
        if capture.unmasked:
            names = sorted(capture.unmasked)
            self.note(
                f"no mask of the tokens is known for {shorten(names)}: all of their tokens count, padding too; "
                "give the model a two-dimensional attention_mask of the length of its hidden states to have it "
                "left out"
            )
        if self._ever_generated and not self._generated_was_told:
            self._generated_was_told = True
            self.note(
                f"{len(self._ever_generated)} of {len(self._names)} layers were also run by generate, which is "
                "not measured; cached_calls=True measures it too"
            )
        seen = capture.heard | self._told | self._ever_generated
        missing = [name for name in self._names if name not in seen]
        if missing:
            self.note(
                f"no hidden states of {len(missing)} of {len(self._names)} layers were seen ({shorten(missing)}): "
                "such a block was not run, or not by calling the module (model.forward or a fused kernel runs no "
                "hooks)"
            )

    def over_the_model(
        self, values: Mapping[str, Tensor], prefix: str | None = None, *, states: Tensor | None = None
    ) -> dict[str, float]:
        """Mean, minimum and maximum over the blocks."""
        is_block = torch.tensor([not name.startswith(_EMBEDDING) for name in self._names])
        blocks = {name: torch.where(is_block, flat, torch.nan) for name, flat in values.items()}
        states = None if states is None else torch.where(is_block, states, NO_VALUE)
        return super().over_the_model(blocks, prefix, states=states)

    def contribute(self, record: RunRecord) -> None:
        """Add the history to the record."""
        record.hidden = self.history
        if self.tokens is not None:
            record.notes.append(
                f"Ranks of hidden states and the modulus of their cosines are those of {self.tokens} sampled "
                "tokens of each sequence."
            )
        if self.sequences is not None:
            record.notes.append(
                f"Hidden states are those of at most {self.sequences} sampled sequences of each micro-batch; "
                "largest activations are lower bounds."
            )
