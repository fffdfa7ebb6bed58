"""Callback: σReparam on the attention of a model, put on before its optimizer is made."""

import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_qk.callbacks._layers import Patterns
from lightning_qk.callbacks._trainer import refuse_deepspeed
from lightning_qk.callbacks.interventions._base import Intervention, When, check_when, refuse_frozen
from lightning_qk.heads.reader import ProjectionReader, find_attention
from lightning_qk.interventions.head_scaler import head_scalers
from lightning_qk.interventions.layers import matching_layers
from lightning_qk.interventions.sigma_reparam import (
    Projections,
    add_sigma_reparam,
    remove_sigma_reparam,
    sigma_gains,
)


class SigmaReparam(Intervention):
    r"""Trains attention weights as ``W = γ W̃ / σ₁(W̃)``: σReparam of Zhai et al. 2023 (arXiv 2303.06296 [V]).

    The weights are reparametrized before the optimizer is made, so that it trains W̃ and γ: in ``setup``
    where the network is there by then, else behind the module's ``configure_model``. The function that the
    model computes is the same at the start. See :func:`~lightning_qk.add_sigma_reparam` for the keys of
    checkpoints, into which ``weight`` is split while it is on; a plain checkpoint can be loaded too, and
    :func:`~lightning_qk.plain_state_dict` makes one of the other kind plain. To validate, test or predict from a
    checkpoint with these keys, keep the callback in the trainer.

    Logged keys, at the trainer's ``log_every_n_steps``: ``sigma_reparam/gain/mean``, ``/min`` and ``/max``;
    with a name, ``sigma_reparam/<name>/…``.

    Args:
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        projections: ``"query_key"`` or ``"all"``, see :func:`~lightning_qk.add_sigma_reparam`.
        remove_at_end: make plain weights again when training has ended. Checkpoints that were saved before keep
            their keys.
        when: ``"always"`` refuses layers that are frozen at the start; ``"unfrozen"`` reparametrizes them all the
            same, with γ frozen too: they train as others do once both are unfrozen.
        name: tells several of these callbacks in one trainer apart.

    Raises:
        TypeError: the trainer is not a Trainer of Lightning.
        ValueError: at the start alone: the module holds no attention once its ``configure_model`` has run,
            weights that cannot be reparametrized, or a strategy that shards them.
    """

    group = "sigma_reparam"

    def __init__(
        self,
        *,
        modules: Patterns = None,
        projections: Projections = "query_key",
        remove_at_end: bool = False,
        when: When = "always",
        name: str | None = None,
    ) -> None:
        check_when(when)
        if projections not in ("query_key", "all"):
            raise ValueError(f"expected projections to be 'query_key' or 'all', got {projections!r}")
        self.projections: Projections = projections
        self.remove_at_end = remove_at_end
        self.when: When = when
        super().__init__(modules, name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reparametrize, or see to it that it is done once the network is built."""
        super().setup(trainer, pl_module, stage)
        refuse_deepspeed(trainer, type(self).__name__)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"expected a strategy that keeps weights whole for {type(self).__name__}, got "
                f"{type(trainer.strategy).__name__}, which shards them: use DDP"
            )
        if find_attention(pl_module) or not is_overridden("configure_model", pl_module):
            self._reparametrize(trainer, pl_module)
        else:
            self._follow_configure_model(trainer, pl_module)

    def _follow_configure_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        build = pl_module.configure_model

        @functools.wraps(build)
        def build_and_reparametrize() -> None:
            pl_module.__dict__.pop("configure_model", None)
            build()
            self._reparametrize(trainer, pl_module)

        pl_module.__dict__["configure_model"] = build_and_reparametrize

    def _reparametrize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if sigma_gains(pl_module):
            return
        if self._is_fit:
            reader = ProjectionReader(pl_module)
            editors = head_scalers(reader, matching_layers(reader, self.modules), trained=False)
            refuse_frozen([name for name, editor in editors.items() if editor.is_frozen], self.when)
        add_sigma_reparam(
            pl_module,
            modules=self.modules,
            projections=self.projections,
            trained=False,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the gains of a logged step."""
        if not self._is_due or not self.has_stepped(trainer):
            return
        self._is_due = False
        found = [gain.detach().flatten().float() for gain in sigma_gains(pl_module).values()]
        if not found:
            self.say("nothing is reparametrized any more: something has taken it away; training goes on")
            return
        gains = torch.cat(found).cpu()
        scalars = {
            f"{self.prefix}/gain/{name}": getattr(gains, name)().item() for name in ("mean", "min", "max")
        }
        self.log_step(trainer, pl_module, scalars, {})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make plain weights again, if that was asked for."""
        if self.remove_at_end:
            remove_sigma_reparam(pl_module)
