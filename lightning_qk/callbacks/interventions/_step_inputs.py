"""The covariance of what entered attention layers during an optimizer step, the same on every process."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_qk.callbacks._ranks import gathered
from lightning_qk.functional.layer_inputs import covariance_root, token_mean
from lightning_qk.tokens.layer_inputs import LayerInputs


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
        self._inputs = LayerInputs(
            model, modules=list(widths), tokens=each, keep=self._rows, seed=trainer.global_rank
        )
        self._is_spent = False

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
        self._is_spent, self._inputs.enabled = False, True

    def end_batch(self) -> None:
        """Stop listening: a validation between two micro-batches is not training."""
        self._inputs.enabled = False

    def unseen(self) -> dict[str, str]:
        """Layers without a forward that was sampled here, once a step was made: name → why."""
        if not self._is_spent:
            return {}
        missing = [name for name in self.widths if name not in self._inputs.seen]
        return {name: self._inputs.problems.get(name, "no forward of it was seen") for name in missing}

    def pool(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Exception | None]:
        """Layer → factor of the covariance of its tokens, → their mean, and what failed here; a collective call.

        Every process sends as many rows a layer; those that it has not have no weight. A layer of which no process
        has tokens has a covariance of zero, and no penalty.
        """
        self._is_spent = True
        sizes = [self._rows * (width + 1) for width in self.widths.values()]
        flat = torch.zeros(sum(sizes), device=self._trainer.strategy.root_device)
        error: Exception | None = None
        try:
            for part, (name, width) in zip(flat.split(sizes), self.widths.items(), strict=True):
                self._fill(part.view(self._rows, width + 1), name)
        except Exception as failed:
            error = failed
        every = [own.split(sizes) for own in gathered(self._trainer, flat)]
        moments, means = {}, {}
        for index, (name, width) in enumerate(self.widths.items()):
            table = torch.cat([own[index].view(self._rows, width + 1) for own in every])
            tokens, weight = table[:, :-1], table[:, -1]
            # A token that is not finite is the training's trouble, and does not spread by the penalty.
            weight = torch.where(tokens.isfinite().all(-1), weight, 0.0)
            moments[name], means[name] = covariance_root(tokens, weight), token_mean(tokens, weight)
        return moments, means, error

    def _fill(self, table: Tensor, name: str) -> None:
        taken = self._inputs.taken(name)
        if taken is None:
            return
        tokens, weight = taken
        if tokens.shape[1] != table.shape[1] - 1:
            raise ValueError(
                f"expected inputs of width {table.shape[1] - 1} in {name}, got {tokens.shape[1]}: leave the layer "
                "out by modules="
            )
        table[: len(tokens), :-1] = tokens
        table[: len(tokens), -1] = weight
