"""Callback: updates of query and key weights that are held small in spectral norm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_qk.callbacks._account import Account
from lightning_qk.callbacks._trainer import (
    check_lightning,
    is_logged_step,
    logging_step,
    projection_reader,
    refuse_deepspeed,
)
from lightning_qk.interventions.update_cap import Capped, UpdateCapper, check_cap
from lightning_qk.logging.layers import layer_labels
from lightning_qk.logging.loggers import describe_config, log_scalars


class UpdateCap(Callback):
    r"""Scales each optimizer step's update of query and key weights so that ``σ₁(ΔW) ≤ τ σ₁(W)``.

    After Qi et al. 2025 (arXiv 2505.21910 [S]): as if the learning rate of that matrix and step had been smaller.
    See :class:`~lightning_qk.interventions.update_cap.UpdateCapper` for what is scaled and how exactly. It works
    at the optimizers' own steps, so that it comes before what other callbacks do after a step, and sees every
    step, those of manual optimization included; a step that a scaler skips is none.

    Logged keys, at the trainer's ``log_every_n_steps``, each over the steps since the last logged one:

    - ``update_cap/factor/min`` and ``update_cap/factor/layer_03``: the smallest factor on an update, 1 for none;
    - ``update_cap/ratio/max`` and ``update_cap/ratio/layer_03``: the largest σ₁(ΔW)/σ₁(W) before the cap;
    - ``update_cap/capped``: how many query and key matrices were capped.

    Args:
        tau: largest ratio of an update. The default lets σ₁ change by a hundredth a step (ours; the source that
            was at hand gives no number).
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        iterations: of the power iteration that estimates σ₁, each step.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: an argument is out of range, patterns match no layer, the weights of a layer are no plain
            trainable whole parameters of its own, or DeepSpeed steps copies of them.
    """

    def __init__(
        self,
        tau: float = 0.01,
        *,
        modules: str | Sequence[str] | None = None,
        iterations: int = 4,
    ) -> None:
        check_cap(tau, iterations)
        self.tau = float(tau)
        self.modules = modules if modules is None or isinstance(modules, str) else list(modules)
        self.iterations = iterations
        self.account = Account()
        self._ends: list[Callable[[], None]] = []
        self._labels: dict[str, str] = {}
        # Per matrix since the last logged step.
        self._factors: dict[tuple[str, str], Tensor] = {}
        self._ratios: dict[tuple[str, str], Tensor] = {}
        self._is_due = False
        self._steps_before = 0

    @property
    def state_key(self) -> str:
        """Several of these can be in one trainer, on other modules."""
        return self._generate_state_key(modules=self.modules)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any work: another package's trainer, DeepSpeed."""
        check_lightning(trainer, type(self).__name__)
        if stage != "fit":
            return
        refuse_deepspeed(trainer, type(self).__name__)
        settings = ("tau", "modules", "iterations")
        describe_config(trainer, {type(self).__name__: {name: getattr(self, name) for name in settings}})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the matrices and follow the optimizers; raise where the weights cannot be scaled."""
        self._end()
        reader = projection_reader(trainer, pl_module)
        capper = UpdateCapper(reader, self.tau, modules=self.modules, iterations=self.iterations)
        self._ends = [capper.follow(optimizer, self._note) for optimizer in trainer.optimizers]
        cross = {name for name, plan in reader.layers.items() if not plan.self_attention}
        self._labels = layer_labels(list(reader.layers), cross=cross)
        self._factors.clear()
        self._ratios.clear()
        self._is_due = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find out whether the step is logged."""
        self._is_due = self._is_due or is_logged_step(trainer, None)
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was done since the last logged step."""
        if not self._is_due or trainer.global_step == self._steps_before or not self._factors:
            return
        self._is_due = False
        keys = list(self._factors)
        # One copy from the device.
        table = (
            torch.stack([torch.stack([self._factors[key], self._ratios[key]]) for key in keys]).float().cpu()
        )
        self._factors.clear()
        self._ratios.clear()
        factors, ratios = table.unbind(1)
        scalars = {
            "update_cap/factor/min": factors.min().item(),
            "update_cap/ratio/max": ratios.max().item(),
            "update_cap/capped": float((factors < 1).sum()),
        }
        pl_module.log_dict(scalars, logger=False, on_step=True, on_epoch=False)
        self.account.draw(logging_step(trainer), scalars)
        for name in dict.fromkeys(name for name, _ in keys):
            own = [place for place, key in enumerate(keys) if key[0] == name]
            scalars[f"update_cap/factor/{self._labels[name]}"] = factors[own].min().item()
            scalars[f"update_cap/ratio/{self._labels[name]}"] = ratios[own].max().item()
        log_scalars(trainer, scalars, logging_step(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers as they were: teardown may not follow."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        self._end()

    def _end(self) -> None:
        for end in self._ends:
            end()
        self._ends = []

    def _note(self, found: dict[tuple[str, str], Capped]) -> None:
        for key, capped in found.items():
            factor, ratio = self._factors.get(key), self._ratios.get(key)
            self._factors[key] = capped.factor if factor is None else torch.minimum(factor, capped.factor)
            self._ratios[key] = capped.ratio if ratio is None else torch.maximum(ratio, capped.ratio)
