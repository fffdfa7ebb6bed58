"""Callback: σReparam on the attention of a model, put on before its optimizer is made."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_qk.callbacks._account import Account
from lightning_qk.callbacks._trainer import (
    check_lightning,
    is_logged_step,
    logging_step,
    refuse_deepspeed,
)
from lightning_qk.heads.reader import find_attention
from lightning_qk.interventions.sigma_reparam import (
    Projections,
    add_sigma_reparam,
    remove_sigma_reparam,
    sigma_gains,
)
from lightning_qk.logging.loggers import describe_config, log_scalars


class SigmaReparam(Callback):
    r"""Trains attention weights as ``W = γ W̃ / σ₁(W̃)``: σReparam of Zhai et al. 2023 (arXiv 2303.06296 [V]).

    The weights are reparametrized before the optimizer is made, so that it trains W̃ and γ: in ``setup`` where the
    network is there by then, else behind the module's ``configure_model``. The function that the model computes is
    the same at the start. See :func:`~lightning_qk.add_sigma_reparam` for the keys of checkpoints, into which
    ``weight`` is split while it is on; a plain checkpoint can be loaded too, and
    :func:`~lightning_qk.plain_state_dict` makes one of the other kind plain. To validate, test or predict from a
    checkpoint with these keys, keep the callback in the trainer.

    Logged keys, at the trainer's ``log_every_n_steps``: ``sigma_reparam/gain/mean``, ``/min`` and ``/max``.

    Args:
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        projections: ``"query_key"`` or ``"all"``, see :func:`~lightning_qk.add_sigma_reparam`.
        remove_at_end: make plain weights again when training has ended. Checkpoints that were saved before keep
            their keys.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: the module holds no attention once its ``configure_model`` has run, weights that cannot be
            reparametrized, or a strategy that shards them.
    """

    def __init__(
        self,
        *,
        modules: str | Sequence[str] | None = None,
        projections: Projections = "query_key",
        remove_at_end: bool = False,
    ) -> None:
        if projections not in ("query_key", "all"):
            raise ValueError(f"expected projections to be 'query_key' or 'all', got {projections!r}")
        self.modules = modules if modules is None or isinstance(modules, str) else list(modules)
        self.projections: Projections = projections
        self.remove_at_end = remove_at_end
        self.account = Account()
        self._is_due = False
        self._steps_before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reparametrize, or see to it that it is done once the network is built."""
        check_lightning(trainer, type(self).__name__)
        refuse_deepspeed(trainer, type(self).__name__)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"expected a strategy that keeps weights whole for {type(self).__name__}, got "
                f"{type(trainer.strategy).__name__}, which shards them: use DDP"
            )
        if stage == "fit":
            settings = ("modules", "projections", "remove_at_end")
            describe_config(trainer, {type(self).__name__: {name: getattr(self, name) for name in settings}})
        if find_attention(pl_module) or not is_overridden("configure_model", pl_module):
            self._reparametrize(pl_module)
        else:
            self._follow_configure_model(pl_module)

    def _follow_configure_model(self, pl_module: LightningModule) -> None:
        build = pl_module.configure_model

        @functools.wraps(build)
        def build_and_reparametrize() -> None:
            pl_module.__dict__.pop("configure_model", None)
            build()
            self._reparametrize(pl_module)

        pl_module.__dict__["configure_model"] = build_and_reparametrize

    def _reparametrize(self, pl_module: LightningModule) -> None:
        if not sigma_gains(pl_module):
            add_sigma_reparam(pl_module, modules=self.modules, projections=self.projections)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find out whether the step is logged."""
        self._is_due = self._is_due or is_logged_step(trainer, None)
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the gains of a logged step."""
        if not self._is_due or trainer.global_step == self._steps_before:
            return
        self._is_due = False
        gains = torch.cat([gain.detach().flatten().float() for gain in sigma_gains(pl_module).values()]).cpu()
        scalars = {
            f"sigma_reparam/gain/{name}": getattr(gains, name)().item() for name in ("mean", "min", "max")
        }
        pl_module.log_dict(scalars, logger=False, on_step=True, on_epoch=False)
        self.account.draw(logging_step(trainer), scalars)
        log_scalars(trainer, scalars, logging_step(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make plain weights again, if that was asked for."""
        if self.remove_at_end:
            remove_sigma_reparam(pl_module)
