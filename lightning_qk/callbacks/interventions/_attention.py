"""What callbacks that replace or penalize attention calls share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._layers import Patterns, chosen_sites
from lightning_qk.callbacks._output import inform
from lightning_qk.callbacks._trainer import DeepSpeedStrategy, describe_error, logging_step
from lightning_qk.callbacks.interventions._base import Intervention
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.heads.sites import AttentionLayer
from lightning_qk.interventions.penalties import AttentionPenalty, Auxiliary, Measure


class AttentionIntervention(Intervention):
    """Base of the callbacks that change attention calls."""

    reads_weights = False

    live: ClassVar[tuple[str, ...]] = ("_steering", "_modules")

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self._steering: AttentionInterceptor | None = None
        self._modules: dict[str, nn.Module] = {}
        self._names: list[str] = []
        self._was_missed = False

    @property
    def state_key(self) -> str:
        """Several of these can be in one trainer, on other modules."""
        return self._generate_state_key(name=self.name, modules=self.modules)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, and that no two of these have one name."""
        super().setup(trainer, pl_module, stage)
        same = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(other, type(self)) and other.name == self.name
        ]
        if len(same) > 1:
            raise ValueError(
                f"expected {type(self).__name__} callbacks of different names in one trainer, got {len(same)} "
                f"named {self.name!r}: pass each its own name="
            )

    def steer(self, steering: AttentionInterceptor, names: Sequence[str], what: str) -> None:
        """Install, and say so."""
        steering.spare = self._spare
        steering.install()
        self._steering, self._names, self._was_missed = steering, list(names), False
        self._modules = {name: module for module, name in steering.modules.items()}
        inform(f"{type(self).__name__}: {what} in {len(names)} attention layers ({shorten(names)})")

    def release(self) -> None:
        """Leave the attention interface as it was."""
        if self._steering is not None:
            self._steering.remove()
            self._steering = None
        self._modules = {}

    def _spare(self, name: str, reason: str) -> None:
        self.say(f"{name} is left as it is from now on: {reason}; training goes on")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Name, once, layers that were replaced, and those that were not called in the first batch."""
        if self._steering is None:
            return
        for name, module in list(self._modules.items()):
            if _module_at(pl_module, name) is not module:
                del self._modules[name]
                self.say(f"{name} is not steered any more: it was replaced or removed; training goes on")
        if self._was_missed:
            return
        self._was_missed = True
        missing = [name for name in self._names if name not in self._steering.reached]
        if missing:
            self.say(
                f"{len(missing)} of {len(self._names)} layers were not steered in the "
                f"first batch ({shorten(missing)}): they were not run, or did not call their attention function"
            )


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


class Replacement(AttentionIntervention):
    """Base of the callbacks that replace attention in training, validation, test and prediction alike."""

    @abstractmethod
    def make(
        self, sites: Sequence[AttentionLayer], pl_module: LightningModule
    ) -> tuple[AttentionInterceptor, str]:
        """What replaces the layers' attention, and what it does in words."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; raise here, before any work, where the attention of one cannot be replaced."""
        if self._steering is None:
            sites = chosen_sites(pl_module, self.modules)
            steering, what = self.make(sites, pl_module)
            self.steer(steering, [site.name for site in sites], what)

    on_validation_start = on_fit_start
    on_test_start = on_fit_start
    on_predict_start = on_fit_start


def layer_names(sites: Sequence[AttentionLayer]) -> dict[Any, str]:
    """Module → name."""
    return {site.module: site.name for site in sites}


def cross_names(sites: Sequence[AttentionLayer]) -> frozenset[str]:
    """Names of the layers of cross-attention."""
    return frozenset(site.name for site in sites if site.is_cross)


class PenaltyIntervention(AttentionIntervention):
    """Base of the callbacks with a penalty on attention that reaches the gradient at the attention calls."""

    live: ClassVar[tuple[str, ...]] = ("_penalty",)

    logged: tuple[str, ...]
    """Names of what is logged."""

    def __init__(self, weight: float, modules: Patterns, name: str | None) -> None:
        super().__init__(modules, name)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"expected a finite weight of at least 0, got {weight}: pass 0 to switch it off")
        self.weight = float(weight)

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self._penalty: Auxiliary | None = None

    def check_strategy(self, trainer: Trainer) -> None:
        """Refuse DeepSpeed, which scales losses out of sight."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"expected a strategy whose loss scale is known for {type(self).__name__}, got DeepSpeed: use "
                "FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml) or DDP"
            )

    def penalize(self, sites: Sequence[AttentionLayer], measure: Measure, pl_module: LightningModule) -> None:
        """Install a penalty on layers, off until the first batch."""
        names = layer_names(sites)
        penalty = AttentionPenalty(names, measure, self.weight, cross=cross_names(sites), model=pl_module)
        self.install(penalty, list(names.values()), f"penalty of weight {self.weight:g}")

    def install(self, penalty: Auxiliary, names: Sequence[str], what: str) -> None:
        """Install whatever has a price, off until the first batch."""
        penalty.enabled, self._is_due, self._penalty = False, False, penalty
        self.steer(penalty.steering, names, what)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Penalize the calls of this batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._penalty is not None:
            self._penalty.enabled, self._penalty.scale = self.weight > 0, 1.0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the factor that the loss carries by now: of accumulation and of a gradient scaler."""
        if self._penalty is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale: float | Tensor = 1.0
        if scaler is not None and scaler.is_enabled():
            scale = scaler._scale  # not get_scale(), which waits for the device
        if pl_module.automatic_optimization:
            scale = scale / trainer.accumulate_grad_batches
        self._penalty.scale = scale

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the means over the step's micro-batches, layers and ranks."""
        name_missing = super().on_train_batch_end
        self.log_safely(lambda: name_missing(trainer, pl_module, outputs, batch, batch_idx))
        penalty = self._penalty
        if penalty is None:
            return
        penalty.enabled = False  # a validation between two batches may use autograd
        if not self.has_stepped(trainer):
            return
        values = self._taken(penalty, pl_module.device)
        if not self._is_due:
            return
        self._is_due = False
        found = {
            # Every rank the same keys: the reduction waits for all.
            f"{self.prefix}/{key}": trainer.strategy.reduce(value, reduce_op="mean")
            for key, value in values.items()
        }
        self.log_safely(lambda: self._log(trainer, pl_module, found))

    def _taken(self, penalty: Auxiliary, device: torch.device) -> dict[str, Tensor]:
        """What was seen since the last step; NaN where there is nothing, or this rank cannot tell."""
        nan = torch.full((), torch.nan, device=device)
        try:
            values = penalty.take()
            return {key: values.get(key, nan).to(device, torch.float32) for key in self.logged}
        except Exception as error:
            self.say(
                f"the penalty of a step is not known ({describe_error(error)}); it goes on to work",
                key="a penalty is not known",
            )
            return dict.fromkeys(self.logged, nan)

    def _log(self, trainer: Trainer, pl_module: LightningModule, found: Mapping[str, Tensor]) -> None:
        pl_module.log_dict(dict(found), on_step=True, on_epoch=False)
        self.event_log.add_points(logging_step(trainer), {key: float(value) for key, value in found.items()})

    def release(self) -> None:
        """Leave the attention interface as it was."""
        super().release()
        self._penalty = None
