"""Callback: the LocAteR penalty on QK-eigenspectra, with no change to the loss."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_qk.callbacks._trainer import check_lightning, is_logged_step, logging_step
from lightning_qk.functional.spectrum import Support, qk_moments, support_size
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import head_projections
from lightning_qk.logging.history import History, RunRecord
from lightning_qk.logging.loggers import describe_config
from lightning_qk.regularizers.locater import Form, check_form, locater_penalty, select_layers

Schedule = Literal["constant", "linear"]


class LocAteR(Callback):
    r"""Regularizes the QK-eigenspectra of a model while it trains: localized attention regularization.

    After Bao et al., ICML 2024 (arXiv 2402.02098): a small variance of the eigenvalues of ``W_QK`` with a mean
    that is not zero localizes attention. The callback adds the gradient of
    ``weight * locater_penalty(model)`` to the gradients right before the optimizer steps, once per step: after
    gradient accumulation, the reduction over ranks and fp16 unscaling, before clipping. The gradient equals
    that of the penalty as a term of the loss. Logged losses do not contain it.

    Logged keys: ``locater/penalty``, the penalty before it is weighted, and ``locater/weight``.

    Args:
        weight: coefficient of the penalty. Its scale depends on the model (0.6 for a fresh GPT-2, 30 for a
            pretrained MiniLM): start where ``weight`` times the logged ``locater/penalty`` is some percent of
            the loss.
        form: ``"variance"`` or ``"target"``, see :func:`~lightning_qk.locater_penalty`.
        support: ``"model"`` or ``"head"``, see :func:`~lightning_qk.functional.qk_moments`.
        target: for ``form="target"`` the mean that eigenvalues are held at; None holds each head at its mean at
            the start of training (kept in checkpoints).
        nu: for ``form="target"``, how strongly the mean is held, against 1 on the scale.
        schedule: ``"constant"``, or ``"linear"``: grows from 0 to ``weight`` over ``warmup_steps``.
        warmup_steps: optimizer steps of the linear warm-up.
        modules: glob pattern or patterns on qualified names of attention layers, such as ``"*.encoder.*"``;
            None for all.
        cross_attention: also regularize cross-attention between spaces of one width.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: an argument is out of range, patterns match no layer, or the module holds no transformer
            whose attention can be read.
    """

    def __init__(
        self,
        weight: float,
        *,
        form: Form = "variance",
        support: Support = "model",
        target: float | None = None,
        nu: float = 1.0,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        modules: str | Sequence[str] | None = None,
        cross_attention: bool = False,
    ) -> None:
        for name, value in (("weight", weight), ("nu", nu)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"expected a finite {name} of at least 0, got {value}: pass 0 to switch it off"
                )
        if target is not None and not math.isfinite(target):
            raise ValueError(f"expected a finite target, got {target}")
        check_form(form, 0.0 if form == "target" else target)
        support_size(torch.empty(1, 1), support)
        if schedule not in get_args(Schedule):
            raise ValueError(f"expected schedule to be 'constant' or 'linear', got {schedule!r}")
        if warmup_steps < 0 or (schedule == "linear") != (warmup_steps > 0):
            raise ValueError(
                f"expected warmup_steps above 0 with schedule='linear' and 0 with 'constant', got {warmup_steps} "
                f"with {schedule!r}: set both"
            )
        self.weight = float(weight)
        self.form: Form = form
        self.support: Support = support
        self.target = target
        self.nu = float(nu)
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self.modules = modules if modules is None or isinstance(modules, str) else list(modules)
        self.cross_attention = cross_attention
        self.history = History(["model"], [1])
        self._start_means: dict[str, Tensor] | None = None
        self._newest: Tensor | None = None
        self._is_due = False
        self._warned = False
        self._warned_idle = False

    @property
    def state_key(self) -> str:
        """Several of these can be in one trainer, on other modules."""
        return self._generate_state_key(form=self.form, modules=self.modules)

    def current_weight(self, step: int) -> float:
        """The coefficient at an optimizer step, counted from 0."""
        if self.schedule == "linear":
            return self.weight * min(1.0, step / self.warmup_steps)
        return self.weight

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer of another package, whose hooks and classes differ."""
        check_lightning(trainer, type(self).__name__)
        if stage == "fit":
            settings = ("weight", "form", "support", "target", "nu", "schedule", "warmup_steps", "modules")
            describe_config(trainer, {"LocAteR": {name: getattr(self, name) for name in settings}})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; raise here, before any work, where there are none."""
        with torch.no_grad():
            self._layers(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the heads' means at the start, unless a checkpoint brought them."""
        if self.form == "target" and self.target is None and self._start_means is None:
            with torch.no_grad():
                self._start_means = {
                    name: qk_moments(head.query, head.key, support=self.support)["eig_mean"].cpu()
                    for name, head in self._layers(pl_module).items()
                }

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find out whether the step is logged."""
        self._is_due = is_logged_step(trainer, None)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient to the parameters that this optimizer is about to change."""
        weight = self.current_weight(trainer.global_step)
        with torch.enable_grad():
            penalty = locater_penalty(
                self._layers(pl_module),
                form=self.form,
                support=self.support,
                target=self._aim(),
                nu=self.nu,
                cross_attention=self.cross_attention,
            )
            reached = weight == 0 or self._add_gradient(weight * penalty, optimizer)
        # With several optimizers, each steps only its share of the layers.
        if not reached and not self._warned_idle and len(trainer.optimizers) == 1:
            self._warned_idle = True
            rank_zero_warn(
                "LocAteR: expected query or key weights that the optimizer trains, got none: they are frozen or "
                "not among its parameters, so that the penalty changes nothing; unfreeze them or drop LocAteR"
            )
        self._newest = penalty.detach()
        pl_module.log("locater/penalty", self._newest, on_step=True, on_epoch=False)
        pl_module.log("locater/weight", weight, on_step=True, on_epoch=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the penalty of logged steps, and say so once when it is not finite."""
        value = self._newest
        if not self._is_due or value is None:
            return
        self._newest = None
        step = logging_step(trainer)
        self.history.append(step, {"locater/penalty": value.reshape(1)})
        if not self._warned and not torch.isfinite(value):
            self._warned = True
            rank_zero_warn(
                f"LocAteR: the penalty is {value.item()} at step {step}: a query or key weight is not finite "
                "(QKSpectrumMonitor names the head); training goes on"
            )

    def state_dict(self) -> dict[str, Any]:
        """The heads' means at the start and the penalty's history."""
        return {"start_means": self._start_means, "history": self.history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the means that the first run started from."""
        self._start_means = state_dict["start_means"]
        self.history = History.from_state_dict(state_dict["history"])

    def contribute(self, record: RunRecord) -> None:
        """Add the penalty's curve to a run's record."""
        if len(self.history):
            curve = self.history.series("locater/penalty")[:, 0].tolist()
            name = "locater/penalty"
            if name in record.scalars:
                name = f"{name} {self.modules}"
            record.scalars[name] = (list(self.history.steps), curve)

    def _layers(self, pl_module: LightningModule) -> dict[str, HeadProjections]:
        return select_layers(
            head_projections(pl_module), modules=self.modules, cross_attention=self.cross_attention
        )

    def _aim(self) -> float | dict[str, Tensor] | None:
        return self._start_means if self.form == "target" and self.target is None else self.target

    def _add_gradient(self, loss: Tensor, optimizer: Optimizer) -> bool:
        """Add the gradient of a loss; whether there was a parameter to add it to."""
        # Only what this optimizer steps: with several optimizers every parameter still gets it once.
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        if not loss.requires_grad or not parameters:
            return False
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        return any(gradient is not None for gradient in gradients)
