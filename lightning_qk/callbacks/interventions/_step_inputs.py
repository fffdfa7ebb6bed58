"""What entered attention layers during an optimizer step, the same on every process."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_qk.callbacks._ranks import gathered, is_distributed
from lightning_qk.functional.layer_inputs import covariance_root
from lightning_qk.tokens.layer_inputs import LayerInputs

_MOST_RUNS = 16
"""Runs of a layer in one micro-batch (shared layers, several forwards) whose tokens are kept until the step."""

_STEPS_TO_BE_SEEN = 20
"""A layer that was not run in as many steps is said to have no penalty."""

Inputs = tuple[Tensor, Tensor]
"""Tokens ``(tokens, width)`` of a layer, and how many each stands for."""


class StepInputs:
    """Tokens of the micro-batches and processes of one step; layers are fixed.

    Args:
        trainer: of the training.
        model: its module.
        widths: names of attention layers, and the width of what enters each.
        tokens: how many to take of a step, of all its micro-batches and processes together.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, widths: Mapping[str, int], tokens: int) -> None:
        micro = max(trainer.accumulate_grad_batches, 1)
        each = max(2, math.ceil(tokens / (micro * trainer.world_size)))
        self._trainer = trainer
        self._rows = each * micro
        self.widths = dict(widths)
        self._inputs = LayerInputs(model, modules=list(widths), tokens=each, keep=_MOST_RUNS * self._rows)
        self._is_spent = False
        self._steps = 0

    def install(self) -> None:
        """Hook the layers."""
        self._inputs.install()

    def remove(self) -> None:
        """Take the hooks away."""
        self._inputs.remove()

    def begin_batch(self) -> None:
        """Listen; forget the tokens of a step that was made."""
        if self._is_spent:
            self._inputs.clear()
        # By the batch, so that a resumed run draws what the first one would have drawn.
        trainer = self._trainer
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        self._inputs.seed(batch * trainer.world_size + trainer.global_rank)
        self._is_spent, self._inputs.enabled = False, True

    def end_batch(self) -> None:
        """Stop listening: a validation between two micro-batches is not training."""
        self._inputs.enabled = False

    def unseen(self, *, at_end: bool = False) -> dict[str, str]:
        """Layers without a forward that was sampled here: name → why.

        Those that just were not run are among them at the end, or after some steps: networks take turns.
        """
        missing = [name for name in self.widths if name not in self._inputs.seen]
        if not self._steps:
            return {}
        is_known = at_end or self._steps >= _STEPS_TO_BE_SEEN
        return {
            name: self._inputs.problems.get(name, "no forward of it was seen")
            for name in missing
            if is_known or name in self._inputs.problems
        }

    def pool(self) -> tuple[dict[str, Inputs], Exception | None]:
        """Layer → its tokens and how many each stands for, and what failed here; a collective call.

        Every process sends as many rows a layer; those that it has not have no weight. A layer of which no process
        has tokens has none with a weight, and no penalty.
        """
        self._is_spent = True
        self._steps += 1
        by_width = self._by_width()
        error: Exception | None = None
        tables: list[tuple[Tensor, Tensor]] = []
        for width, names in by_width.items():
            try:
                tables.append(self._table(names, width))
            except Exception as failed:  # noqa: PERF203 (a few widths)
                error = error or failed
                tables.append(self._nothing(width, len(names)))
        inputs: dict[str, Inputs] = {}
        for names, (tokens, weight) in zip(by_width.values(), self._of_all(tables), strict=True):
            # A token that is not finite is the training's trouble, and does not spread by the penalty.
            weight = torch.where(tokens.isfinite().all(-1), weight, 0.0)
            inputs |= zip(names, zip(tokens.unbind(0), weight.unbind(0), strict=True), strict=True)
        return inputs, error

    def moments(self, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """Layer → factor of the covariance of its tokens, of what :meth:`pool` gave."""
        found: dict[str, Tensor] = {}
        for names in self._by_width().values():
            tokens, weight = (torch.stack([inputs[name][part] for name in names]) for part in range(2))
            found |= zip(names, covariance_root(tokens, weight).unbind(0), strict=True)
        return found

    def _by_width(self) -> dict[int, list[str]]:
        """Width of what enters layers → their names."""
        by_width: dict[int, list[str]] = {}
        for name, width in self.widths.items():
            by_width.setdefault(width, []).append(name)
        return by_width

    def _nothing(self, width: int, *layers: int) -> tuple[Tensor, Tensor]:
        """No tokens: rows without weight."""
        tokens = torch.zeros(*layers, self._rows, width, device=self._trainer.strategy.root_device)
        return tokens, tokens.new_zeros(tokens.shape[:-1])

    def _table(self, names: list[str], width: int) -> tuple[Tensor, Tensor]:
        """Tokens of layers of one width, ``(layers, rows, width)``, and their weights, float32."""
        tokens, weights = zip(*(self._rows_of(name, width) for name in names), strict=True)
        return torch.stack(tokens).float(), torch.stack(weights).float()

    def _rows_of(self, name: str, width: int) -> tuple[Tensor, Tensor]:
        """Tokens of a layer and their weights; rows without weight make them as many as of any other."""
        taken = self._inputs.taken(name)
        if taken is None:
            return self._nothing(width)
        tokens, weight = (own.to(self._trainer.strategy.root_device) for own in taken)
        if tokens.shape[1] != width:
            raise ValueError(
                f"expected inputs of width {width} in {name}, got {tokens.shape[1]}: leave the layer out by "
                "modules="
            )
        missing = self._rows - len(tokens)
        if missing < 0:
            # Of more runs than micro-batches: some tokens of each stand for the others.
            share = len(tokens) / self._rows
            place = ((torch.arange(self._rows, device=tokens.device) + 0.5) * share).long()
            return tokens[place], weight[place] * share
        if missing:
            tokens, weight = pad(tokens, (0, 0, 0, missing)), pad(weight, (0, missing))
        return tokens, weight

    def _of_all(self, tables: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The same with the rows of all processes; a collective call."""
        if not is_distributed(self._trainer):
            return tables
        own = [part for table in tables for part in table]
        sizes = [part.numel() for part in own]
        every = gathered(self._trainer, torch.cat([part.flatten() for part in own]))
        parts = [
            torch.cat([of_rank.view(part.shape) for of_rank in of_ranks], 1)
            for part, of_ranks in zip(
                own, zip(*(flat.split(sizes) for flat in every), strict=True), strict=True
            )
        ]
        return list(zip(parts[::2], parts[1::2], strict=True))
