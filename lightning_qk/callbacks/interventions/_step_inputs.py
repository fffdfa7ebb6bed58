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
        by_width: dict[int, list[str]] = {}
        for name, width in self.widths.items():
            by_width.setdefault(width, []).append(name)
        error: Exception | None = None
        tables = []
        for width, names in by_width.items():
            try:
                tables.append(self._table(names, width))
            except Exception as failed:  # noqa: PERF203 (a few widths)
                error = error or failed
                device = self._trainer.strategy.root_device
                tables.append(torch.zeros(len(names), self._rows, width + 1, device=device))
        every = self._of_all(tables)
        moments: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        for names, table in zip(by_width.values(), every, strict=True):
            tokens, weight = table[..., :-1], table[..., -1]
            # A token that is not finite is the training's trouble, and does not spread by the penalty.
            weight = torch.where(tokens.isfinite().all(-1), weight, 0.0)
            moments |= zip(names, covariance_root(tokens, weight).unbind(0), strict=True)
            means |= zip(names, token_mean(tokens, weight).unbind(0), strict=True)
        return moments, means, error

    def _table(self, names: list[str], width: int) -> Tensor:
        """Tokens and weights of layers of one width, ``(layers, rows, width + 1)``, float32."""
        taken = [self._inputs.taken(name) for name in names]
        device = self._trainer.strategy.root_device
        kinds = {None if own is None else (tuple(own[0].shape), own[0].device, own[0].dtype) for own in taken}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is not None and kind[:2] == ((self._rows, width), device):
            tokens, weights = zip(*(own for own in taken if own is not None), strict=True)
            return torch.cat([torch.stack(tokens).float(), torch.stack(weights)[..., None].float()], -1)
        table = torch.zeros(len(names), self._rows, width + 1, device=device)
        for name, part in zip(names, table.unbind(0), strict=True):
            self._fill(part, name)
        return table

    def _of_all(self, tables: list[Tensor]) -> list[Tensor]:
        """The same with the rows of all processes; a collective call."""
        flat = torch.cat([table.flatten() for table in tables]) if len(tables) > 1 else tables[0].flatten()
        every = gathered(self._trainer, flat)
        if len(every) == 1:
            return tables
        sizes = [table.numel() for table in tables]
        parts = zip(*(own.split(sizes) for own in every), strict=True)
        return [
            torch.cat([part.view(table.shape) for part in of_ranks], 1)
            for table, of_ranks in zip(tables, parts, strict=True)
        ]

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
