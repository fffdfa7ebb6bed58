"""Callback: collapse of rank, alignment of tokens and massive activations while a model trains."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypedDict

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import Unpack

from lightning_qk.architecture.labels import layer_labels, matches, shorten
from lightning_qk.callbacks._layers import Patterns, matching
from lightning_qk.callbacks._trainer import describe_error
from lightning_qk.callbacks.monitors._base import OnUnreadable, at_least
from lightning_qk.callbacks.monitors._keys import Families, PerLayer
from lightning_qk.callbacks.monitors._listening import ListeningMonitor
from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.hidden import HiddenCapture
from lightning_qk.functional.hidden import HIDDEN_STATISTICS, hidden_sums
from lightning_qk.heads.sites import AttentionLayer, attention_sites, find_blocks, label_layers
from lightning_qk.metrics.collector import SumAccumulator
from lightning_qk.metrics.hidden import HiddenStatistics, with_heads
from lightning_qk.metrics.later import hidden_later
from lightning_qk.record.history import RunRecord
from lightning_qk.record.states import NO_VALUE
from lightning_qk.record.statistics import logged_as_heatmap, logged_by_layer, logged_extremes

_EMBEDDING = "the input of "
"""In front of the name of a stack's first block."""


class HiddenOptions(TypedDict, total=False):
    """Options of :class:`~lightning_qk.callbacks.monitors.Monitor` that are not about heads."""

    per_layer: PerLayer
    families: Families
    exclude: Families
    report: bool
    modules: Patterns
    on_unreadable: OnUnreadable


class HiddenStateMonitor(ListeningMonitor):
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
    were not called, and masks that are not known, are named once in the log.

    Args:
        every_n_steps: measure at every n-th optimizer step; None follows the trainer's
            ``log_every_n_steps``.
        tokens: how many tokens of a sequence are drawn for what needs pairs or singular values; None for all. The
            cosine stays without bias; the effective rank is that of so many tokens and at most their number.
        sequences: how many sequences of each micro-batch are drawn; None for all. Means over sequences stay
            without bias; maxima are lower bounds.
        seed: of the monitor's own random generator; torch's global one is never touched.
        cached_calls: also measure forwards within transformers' ``generate``. By default they are left out, and
            said once.
        options: ``per_layer``, ``families``, ``exclude``, ``report``, ``modules`` (names of blocks, or of the
            attention layers in them) and ``on_unreadable``, see :class:`~lightning_qk.callbacks.monitors.Monitor`.
    """

    group = "hidden"
    statistics = HIDDEN_STATISTICS
    layer_statistics = logged_by_layer("hidden", HIDDEN_STATISTICS)
    extremes = logged_extremes("hidden", HIDDEN_STATISTICS)
    figure_statistics = logged_as_heatmap("hidden", HIDDEN_STATISTICS)
    record_field = "hidden"
    subject = "hidden states"
    witness = "token_norm"
    has_heads = False

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        tokens: int | None = 64,
        sequences: int | None = 8,
        seed: int = 0,
        cached_calls: bool = False,
        **options: Unpack[HiddenOptions],
    ) -> None:
        super().__init__(every_n_steps, per_head=False, figures_every=0, **options)
        at_least(2, tokens=tokens)
        at_least(1, sequences=sequences)
        self.tokens = tokens
        self.sequences = sequences
        self.seed = seed
        self.cached_calls = cached_calls

    def watched(self) -> Mapping[str, Any]:
        """Names of the blocks."""
        return dict.fromkeys(self._names)

    def module_of(self, name: str) -> str:
        """The block whose input or output is meant."""
        return name.removeprefix(_EMBEDDING)

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks and stand behind them before the first forward."""
        blocks, without = find_blocks(pl_module)
        inside = list(attention_sites(pl_module))
        named_in = {
            name: [name, *(site.name for site in inside if site.name.startswith(f"{name}."))]
            for name in blocks
        }
        blocks = {name: blocks[name] for name, names in named_in.items() if matching(names, self.modules)}
        without = {name: reason for name, reason in without.items() if matches(name, self.modules)}
        if not self.choose(
            [*(name for names in named_in.values() for name in names), *without],
            without,
            kind="block",
            nothing=(
                f"expected a model with attention in a list of blocks, found none in "
                f"{type(pl_module).__name__}: build the network in __init__ or configure_model"
            ),
            unread="whose output is known",
        ):
            return
        labels = layer_labels(list(blocks))
        as_attention = _labels_of_attention(inside, labels)
        named: dict[str, str] = {}
        for name, block in blocks.items():
            before, is_layer, _ = labels[name].rpartition("layer")
            if block.is_first and is_layer and f"{before}embedding" not in named.values():
                named[_EMBEDDING + name] = f"{before}embedding"
            named[name] = as_attention.get(name, labels[name])
        outputs = {block.module: name for name, block in blocks.items()}
        inputs = {
            block.module: _EMBEDDING + name for name, block in blocks.items() if _EMBEDDING + name in named
        }
        self.begin_listening()
        self._names = tuple(named)
        self.remember_layers(self.known_layers(), named)
        capture = HiddenCapture(
            outputs,
            self._hear,
            inputs=inputs,
            models={block.module: block.models for block in blocks.values()},
            turned={block.module: block.is_turned for block in blocks.values()},
            model=pl_module,
            generated=None if self.cached_calls else self._leave_call_out,
        )
        self.listen(trainer, capture)

    def _leave_call_out(self, name: str) -> None:
        self._pool.left_out_calls.add(name)

    def _hear(self, name: str, states: Tensor, mask: Tensor | None) -> None:
        pool = self._pool
        if name in pool.lost or not len(states):
            return
        try:
            options: Any = {
                "tokens": self.tokens,
                "sequences": self.sequences,
                "generator": self._generator,
            }
            later = hidden_later(states, mask, **options)
            pool.add(name, with_heads(hidden_sums(states, mask=mask, **options)) if later is None else later)
        except UnsupportedCallError:
            raise
        except Exception as error:
            # It says nothing of the block: memory that ran out, say. This measurement is lost.
            pool.lost[name] = f"measuring it failed ({describe_error(error)})"

    def known_layers(self) -> dict[str, int]:
        """Each has one value."""
        return dict.fromkeys(self._names, 1)

    def metric(self, heads: dict[str, int]) -> HiddenStatistics:
        """Means and maxima."""
        return HiddenStatistics(list(heads))

    def fill(self, metrics: Sequence[HiddenStatistics], pool: SumAccumulator) -> None:
        """Add what was pooled; every rank takes part."""
        metrics[0].update(pool.sums())

    def name_missing(self, seen: Collection[str]) -> None:
        """Name the blocks that were not called, and those with calls or masks that are not known."""
        if isinstance(self._capture, HiddenCapture) and self._capture.unmasked:
            names = sorted(self._capture.unmasked)
            self.note(
                f"no mask of the tokens is known for {shorten(names)}: all of their tokens count, padding too; "
                "give the model a two-dimensional attention_mask of the length of its hidden states to have it "
                "left out"
            )
        if self._generated and not self._generated_was_told:
            self._generated_was_told = True
            self.note(
                f"{len(self._generated)} of {len(self._names)} layers were also run by generate, which is "
                "not measured; cached_calls=True measures it too"
            )
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
        blocks = torch.where(is_block, torch.stack(list(values.values())), torch.nan).unbind()
        states = None if states is None else torch.where(is_block, states, NO_VALUE)
        return super().over_the_model(dict(zip(values, blocks, strict=True)), prefix, states=states)

    def contribute(self, record: RunRecord) -> None:
        """Add the history to the record."""
        super().contribute(record)
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


def _labels_of_attention(attention: Sequence[AttentionLayer], blocks: Mapping[str, str]) -> dict[str, str]:
    """Block → label of its one layer of self-attention: verdicts look for a layer under one label everywhere.

    Empty where two blocks would then have the same.

    Args:
        attention: all attention layers.
        blocks: block → label among the blocks.
    """
    labels = label_layers({layer.name: layer.is_cross for layer in attention}, {})
    own = {
        name: [
            labels[one.name]
            for one in attention
            if f"{one.name}.".startswith(f"{name}.") and not one.is_cross
        ]
        for name in blocks
    }
    found = {name: its[0] for name, its in own.items() if len(its) == 1}
    after = list((dict(blocks) | found).values())
    return found if len(set(after)) == len(after) else {}
