"""Callback: the LocAteR penalty on QK-eigenspectra, with no change to the loss."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._guarded import MOST_FAILURES
from lightning_qk.callbacks._layers import Patterns, training_layers
from lightning_qk.callbacks._output import inform
from lightning_qk.callbacks._ranks import (
    FailedTogether,
    agree,
    finish_with,
    is_distributed,
    reason_of,
)
from lightning_qk.callbacks._trainer import (
    DeepSpeedStrategy,
    logging_step,
    loss_scale,
    projection_reader,
    say,
)
from lightning_qk.callbacks.interventions._base import Intervention
from lightning_qk.callbacks.interventions._locater_step import (
    NOTHING,
    HeldMeans,
    Schedule,
    Sigma,
    Step,
    check_options,
    filled,
    label_among,
)
from lightning_qk.callbacks.interventions._share import GradientShare, parse_weight
from lightning_qk.callbacks.interventions._step_inputs import StepInputs
from lightning_qk.functional.spectrum import Support
from lightning_qk.interventions.layers import matching_unread
from lightning_qk.record.history import History, RunRecord
from lightning_qk.regularizers.locater import LocaterPenalty
from lightning_qk.regularizers.settings import LIMIT, Form, Settings, left_out


class LocAteR(Intervention):
    r"""Regularizes the QK-eigenspectra of a model while it trains: localized attention regularization.

    After Bao et al., ICML 2024 (arXiv 2402.02098): a small variance of the eigenvalues of ``W_QK`` with a mean
    that is not zero localizes attention.

    ``LocAteR()`` is the limit form, which needs no choice: it adds nothing while the standard deviation σ of a
    head's logits between independent tokens is below 8, as it is in all but one of the 342 heads of two pretrained
    models, and ``ln(σ/8)²`` above. So a training whose logits stay small is the same with it as without. Its
    weight, 1, is in nats of the loss for logits that are e times as large as the limit. Logits are those of the
    queries and keys that the layer makes, with biases and norms. ``LocAteR(weight)`` is the variance form.

    The callback adds the gradient of
    ``weight * locater_penalty(model)`` to the gradients right before the optimizer steps, once per step: after
    gradient accumulation, the reduction over ranks and fp16 unscaling, before clipping. The gradient equals
    that of the penalty as a term of the loss. Logged losses do not contain it, and neither does the loss that
    a closure returns to an optimizer with a line search.

    Weights may be sharded (FSDP2, tensor parallel, FSDP): one layer at a time is gathered and its gradient
    put on the local shard. In one process nothing waits for the device; several agree once a step, before any
    gradient is added, and wait for it then. Under manual
    optimization the optimizers of ``self.optimizers()`` have to step: Lightning does not see the steps of
    others.

    With ``sigma="tokens"`` the penalty is that of the token-aware spectrum, of ``s Σ^½ W_QK Σ^½`` with the softmax
    scale s and the covariance Σ of what enters each layer: in units of logits, whatever the model's width, norms
    and initialization. Σ is that of ``tokens`` tokens of the step itself, from all its micro-batches and processes
    (first tokens of sequences and padding left out), held constant, so that every process has the same gradient.
    Of a rotary head it is the form at distance 0, as of the weights; of norms of queries and keys it has the gains
    and not the division, but in the limit form. Layers whose inputs cannot be seen are named once and have no
    penalty.

    Layers of networks that do not train (teachers, frozen references, averaged copies) have no penalty. A layer
    that cannot be read is left out, which is said; once training has begun nothing is raised: where the penalty
    cannot be computed any more it is left off, which is said too. What fails on one of several processes costs
    all of them the penalty of that step, and after three steps in a row it is left off.

    Logged keys: ``locater/penalty``, the penalty before it is weighted, and ``locater/weight``. Where one
    trainer has several of these callbacks, ``locater/<name>/penalty`` and ``locater/<name>/weight``.

    Args:
        weight: None: 1, in the limit form. ``"10%"``: a share, in the other forms. Over the first ten steps the
            norm of the penalty's gradient on query and key weights is that share of the norm of the loss's; the
            coefficient that this takes (their median) is logged and kept. Or a number, the coefficient itself,
            whose scale depends on the model in the variance and target forms; ``examples/paper`` has the sweeps.
        sigma: ``"identity"``: of the weights alone. ``"tokens"``: over the tokens of each step. None: the former,
            but in the limit form, which is of tokens.
        form: ``"variance"``, ``"target"`` or ``"limit"``, see :func:`~lightning_qk.locater_penalty`. None: the
            limit form without a weight, else the variance form.
        support: ``"model"`` or ``"head"``, see :func:`~lightning_qk.functional.qk_moments`.
        target: for ``form="target"`` the mean that eigenvalues are held at; None holds each head at its mean at
            the start of training (kept in checkpoints).
        nu: for ``form="target"``, how strongly the mean is held, against 1 on the scale.
        tokens: for ``sigma="tokens"``, how many to take of each step.
        schedule: ``"constant"``, or ``"linear"``: grows from 0 to ``weight`` over ``warmup_steps``.
        warmup_steps: optimizer steps of the linear warm-up.
        modules: glob pattern or patterns on qualified names of attention layers, such as ``"*.encoder.*"``;
            None for all.
        cross_attention: also regularize cross-attention between spaces of one width.
        name: tells several of these callbacks in one trainer apart; None numbers them from 1.
        limit: for ``form="limit"``, the standard deviation of logits up to which there is no penalty.

    Raises:
        TypeError: the trainer is none of Lightning's.
        ValueError: at the start alone: an argument is out of range, patterns match no layer, the module holds no
            self-attention whose weights can be read, two callbacks have one name, or DeepSpeed holds
            the gradients.
    """

    live: ClassVar[tuple[str, ...]] = ("_penalty", "_newest", "_inputs", "moments", "inputs")

    def __init__(
        self,
        weight: float | str | None = None,
        *,
        sigma: Sigma | None = None,
        form: Form | None = None,
        support: Support = "model",
        target: float | None = None,
        nu: float = 1.0,
        tokens: int = 512,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        modules: Patterns = None,
        cross_attention: bool = False,
        name: str | None = None,
        limit: float = LIMIT,
    ) -> None:
        weight, form, sigma = filled(weight, form, sigma)
        coefficient, share = parse_weight(weight)
        check_options(
            sigma, form, support, target, nu, tokens, schedule, warmup_steps, cross_attention, limit, share
        )
        self.limit = float(limit)
        self.weight: float | str = coefficient if share is None else f"{100 * share:g}%"
        self._asked_share = share
        self.sigma: Sigma = sigma
        self.tokens = tokens
        self.form: Form = form
        self.support: Support = support
        self.target = target
        self.nu = float(nu)
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self.cross_attention = cross_attention
        super().__init__(modules, name)

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self.history = History(["model"], [1])
        self._held = HeldMeans(self.form, self.target)
        self._left: dict[str, str] = {}
        self._penalty: LocaterPenalty | None = None
        self._inputs: StepInputs | None = None
        self.moments: dict[str, Tensor] | None = None
        self.inputs: dict[str, tuple[Tensor, Tensor]] | None = None
        self._prefix = "locater"
        self._batches = 0
        self._stepped = False
        self._newest: Tensor | None = None
        self._logged_weight = math.nan
        self._warned = False
        self._warned_idle = False
        self._is_off = False
        self.share = None if self._asked_share is None else GradientShare(self._asked_share)
        # How many steps in a row had no penalty, the same on every process; and what is to be said at the next.
        self._lost = 0
        self._unsaid: Exception | None = None
        self._trained: tuple[int, ...] | None = None

    @property
    def state_key(self) -> str:
        """Several of these can be in one trainer, on other modules."""
        named = {} if self.name is None else {"name": self.name}
        return self._generate_state_key(form=self.form, modules=self.modules, **named)

    def current_weight(self, step: int) -> float:
        """The coefficient at an optimizer step, counted from 0; of a share as far as it was measured."""
        weight = float(self.weight) if self.share is None else self.share.weight
        return weight * min(1.0, step / self.warmup_steps) if self.schedule == "linear" else weight

    def check_strategy(self, trainer: Trainer) -> None:
        """Refuse DeepSpeed, and one name twice."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "expected a strategy that leaves gradients in the parameters, got DeepSpeed, which keeps them in "
                "buffers of its own: add weight * locater_penalty(self) to the loss (ZeRO stage 1 or 2), or use "
                "FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)"
            )
        label = self._label(trainer)
        self._prefix = "locater" if label is None else f"locater/{label}"

    def title(self, trainer: Trainer) -> str:
        """Its name in the run's config."""
        label = self._label(trainer)
        return "LocAteR" if label is None else f"LocAteR {label}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; raise here, before any work, where there are none."""
        reader = projection_reader(trainer, pl_module)
        by_tokens, limited = self.sigma == "tokens", self.form == "limit"
        if self.share is not None and any(plan.is_flat for plan in reader.layers.values()):
            raise ValueError(
                f"expected a number for weight where FSDP flattens the weights, got {self.weight}: pass a number, "
                "or use FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)"
            )
        penalty = LocaterPenalty(
            reader,
            modules=self.modules,
            cross_attention=self.cross_attention,
            by_tokens=by_tokens,
            limited=limited,
        )
        for name, reason in matching_unread(reader, self.modules).items():
            self.say(f"{name} is left out: {reason}")
        reasons = {
            name: left_out(plan, self.cross_attention, by_tokens, limited)
            for name, plan in reader.layers.items()
        }
        others = [name for name, reason in reasons.items() if reason]
        if others and self.modules is None:
            inform(f"LocAteR: {shorten(others)} left out: {others[0]} is one {reasons[others[0]]}")
        self._penalty = penalty
        self._trained = None
        self._choose(trainer, pl_module, penalty)
        if by_tokens:
            self._listen(trainer, pl_module, penalty)
        self._batches, self._stepped, self._is_due = 0, False, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the heads' means at the start, unless a checkpoint brought them; those of tokens come later."""
        if self._penalty is not None and self.sigma == "identity":
            self._held.take(self._penalty, self.support, None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find out whether the step is logged."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batches += 1
        self._newest = None
        if self._inputs is not None:
            self._inputs.begin_batch()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient to the parameters that this optimizer is about to change."""
        penalty = self._penalty
        if penalty is None or self._is_off:
            return
        self._stepped = True
        self._newest = None
        # A failure after the last agreement is shared at this one: nothing that one process alone knows decides.
        error, self._unsaid = self._unsaid, None
        has_agreed = False

        def finish(own: Exception | None) -> None:
            nonlocal has_agreed
            has_agreed = True
            self.agreements += 1
            agree(trainer, error or own)

        if self._inputs is not None:
            self.inputs, own = self._inputs.pool()
            error = error or own
        try:
            step = self._prepare(trainer, pl_module, optimizer, penalty)
        except Exception as own:
            # Layers are gathered all the same, as the other processes do.
            error, step = error or own, NOTHING
        try:
            try:
                # Weights would come to differ in silence where one process had the gradient and another had not.
                weigh = self._weigher(trainer, optimizer, pl_module)
                if step.weight == 0 and weigh is None:
                    value = finish_with(finish, lambda: penalty.value(step.settings))
                    reached = True
                else:
                    value, reached = penalty.add_gradient(
                        step.settings, 1.0 if weigh else step.factor, step.parameters, finish, weigh
                    )
            except Exception as own:
                if not has_agreed:
                    finish(own)
                raise
        except Exception as own:
            if isinstance(own, FailedTogether) or not is_distributed(trainer):
                self._lose(trainer, own)
            else:
                self._unsaid = own
            return
        self._lost = 0
        weight = step.weight if weigh is None else self.current_weight(logging_step(trainer))
        self.log_safely(lambda: self._log(trainer, pl_module, value, weight, reached))

    def _weigher(
        self, trainer: Trainer, optimizer: Optimizer, pl_module: LightningModule
    ) -> Callable[[Tensor], float | Tensor] | None:
        """What measures a share at this step and gives the factor; None where nothing is to be measured."""
        share = self.share
        if share is None or share.is_known:
            return None

        def weigh(squares: Tensor) -> float | Tensor:
            scale = loss_scale(trainer, optimizer)
            share.see(trainer, squares.to(pl_module.device), scale)
            if share.is_known:
                inform(
                    f"LocAteR: weight={share.weight:.4g} from here on, for {self.weight} of the norm of the "
                    f"loss's gradient on query and key weights (median of {len(share.ratios)} steps)"
                )
            weight = self.current_weight(logging_step(trainer))
            return weight if scale is None else weight * scale

        return weigh

    def agrees_in(self, hook: str, *, has_stepped: bool) -> bool:
        """True before each step, while there is a penalty."""
        return hook == "on_before_optimizer_step" and self._penalty is not None and not self._is_off

    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, penalty: LocaterPenalty
    ) -> Step:
        """Choose the layers as the model is now, and the means that they are held at."""
        if penalty.refresh():
            self._trained = None
        self._choose(trainer, pl_module, penalty)
        if self._inputs is not None:
            if not set(penalty.names) <= set(self._inputs.widths):
                self._listen(trainer, pl_module, penalty)
                self._trained = None  # those that joined have tokens from the next step on
            penalty.keep_only([name for name in penalty.names if name in (self.inputs or {})])
            if self.form != "limit":
                self.moments = self._inputs.moments(self.inputs or {})
        self._held.take(penalty, self.support, self.moments)
        weight = self.current_weight(logging_step(trainer))
        scale = loss_scale(trainer, optimizer)
        # With several optimizers every parameter still gets it once: each its own.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        settings = Settings(
            self.form,
            self.support,
            self._held.aims(penalty, pl_module.device),
            self.nu,
            self.moments,
            self.limit,
            self.inputs if self.form == "limit" else None,
        )
        return Step(settings, weight, weight if scale is None else weight * scale, parameters)

    def _lose(self, trainer: Trainer, error: Exception) -> None:
        """A step without its penalty, on all processes; for good where there is one, or after a few in a row."""
        self._lost += 1
        reason = reason_of(error)
        if not is_distributed(trainer) or self._lost >= MOST_FAILURES:
            self._is_off = True
            self.say(f"the penalty is left off from here on ({reason}); training goes on")
        else:
            self.say(
                f"a step has no penalty, on any process ({reason}); it is tried again, and training goes on",
                key="a step has no penalty",
            )

    def leave_alone(self, reasons: Mapping[str, str]) -> None:
        """Penalize layers no more: qualified name → why, as a clause about the layer."""
        if self._penalty is not None:
            for name in [name for name in self._penalty.names if name in reasons]:
                self.say(f"{name} is not penalized any more: {reasons[name]}; training goes on")
        self._left |= dict(reasons)
        self._trained = None

    def _choose(self, trainer: Trainer, pl_module: LightningModule, penalty: LocaterPenalty) -> None:
        """Keep the layers that can be penalized and belong to networks that train now."""
        trained = tuple(
            id(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        )
        if trained == self._trained:
            return
        self._trained = trained
        penalty.keep_only([name for name in penalty.reader.layers if name not in self._left])
        names = training_layers(trainer, pl_module, penalty.names)
        penalty.keep_only([name for name in penalty.names if name in names])
        if not penalty.names:
            raise ValueError("no layer is left that can be penalized")

    def _listen(self, trainer: Trainer, pl_module: LightningModule, penalty: LocaterPenalty) -> None:
        """Sample what enters the layers, from the next forward on."""
        if self._inputs is not None:
            self._inputs.remove()
        widths = {name: penalty.reader.layers[name].width[0] for name in penalty.names}
        self._inputs = StepInputs(trainer, pl_module, widths, self.tokens)
        self._inputs.install()

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, value: Tensor, weight: float, reached: bool
    ) -> None:
        self._newest = value
        pl_module.log(f"{self._prefix}/penalty", value, on_step=True, on_epoch=False)
        # Lightning keeps it for steps that say nothing new.
        if self._is_due or weight != self._logged_weight:
            self._logged_weight = weight
            # A tensor that is filled on the device: Lightning would copy a number there, and wait.
            logged_weight = torch.full_like(value, weight)
            pl_module.log(f"{self._prefix}/weight", logged_weight, on_step=True, on_epoch=False)
        # With several optimizers, each steps only its share of the layers.
        if not reached and not self._warned_idle and len(trainer.optimizers) == 1:
            self._warned_idle = True
            say(
                "LocAteR: expected query or key weights that the optimizer trains, got none: they are frozen or "
                "not among its parameters, so that the penalty changes nothing; unfreeze them or drop LocAteR"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the penalty of logged steps, and say so once when it is not finite."""
        if self._inputs is not None:
            self._inputs.end_batch()
            self._tell_unseen(self._inputs.unseen())
        value = self._newest
        if not self._is_due or value is None:
            return
        self._is_due = False
        self.log_safely(lambda: self._remember(logging_step(trainer), value))

    def _tell_unseen(self, reasons: Mapping[str, str]) -> None:
        for name, why in reasons.items():
            self.say(f"{name} has no penalty: what enters it is not known, since {why}", key=f"unseen {why}")

    def _remember(self, step: int, value: Tensor) -> None:
        self.history.append(step, {"locater/penalty": value.reshape(1)})
        if not self._warned and not torch.isfinite(value):
            self._warned = True
            say(
                f"LocAteR: the penalty is {value.item()} at step {step}: a query or key weight is not finite "
                "(QKSpectrumMonitor names the head); training goes on"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where Lightning saw batches but no optimizer step, or no forward of a layer."""
        if self._inputs is not None:
            self._tell_unseen(self._inputs.unseen(at_end=True))
        if self._batches and not self._stepped and not trainer.global_step:
            say(
                "LocAteR: expected optimizer steps that Lightning sees, got none, so that the penalty changed "
                "nothing: step the optimizers of self.optimizers(), not others"
            )

    def kept(self) -> dict[str, Any]:
        """The heads' means at the start and the penalty's history."""
        kept = {**super().kept(), "start_means": self._held.start, "history": self.history.state_dict()}
        return kept if self.share is None else {**kept, "share": self.share.state_dict()}

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """Hold the means that the first run started from."""
        super().go_on(kept)
        self._held.start = kept["start_means"] or {}
        self.history = History.from_state_dict(kept["history"])
        if self.share is not None:
            self.share.load_state_dict(kept.get("share", {}))

    def release(self) -> None:
        """Drop all references to the model."""
        if self._inputs is not None:
            self._inputs.remove()
        self._inputs, self.moments, self.inputs = None, None, None
        self._penalty, self._newest = None, None
        self._held.release()

    def contribute(self, record: RunRecord) -> None:
        """Add the penalty's curve to a run's record."""
        super().contribute(record)
        if len(self.history):
            curve = self.history.series("locater/penalty")[:, 0].tolist()
            name = f"{self._prefix}/penalty"
            record.scalars[name] = (list(self.history.steps), curve)

    def _label(self, trainer: Trainer) -> str | None:
        """What tells this callback from others of its kind in the trainer; None where it is alone."""
        others = [one for one in trainer.callbacks if isinstance(one, LocAteR)]  # type: ignore[attr-defined]
        return label_among(self, others)
