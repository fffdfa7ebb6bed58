"""Callback: spectra of heads set to one size while a model is evaluated."""

from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks._layers import Patterns
from lightning_qk.callbacks._trainer import describe_error, logging_step, projection_reader
from lightning_qk.callbacks.interventions._base import Intervention
from lightning_qk.interventions.spectrum_scaling import SpectrumScaler, Statistic, check_scaling
from lightning_qk.loggers.loggers import describe_config, log_scalars


class SpectrumScaling(Intervention):
    r"""Evaluates a model with ``W_QK ← γ log(η + ε) W_QK / √η`` in every head: TAME's scaling at inference.

    Read in a summary only (ICLR 2025 [S]), while its released code scales logits by activations [V]: see
    :class:`~lightning_qk.interventions.spectrum_scaling.SpectrumScaler` for what η is here and what is not known.
    The weights are scaled when a validation, test or prediction loop starts, and have the very values back at
    its end, before a checkpoint is written; training is never touched.

    Logged keys: ``spectrum_scaling/factor/mean``, ``/min`` and ``/max`` over all heads, at the start of validation
    and test loops (the sanity check's not). With a name, ``spectrum_scaling/<name>/…``.

    Args:
        gamma: γ.
        eps: ε.
        statistic: what η is: ``"frobenius_sq"`` or ``"trace_sq"``.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        name: tells several of these callbacks in one trainer apart.

    Raises:
        TypeError: the trainer is not a Trainer of Lightning.
        ValueError: what the scaling cannot do exactly, when a fit or a loop outside of one starts; see its class.
            Where it turns out in a fit's later validation, that one is of the weights as they are, which is said.
    """

    group = "spectrum_scaling"

    live: ClassVar[tuple[str, ...]] = ("_scaler",)

    def __init__(
        self,
        gamma: float = 1.0,
        *,
        eps: float = 1.0,
        statistic: Statistic = "frobenius_sq",
        modules: Patterns = None,
        name: str | None = None,
    ) -> None:
        check_scaling(gamma, eps, statistic)
        self.gamma, self.eps = float(gamma), float(eps)
        self.statistic: Statistic = statistic
        super().__init__(modules, name)

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self._scaler: SpectrumScaler | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, and put the settings into the run's config."""
        super().setup(trainer, pl_module, stage)
        if not self._is_fit:  # loops outside of a fit scale too
            describe_config(trainer, {self.title(trainer): self.settings()})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise where weights could not be scaled at the first validation."""
        self._make(trainer, pl_module).check()

    def _make(self, trainer: Trainer, pl_module: LightningModule) -> SpectrumScaler:
        return SpectrumScaler(
            projection_reader(trainer, pl_module),
            gamma=self.gamma,
            eps=self.eps,
            statistic=self.statistic,
            modules=self.modules,
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale."""
        self.release()
        try:
            # A new one each time: modules may have been replaced since.
            scaler = self._scaler = self._make(trainer, pl_module)
            factors = torch.cat([own.float() for own in scaler.apply().values()]).cpu()
        except Exception as error:
            self.release()
            if not self._is_fit:
                raise
            self.say(f"the weights are not scaled ({describe_error(error)}); training goes on")
            return
        if not (trainer.sanity_checking or trainer.predicting):
            scalars = {
                f"{self.prefix}/factor/{name}": getattr(factors, name)().item()
                for name in ("mean", "min", "max")
            }
            step = logging_step(trainer)
            self.log_safely(lambda: log_scalars(trainer, scalars, step))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the weights their values back."""
        self.release()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def release(self) -> None:
        """Give the weights their values back, wherever a loop ended."""
        scaler, self._scaler = self._scaler, None
        if scaler is not None:
            scaler.undo()
