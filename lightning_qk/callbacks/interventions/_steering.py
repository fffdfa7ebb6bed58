"""What callbacks that steer attention calls have in common."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_qk.callbacks._account import Account
from lightning_qk.callbacks._trainer import (
    DeepSpeedStrategy,
    check_lightning,
    is_logged_step,
    logging_step,
)
from lightning_qk.callbacks.interventions._base import Intervention
from lightning_qk.callbacks.monitors._base import shorten
from lightning_qk.capture.steering import AttentionSteering
from lightning_qk.heads.find import Site, attention_sites
from lightning_qk.interventions.penalties import AttentionPenalty, Auxiliary, Measure
from lightning_qk.loggers.loggers import describe_config

Patterns = str | Sequence[str] | None


def kept_patterns(modules: Patterns) -> str | list[str] | None:
    """Patterns as a callback keeps them."""
    return modules if modules is None or isinstance(modules, str) else list(modules)


def chosen_sites(model: nn.Module, modules: Patterns) -> list[Site]:
    """Attention layers whose names match some pattern.

    Raises:
        ValueError: there are none.
    """
    patterns = [modules] if isinstance(modules, str) else modules
    sites = list(attention_sites(model))
    chosen = [
        site
        for site in sites
        if patterns is None or any(fnmatchcase(site.name, pattern) for pattern in patterns)
    ]
    if not chosen:
        names = shorten([site.name for site in sites])
        raise ValueError(
            f"expected modules={modules!r} to match at least one attention layer, but it matches none of "
            f"{len(sites)} ({names}): use * for any part of a name"
        )
    return chosen


class Remedy(Intervention):
    """Base of the callbacks that steer attention calls; see there for what users pass."""

    reads_weights = False
    group: str
    """Prefix of the log keys."""

    live: ClassVar[Mapping[str, Callable[[], Any]]] = {"_steering": lambda: None, "_modules": dict}

    def __init__(self, modules: Patterns, name: str | None) -> None:
        self.modules = kept_patterns(modules)
        self.name = name
        super().__init__()

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self._modules: dict[str, nn.Module] = {}
        self._steering: AttentionSteering | None = None
        self._names: list[str] = []
        self._was_missed = False

    @property
    def state_key(self) -> str:
        """Several of these can be in one trainer, on other modules."""
        return self._generate_state_key(name=self.name, modules=self.modules)

    @property
    def prefix(self) -> str:
        """Of the log keys."""
        return self.group if self.name is None else f"{self.group}/{self.name}"

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {"modules": self.modules}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any work: no trainer of Lightning, one name twice."""
        self._remove()
        self.begin_stage(trainer, stage)
        check_lightning(trainer, type(self).__name__)
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
        if stage == "fit":
            title = type(self).__name__ if self.name is None else f"{type(self).__name__} {self.name}"
            describe_config(trainer, {title: self.settings()})

    def steer(self, steering: AttentionSteering, names: Sequence[str], what: str) -> None:
        """Install, and say so."""
        steering.spare = self._spare
        steering.install()
        self._steering, self._names, self._was_missed = steering, list(names), False
        self._modules = {name: module for module, name in steering.modules.items()}
        rank_zero_info(
            f"{type(self).__name__}: {what} in {len(names)} attention layers ({shorten(list(names))})"
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the attention interface as it was."""
        self._remove()

    def _remove(self) -> None:
        if self._steering is not None:
            self._steering.remove()
            self._steering = None
        self._modules = {}

    def _spare(self, name: str, reason: str) -> None:
        self.say(f"{name} is left as it is from now on: {reason}; training goes on")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the attention interface as it was: teardown may not follow."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Name, once, layers that were replaced, and those whose calls did not come by in the first batch."""
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


class PenaltyRemedy(Remedy):
    """Base of the callbacks whose penalty on attention reaches the gradient at the attention calls."""

    live: ClassVar[Mapping[str, Callable[[], Any]]] = {**Remedy.live, "_penalty": lambda: None}

    def __init__(self, weight: float, modules: Patterns, name: str | None) -> None:
        super().__init__(modules, name)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"expected a finite weight of at least 0, got {weight}: pass 0 to switch it off")
        self.weight = float(weight)

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self.account = Account()
        self._penalty: Auxiliary | None = None
        self._is_due = False
        self._steps_before = 0

    def kept(self) -> dict[str, Any]:
        """The curves."""
        return {"account": self.account.state_dict()}

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's run."""
        self.account.load_state_dict(kept["account"])

    def settings(self) -> dict[str, Any]:
        """Arguments as they go into the run's config."""
        return {"weight": self.weight, **super().settings()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse DeepSpeed, which scales losses out of sight."""
        check_lightning(trainer, type(self).__name__)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"expected a strategy whose loss scale is known for {type(self).__name__}, got DeepSpeed: use "
                "FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml) or DDP"
            )
        super().setup(trainer, pl_module, stage)

    def penalize(self, sites: Sequence[Site], measure: Measure, pl_module: LightningModule) -> None:
        """Install a penalty on layers, off until the first batch."""
        penalty = AttentionPenalty(
            {site.module: site.name for site in sites},
            measure,
            self.weight,
            cross=frozenset(site.name for site in sites if site.is_cross),
            model=pl_module,
        )
        penalty.enabled, self._is_due, self._penalty = False, False, penalty
        names = [site.name for site in sites]
        self.steer(penalty.steering, names, f"penalty of weight {self.weight:g}")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Penalize the calls of this batch."""
        if self._penalty is None:
            return
        self._penalty.enabled, self._penalty.scale = self.weight > 0, 1.0
        self._steps_before = trainer.global_step
        self._is_due = self._is_due or is_logged_step(trainer, None)

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
        self.log_safely(
            lambda: super(PenaltyRemedy, self).on_train_batch_end(
                trainer, pl_module, outputs, batch, batch_idx
            )
        )
        penalty = self._penalty
        if penalty is None:
            return
        penalty.enabled = False  # a validation between two batches may use autograd
        if trainer.global_step == self._steps_before:
            return
        values = self._taken(penalty, pl_module.device)
        if not self._is_due:
            return
        self._is_due = False
        logged = {
            # Every rank the same keys: the reduction waits for all.
            f"{self.prefix}/{key}": trainer.strategy.reduce(value, reduce_op="mean")
            for key, value in values.items()
        }
        self.log_safely(lambda: self._log(trainer, pl_module, logged))

    def _taken(self, penalty: Auxiliary, device: torch.device) -> dict[str, Tensor]:
        """What was seen since the last step; NaN where there is nothing, or it cannot be told on this rank."""
        nan = torch.full((), torch.nan, device=device)
        try:
            values = penalty.take()
            return {key: values.get(key, nan).to(device, torch.float32) for key in self.logged_keys()}
        except Exception as error:
            self.say(
                f"the penalty of a step is not known ({type(error).__name__}: {error}); it goes on to work",
                key="a penalty is not known",
            )
            return dict.fromkeys(self.logged_keys(), nan)

    def _log(self, trainer: Trainer, pl_module: LightningModule, logged: Mapping[str, Tensor]) -> None:
        pl_module.log_dict(dict(logged), on_step=True, on_epoch=False)
        self.account.draw(logging_step(trainer), {key: float(value) for key, value in logged.items()})

    @abstractmethod
    def logged_keys(self) -> Sequence[str]:
        """Names of what is logged."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the attention interface as it was."""
        super().teardown(trainer, pl_module, stage)
        self._penalty = None


def move_prior(batch: Any, key: str) -> Tensor | None:
    """Take a tensor out of a batch.

    Raises:
        ValueError: the batch is no dictionary.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"expected a batch that is a dictionary with the prior under {key!r}, got {type(batch).__name__}"
        )
    if key not in batch:
        return None
    if not hasattr(batch, "pop"):
        raise ValueError(f"expected a batch that {key!r} can be taken out of, got {type(batch).__name__}")
    prior = batch.pop(key)
    return prior[:, None] if prior.dim() == 3 else prior
