"""Callback: QK-Clip, which scales query and key weights down where logits have grown too large."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk._deprecated import OldName, old_spellings
from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._layers import Patterns
from lightning_qk.callbacks._ranks import all_or_none, failed_anywhere, is_distributed, reason_of
from lightning_qk.callbacks._trainer import describe_error, logging_step, projection_reader, refuse_deepspeed
from lightning_qk.callbacks.interventions._base import Intervention, When, check_when, refuse_frozen
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.max_logits import max_logits
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.heads.sites import attention_sites
from lightning_qk.interventions.head_scaler import HeadScaler
from lightning_qk.interventions.layers import matching_unread, no_products
from lightning_qk.interventions.qk_clip import (
    apply_clip,
    check_clip,
    clip_editors,
    clip_factors,
    clippable_layers,
)
from lightning_qk.loggers.loggers import log_scalars
from lightning_qk.metrics.collector import AttentionCollector, Maxima


class QKClip(Intervention):
    r"""Holds the attention logits of every head at ``cap``: the clip of Kimi K2 (arXiv 2507.20534 [V]).

    After each optimizer step, with S the largest ``scaling q·k`` of a head since the last step, over all
    micro-batches, ranks and rows that are no padding, ``γ = min(1, cap/S)`` scales the head's query weights and
    biases by γ^α and its key's by γ^(1−α). Calls within transformers' ``generate``, and those of self-attention
    with a cache of keys, do not count. Heads that share a key take the smallest γ of their group, all of
    them. See :func:`~lightning_qk.clip_qk` for what is scaled and what is not. Gradients, optimizers' states and
    the forward pass are untouched; a step whose logits stay below ``cap`` changes nothing at all.

    Every step is watched. The maxima are bounded first, by ``|scaling| max‖q‖ max‖k‖``; products are taken only
    of heads whose bound is above ``cap``, and of all heads on logged steps. Weights may be sharded by FSDP2 or
    tensor parallel; two small collective calls a step find the maxima of all ranks, a step that clips takes one
    more, and the processor waits for the device once a step, and once a layer for its bounds.

    Logged keys, at the trainer's ``log_every_n_steps``:

    - ``clip/gamma/min``: the smallest γ since the last logged step, 1 where nothing was clipped;
    - ``clip/clipped_heads``: how many query heads were clipped since the last logged step;
    - ``clip/max_logit/max``: the logged step's largest logit before its clip;
    - ``clip/layer_03/gamma`` and ``clip/layer_03/max_logit`` with ``per_layer=True``: the same of each layer;
    - ``clip/layer_03/head_05/gamma`` and ``…/max_logit`` with ``per_head=True``.

    With a name, ``clip/<name>/…``.

    Args:
        cap: the largest logit that is left as it is.
        alpha: share of γ that the queries take.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        when: ``"always"`` refuses layers that are frozen at the start; ``"unfrozen"`` waits, and clips a layer at
            the steps at which its query and key weights train.
        per_layer: also log two scalars a layer.
        per_head: also log two scalars a head.
        name: tells several of these callbacks in one trainer apart.

    Attributes:
        gammas: qualified layer name → γ of each key head at the last step, ``(kv_heads,)``.
        maxima: qualified layer name → largest logit of each query head before the last clip, ``(heads,)``;
            one that is at most ``cap`` may be a bound, on steps that are not logged.
        left: qualified layer name → why it is not clipped any more.
        event_log: curves and the first clip of every layer, for the run's report.

    Raises:
        TypeError: the trainer is not a Trainer of Lightning.
        ValueError: at the start of the fit alone: an argument is out of range, patterns match no layer, the
            weights of a layer are frozen or no plain parameters of its own, a norm of queries or keys takes
            every scale out again, a layer adds positions to logits of which it takes the softmax itself, or
            DeepSpeed holds copies of the weights. A layer with unknown logits, or with weights that another
            callback brings into another form (by pruning, say), is left as it is from then on, on all
            processes, which is said once.
    """

    group = "clip"
    tau = OldName("cap")

    live: ClassVar[tuple[str, ...]] = ("_reading", "_editors")

    @old_spellings(tau="cap")
    def __init__(
        self,
        cap: float = 100.0,
        *,
        alpha: float = 0.5,
        modules: Patterns = None,
        when: When = "always",
        per_layer: bool = False,
        per_head: bool = False,
        name: str | None = None,
    ) -> None:
        check_clip(cap, alpha)
        check_when(when)
        self.cap = float(cap)
        self.alpha = float(alpha)
        self.when: When = when
        self.per_layer = per_layer
        self.per_head = per_head
        super().__init__(modules, name)

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self.gammas: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.left: dict[str, str] = {}
        self._reading: _Reading | None = None
        # Found at the start: what processes reduce has one form for the whole fit, whatever becomes of a layer.
        self._heads: dict[str, int] = {}
        # Of the layers that are still clipped.
        self._editors: dict[str, HeadScaler] = {}
        self._labels: dict[str, str] = {}
        # Of the calls since the last step.
        # Smallest γ of each query head since the last logged step.
        self._smallest: dict[str, Tensor] = {}
        # Why layers are to be left alone, found on this process since the last step.
        self._doubts: dict[str, str] = {}
        self._steps = 0
        self._reported: set[str] = set()

    def kept(self) -> dict[str, Any]:
        """What was done so far, for the report, and which layers are left alone."""
        return {
            **super().kept(),
            "told": sorted(self._reported),
            "left": dict(self.left),
            "smallest": {name: gamma.cpu() for name, gamma in self._smallest.items()},
            "steps": self._steps,
        }

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's run."""
        super().go_on(kept)
        self._reported = set(kept.get("told", ()))
        self._smallest = dict(kept.get("smallest", {}))
        self._steps = int(kept.get("steps", 0))
        self._doubts |= kept.get("left", {})

    def check_strategy(self, trainer: Trainer) -> None:
        """Refuse DeepSpeed."""
        refuse_deepspeed(trainer, type(self).__name__)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and hook their attention; raise where one cannot be clipped exactly."""
        reader = projection_reader(trainer, pl_module)
        self._is_due = False
        self._steps_before = trainer.global_step
        editors = clippable_layers(reader, self.modules, trained=False)
        refuse_frozen([name for name, editor in editors.items() if editor.is_frozen], self.when)
        configs = {site.name: site.config for site in attention_sites(pl_module)}
        for name in editors:
            reason = no_products(reader.layers[name], configs.get(name))
            if reason is not None:
                raise ValueError(
                    f"expected attention with known logits, got {name} ({reason}): leave such a layer out "
                    "with QKClip(modules=…)"
                )
        for name, reason in matching_unread(reader, self.modules).items():
            self.say(f"{name} is not clipped: {reason}")
        self._heads = {name: editor.heads for name, editor in editors.items()}
        self._editors = editors
        self._labels = reader.labels
        self._listen(pl_module, reader)

    def leave_alone(self, reasons: Mapping[str, str]) -> None:
        """Clip layers no more, on all processes, from the next step on.

        Args:
            reasons: qualified name → why, as a clause about the layer.
        """
        self._doubts |= {name: reason for name, reason in reasons.items() if name in self._heads}

    def _listen(self, pl_module: LightningModule, reader: ProjectionReader) -> None:
        """Hook the attention of the layers that are still clipped."""
        self.release()
        collector = AttentionCollector(
            pl_module,
            partial(self._measure, reader),
            modules={name: reader.layers[name].module for name in self._editors},
            layers=reader.layers,
            cached_calls=False,
        )
        self._reading = _Reading(reader, collector)
        collector.install()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._reading is not None:
            self._reading.collector.enabled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Clip once the optimizer has stepped."""
        reading = self._reading
        if reading is None:
            return
        reading.collector.enabled = False
        if not self.has_stepped(trainer):
            return
        self._steps += 1
        self._clip(trainer, pl_module, reading)
        if self._is_due:
            self._is_due = False
            self.log_safely(lambda: self._publish(trainer, pl_module))

    def agrees_in(self, hook: str, *, has_stepped: bool) -> bool:
        """True after each step, while there are hooks."""
        return hook == "on_train_batch_end" and has_stepped and self._reading is not None

    def release(self) -> None:
        """Leave the attention interface as it was."""
        if self._reading is not None:
            self._reading.collector.remove()
            self._reading = None

    def _measure(self, reader: ProjectionReader, name: str, call: CapturedCall) -> Maxima | None:
        if self._editors[name].is_frozen:
            return None
        products = call.products(position=reader.layers[name].position)
        return Maxima(max_logits(products, above=None if self._is_due else self.cap)[None, None])

    def _clip(self, trainer: Trainer, pl_module: LightningModule, reading: "_Reading") -> None:
        """Find the maxima of all ranks and scale the weights; collective calls, the same on every rank."""
        self.agreements += 1
        try:
            flat = all_or_none(
                trainer, lambda: self._own_maxima(pl_module, reading), facts=lambda own: str(len(own))
            )
        except Exception as error:
            reason = reason_of(error)
            self.say(f"a step was not clipped ({reason}); training goes on", key="a step was not clipped")
            return
        finally:
            reading.collector.pool.reset()
        if not len(flat):
            return
        largest, waiting = self._of_all_ranks(trainer, flat)
        self.maxima = {name: found for name, found in largest.items() if name in self._editors}
        self.gammas = {}
        step = logging_step(trainer)
        for name, editor in self._editors.items():
            gamma = clip_factors(self.maxima[name], editor.kv_heads, self.cap)
            self.gammas[name] = torch.ones_like(gamma) if name in waiting else gamma
        # Every rank clips the same heads, so that all ask each other, or none.
        if any(bool((gamma < 1).any()) for gamma in self.gammas.values()):
            self._apply(trainer)
        self.log_safely(lambda: self._account_for(waiting, step))

    def _apply(self, trainer: Trainer) -> None:
        """Scale the weights, on all ranks or on none; collective calls."""
        before: dict[str, list[tuple[Tensor, Tensor]]] = {}
        doubts: dict[str, str] = {}
        for name, gamma in self.gammas.items():
            editor = self._editors[name]
            if bool((gamma == 1).all()):
                continue
            try:
                if is_distributed(trainer):
                    own = [parameter.detach() for parameter in editor.parameters()]
                    before[name] = [(parameter, parameter.clone()) for parameter in own]
                apply_clip(editor, gamma, self.alpha)
            except Exception as error:
                doubts[name] = f"its weights could not be scaled ({describe_error(error)})"
        for name, reason in failed_anywhere(trainer, list(self._heads), doubts).items():
            for parameter, kept in before.get(name, ()):
                parameter.copy_(kept)
            # From now on: every rank knows it.
            self._doubts.setdefault(name, reason)
            self._leave(name)
            self.gammas.pop(name, None)
            self.maxima.pop(name, None)

    def _account_for(self, waiting: set[str], step: int) -> None:
        """Remember what was done."""
        for name, gamma in self.gammas.items():
            editor, largest = self._editors[name], self.maxima[name]
            if bool(largest.isposinf().any()):
                self.say(
                    f"the logits of {name} are not finite at step {step}, so that these heads are not clipped; "
                    "look for an overflow in half precision",
                    key=f"not finite: {name}",
                    kind="non-finite",
                    where=self._labels[name],
                )
            self._tell(name, gamma, largest)
            by_head = gamma.repeat_interleave(editor.heads // editor.kv_heads)
            before = self._smallest.get(name)
            self._smallest[name] = by_head if before is None else torch.minimum(before, by_head)
        if self._steps == 1:
            self._name_uncalled(waiting)

    def _doubt(self, pl_module: LightningModule, reading: "_Reading") -> None:
        """Find the layers that cannot be clipped any more, as far as this process can tell."""
        reader, collector = reading
        for name, reason in collector.left_out.items():
            self._doubts.setdefault(name, reason)
        try:
            if reader.refresh():
                self._find_again(reader)
                self._listen(pl_module, reader)
        except Exception as error:
            reason = f"the model's attention cannot be found again ({describe_error(error)})"
            self._doubts = {**dict.fromkeys(self._editors, reason), **self._doubts}
        for name, editor in self._editors.items():
            problem = editor.problem()
            if problem is not None:
                self._doubts.setdefault(name, f"it has query and key weights {problem}")

    def _find_again(self, reader: ProjectionReader) -> None:
        """After modules of the model were replaced."""
        for name in list(self._editors):
            plan = reader.layers.get(name)
            if plan is None:
                gone = "it is no attention layer of the model any more"
                self._doubts.setdefault(name, reader.unread.get(name, gone))
                del self._editors[name]
                continue
            try:
                (editor,) = clip_editors(reader, [name], trained=False).values()
            except ValueError as error:
                self._doubts.setdefault(name, str(error))
                del self._editors[name]
                continue
            if editor.heads != self._heads[name]:
                self._doubts.setdefault(name, f"it has {editor.heads} heads now, and had {self._heads[name]}")
                del self._editors[name]
                continue
            self._editors[name] = editor

    def _tell(self, name: str, gamma: Tensor, largest: Tensor) -> None:
        """Remember the first clip of a layer."""
        if name in self._reported or not bool((gamma < 1).any()):
            return
        self._reported.add(name)
        head = int(largest.argmax())
        self.happened(
            "clip",
            f"QKClip clipped {self._labels[name]} for the first time: head {head} had a logit of "
            f"{float(largest[head]):.4g}, above {self.cap:g} (γ {float(gamma.min()):.3g})",
            where=f"{self._labels[name]}/head_{head:02d}",
            value=float(largest[head]),
            threshold=self.cap,
        )

    def _own_maxima(self, pl_module: LightningModule, reading: "_Reading") -> Tensor:
        """What ranks reduce, as this one found it: maxima of the layers' heads since the last step, and doubts.

        Its form is fixed at the start, whatever becomes of a layer.
        """
        largest = reading.collector.pool.sums()
        self._doubt(pl_module, reading)
        device = pl_module.device
        parts, doubts, frozen = [], [], []
        for name, heads in self._heads.items():
            found = largest[name].maximum[0, 0] if name in largest else None
            editor = self._editors.get(name)
            if found is None or editor is None or found.shape != (heads,):
                found = torch.full((heads,), -torch.inf, device=device)
            parts.append(found.detach().to(device).float())
            doubts.append(float(name in self._doubts))
            frozen.append(float(editor is not None and name not in self._doubts and editor.is_frozen))
        flat = torch.cat([*parts, torch.tensor(doubts + frozen, device=device)])
        # What a maximum over ranks makes of NaN is up to the backend.
        return flat.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def _of_all_ranks(self, trainer: Trainer, flat: Tensor) -> tuple[dict[str, Tensor], set[str]]:
        """Maxima of the layers' heads over all ranks, and the layers that are frozen on some; a collective call.

        The layers that some rank cannot clip are left alone from now on.
        """
        if is_distributed(trainer):
            torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.MAX)
        names = list(self._heads)
        *maxima, doubtful, waits = flat.cpu().split([*self._heads.values(), len(names), len(names)])
        for name in [names[place] for place in doubtful.nonzero().flatten().tolist()]:
            self._leave(name)
        waiting = {names[place] for place in waits.nonzero().flatten().tolist()}
        return dict(zip(names, maxima, strict=True)), waiting

    def _leave(self, name: str) -> None:
        """Clip a layer no more."""
        if name not in self.left:
            self.left[name] = self._doubts.get(name, "another process cannot clip it")
            sentence = f"{name} is not clipped any more: {self.left[name]}; training goes on"
            self.say(sentence, where=self._labels.get(name, ""))
        self._editors.pop(name, None)
        self._smallest.pop(name, None)

    def _name_uncalled(self, waiting: set[str]) -> None:
        silent = [
            name
            for name, found in self.maxima.items()
            if name not in waiting and bool(found.isneginf().all())
        ]
        if silent:
            self.say(
                f"no attention call of {shorten(silent)} was seen in the first step: such a layer was not run "
                "(generation does not count), or computes its softmax where it cannot be seen (inside a compiled "
                "graph, say), and is clipped only after a call that is seen"
            )

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what there is a value of: what did not run, or ran on padding alone, has no largest logit."""
        smallest, self._smallest = self._smallest, {}
        if not smallest:
            return
        gammas = torch.cat(list(smallest.values()))
        prefix = self.prefix
        scalars = {
            f"{prefix}/gamma/min": gammas.min().item(),
            f"{prefix}/clipped_heads": float((gammas < 1).sum()),
        }
        largest = torch.cat(list(self.maxima.values())).max().item() if self.maxima else -math.inf
        if largest > -math.inf:
            scalars[f"{prefix}/max_logit/max"] = largest
        pl_module.log_dict(scalars, logger=False, on_step=True, on_epoch=False)
        step = logging_step(trainer)
        self.event_log.add_points(step, {f"{prefix}/max_logit/max": math.nan, **scalars})
        for name, by_head in smallest.items():
            layer, maxima = f"{prefix}/{self._labels[name]}", self.maxima.get(name)
            if maxima is None:
                continue
            if self.per_layer:
                scalars[f"{layer}/gamma"] = by_head.min().item()
                scalars[f"{layer}/max_logit"] = maxima.max().item()
            if self.per_head:
                for head, (gamma, own) in enumerate(zip(by_head, maxima, strict=True)):
                    scalars[f"{layer}/head_{head:02d}/gamma"] = gamma.item()
                    scalars[f"{layer}/head_{head:02d}/max_logit"] = own.item()
        found = {key: value for key, value in scalars.items() if value > -math.inf}
        self.log_safely(lambda: log_scalars(trainer, found, step))


class _Reading(NamedTuple):
    """What exists while a fit is watched."""

    reader: ProjectionReader
    collector: AttentionCollector
