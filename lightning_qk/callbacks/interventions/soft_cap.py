"""Callback: attention logits are bounded softly."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._layers import Patterns
from lightning_qk.callbacks._trainer import is_logged_step
from lightning_qk.callbacks.interventions._attention import Replacement, cross_names, layer_names
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.heads.sites import AttentionLayer
from lightning_qk.interventions.replaced_attention import SoftCapped, check_cap


class SoftCap(Replacement):
    """Attention over ``cap · tanh(logits / cap)``, in training and evaluation, with the model's config unchanged.

    Gemma 2's soft cap for any model that calls its attention through transformers' interface. flex_attention
    takes the cap itself; in the place of sdpa, flash and eager functions stands an own one with the same masks,
    biases, sinks and dropout, which takes the memory of eager attention, n × m for each head. When the trainer
    is done the model is as it was: :class:`~lightning_qk.interventions.replaced_attention.SoftCapped` runs it
    capped elsewhere. Monitors measure the capped logits.

    Logged key: ``soft_cap/cap``.

    Args:
        cap: bound of the logits' magnitude.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        name: tells several of these callbacks in one trainer apart.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: a cap that is not positive and finite, patterns that match no layer, a layer that has a soft
            cap already, with a function that another remedy replaces, or with a call that does not pass through
            transformers' interface or cannot be read.
    """

    group = "soft_cap"

    def __init__(self, cap: float = 50.0, *, modules: Patterns = None, name: str | None = None) -> None:
        super().__init__(modules, name)
        check_cap(cap)
        self.cap = float(cap)

    def make(
        self, sites: Sequence[AttentionLayer], pl_module: LightningModule
    ) -> tuple[AttentionInterceptor, str]:
        """Capped attention."""
        capped = SoftCapped(layer_names(sites), self.cap, cross=cross_names(sites), model=pl_module)
        return capped.steering, f"logits are capped at {self.cap:g}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log that the cap is on."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if is_logged_step(trainer, None):
            cap = torch.full((), self.cap, device=pl_module.device)
            pl_module.log(f"{self.prefix}/cap", cap, on_step=True, on_epoch=False)
