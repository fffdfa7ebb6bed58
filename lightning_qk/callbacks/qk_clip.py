"""Callback: QK-Clip, which scales query and key weights down where logits have grown too large."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_qk.callbacks._account import Account
from lightning_qk.callbacks._monitor import shorten
from lightning_qk.callbacks._trainer import (
    check_lightning,
    is_logged_step,
    logging_step,
    projection_reader,
    refuse_deepspeed,
)
from lightning_qk.capture.extremes import call_max_logits
from lightning_qk.capture.interface import AttentionCapture
from lightning_qk.capture.record import AttentionCall, SoftmaxCall, UnsupportedCallError
from lightning_qk.heads.edit import HeadEditor
from lightning_qk.heads.local import local_heads
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.interventions.layers import matching_unread
from lightning_qk.interventions.qk_clip import apply_clip, check_clip, clip_factors, clippable_layers
from lightning_qk.logging.layers import layer_labels
from lightning_qk.logging.loggers import describe_config, log_scalars


class QKClip(Callback):
    r"""Holds the attention logits of every head at ``tau``: the clip of Kimi K2 (arXiv 2507.20534 [V]).

    After each optimizer step, with S the largest ``scaling q·k`` of a head since the last step, over all
    micro-batches, ranks and rows that are no padding, ``γ = min(1, τ/S)`` scales the head's query weights and
    biases by γ^α and its key's by γ^(1−α). Heads that share a key take the smallest γ of their group, all of
    them. See :func:`~lightning_qk.clip_qk` for what is scaled and what is not. Gradients, optimizers' states and
    the forward pass are untouched; a step whose logits stay below ``tau`` changes nothing at all.

    Every step is watched. The maxima are bounded first, by ``|scaling| max‖q‖ max‖k‖``; products are taken only
    of heads whose bound is above ``tau``, and of all heads on logged steps. Weights may be sharded by FSDP2 or
    tensor parallel; one collective call a step finds the maxima of all ranks, and the processor waits for the
    device once a step, and once a layer for its bounds.

    Logged keys, at the trainer's ``log_every_n_steps``:

    - ``clip/gamma/min``: the smallest γ since the last logged step, 1 where nothing was clipped;
    - ``clip/clipped_heads``: how many query heads were clipped since the last logged step;
    - ``clip/max_logit/max``: the logged step's largest logit before its clip;
    - ``clip/gamma/layer_03`` and ``clip/max_logit/layer_03`` with ``per_layer=True``: the same of each layer;
    - ``clip/layer_03/head_05/gamma`` and ``…/max_logit`` with ``per_head=True``.

    Args:
        tau: the largest logit that is left as it is.
        alpha: share of γ that the queries take.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        per_layer: also log two scalars a layer.
        per_head: also log two scalars a head.

    Attributes:
        gammas: qualified layer name → γ of each key head at the last step, ``(kv_heads,)``.
        maxima: qualified layer name → largest logit of each query head before the last clip, ``(heads,)``;
            one that is at most ``tau`` may be a bound, on steps that are not logged.
        account: curves and the first clip of every layer, for the run's report.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: an argument is out of range, patterns match no layer, the weights of a layer are no plain
            trainable parameters of its own, a norm of queries or keys takes every scale out again, DeepSpeed
            holds copies of the weights; or, at the end of the first batch, the logits of a layer cannot be told.
    """

    def __init__(
        self,
        tau: float = 100.0,
        *,
        alpha: float = 0.5,
        modules: str | Sequence[str] | None = None,
        per_layer: bool = False,
        per_head: bool = False,
    ) -> None:
        check_clip(tau, alpha)
        self.tau = float(tau)
        self.alpha = float(alpha)
        self.modules = modules if modules is None or isinstance(modules, str) else list(modules)
        self.per_layer = per_layer
        self.per_head = per_head
        self.gammas: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.account = Account()
        self._reader: ProjectionReader | None = None
        self._capture: AttentionCapture | None = None
        self._editors: dict[str, HeadEditor] = {}
        self._labels: dict[str, str] = {}
        # Of the calls since the last step.
        self._largest: dict[str, Tensor] = {}
        # Smallest γ of each query head since the last logged step.
        self._smallest: dict[str, Tensor] = {}
        self._is_due = False
        self._steps_before = 0
        self._steps = 0
        self._warned: set[str] = set()
        self._told: set[str] = set()

    @property
    def state_key(self) -> str:
        """Several of these can be in one trainer, on other modules."""
        return self._generate_state_key(modules=self.modules)

    def state_dict(self) -> dict[str, Any]:
        """What was done so far, for the report."""
        return {"account": self.account.state_dict(), "told": sorted(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the account of a checkpoint's run."""
        self.account.load_state_dict(state_dict.get("account", {}))
        self._told = set(state_dict.get("told", ()))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any work: another package's trainer, DeepSpeed."""
        check_lightning(trainer, type(self).__name__)
        if stage != "fit":
            return
        refuse_deepspeed(trainer, type(self).__name__)
        settings = ("tau", "alpha", "modules", "per_layer", "per_head")
        describe_config(trainer, {type(self).__name__: {name: getattr(self, name) for name in settings}})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and stand at their attention; raise where one cannot be clipped exactly."""
        self._reader = projection_reader(trainer, pl_module)
        self._warned.clear()
        self.gammas, self.maxima = {}, {}
        self._is_due, self._steps = False, 0
        self._steps_before = trainer.global_step
        self._listen_to(pl_module, self._reader)

    def _listen_to(self, pl_module: LightningModule, reader: ProjectionReader) -> None:
        self._remove()
        self._largest.clear()
        self._smallest.clear()
        self._editors = clippable_layers(reader, self.modules)
        for name, reason in matching_unread(reader, self.modules).items():
            self._warn(f"{name} is not clipped: {reason}")
        names = {reader.layers[name].module: name for name in self._editors}
        self._capture = AttentionCapture(names, self._hear, model=pl_module)
        self._capture.install()
        cross = {name for name, plan in reader.layers.items() if not plan.self_attention}
        self._labels = layer_labels(list(reader.layers), cross=cross)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen."""
        self._steps_before = trainer.global_step
        self._is_due = self._is_due or is_logged_step(trainer, None)
        if self._capture is not None:
            self._capture.enabled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Clip once the optimizer has stepped."""
        if self._capture is None:
            return
        self._capture.enabled = False
        if trainer.global_step == self._steps_before:
            return
        self._steps += 1
        self._clip(trainer, pl_module)
        if self._is_due:
            self._is_due = False
            self._publish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the attention interface as it was: teardown may not follow."""
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the attention interface as it was."""
        self._remove()

    def _remove(self) -> None:
        if self._capture is not None:
            self._capture.remove()
            self._capture = None

    def _hear(self, name: str, call: AttentionCall | SoftmaxCall) -> None:
        assert self._reader is not None  # on_fit_start
        plan, heads = self._reader.layers[name], self._editors[name].heads
        where = local_heads(call.module, heads)
        here = heads if where is None else where.stop - where.start
        found = call_max_logits(
            call,
            self_attention=plan.self_attention,
            heads=here,
            position=plan.position,
            above=None if self._is_due else self.tau,
        )
        if len(found) != here:
            raise UnsupportedCallError(
                f"its weights have {here} heads and its attention was called with {len(found)}: check how the "
                "layer splits its heads"
            )
        if where is not None:
            placed = found.new_full((heads,), -torch.inf)
            placed[where] = found
            found = placed
        before = self._largest.get(name)
        self._largest[name] = found if before is None else torch.maximum(before, found)

    def _clip(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the maxima of all ranks and scale the weights; a collective call, the same on every rank."""
        reader, capture = self._reader, self._capture
        assert reader is not None  # on_fit_start
        assert capture is not None  # on_train_batch_end
        if reader.refresh():
            self._listen_to(pl_module, reader)
        is_deaf = any(name not in capture.heard for name in capture.problems)
        flat = self._maxima_of_all_ranks(trainer, pl_module.device, is_deaf=is_deaf)
        if flat[-1] > 0:
            self._refuse(capture.problems)
        for name, reason in capture.problems.items():
            self._warn(f"{name} is not clipped any more: {reason}")
        sizes = [editor.heads for editor in self._editors.values()]
        self.maxima = dict(zip(self._editors, flat[:-1].split(sizes), strict=True))
        self.gammas = {}
        for name, editor in self._editors.items():
            largest = self.maxima[name]
            if bool(largest.isposinf().any()):
                self._warn(
                    f"the logits of {name} are not finite at step {logging_step(trainer)}, so that these heads "
                    "are not clipped; look for an overflow in half precision"
                )
            gamma = self.gammas[name] = clip_factors(largest, editor.kv_heads, self.tau)
            apply_clip(editor, gamma, self.alpha)
            self._tell(name, gamma, largest, logging_step(trainer))
            by_head = gamma.repeat_interleave(editor.heads // editor.kv_heads)
            before = self._smallest.get(name)
            self._smallest[name] = by_head if before is None else torch.minimum(before, by_head)
        if self._steps == 1:
            self._name_unheard()

    def _tell(self, name: str, gamma: Tensor, largest: Tensor, step: int) -> None:
        """Remember the first clip of a layer."""
        if name in self._told or not bool((gamma < 1).any()):
            return
        self._told.add(name)
        head = int(largest.argmax())
        self.account.tell(
            step,
            f"QKClip clipped {self._labels[name]} for the first time: head {head} had a logit of "
            f"{float(largest[head]):.4g}, above {self.tau:g} (γ {float(gamma.min()):.3g})",
        )

    def _maxima_of_all_ranks(self, trainer: Trainer, device: torch.device, *, is_deaf: bool) -> Tensor:
        """Maxima of all layers' heads since the last step, flat; at the end, whether a rank cannot tell some."""
        parts = []
        for name, editor in self._editors.items():
            found = self._largest.get(name)
            if found is None:
                found = torch.full((editor.heads,), -torch.inf, device=device)
            parts.append(found.to(device).float())
        self._largest.clear()
        flat = torch.cat([*parts, torch.full((1,), float(is_deaf), device=device)])
        # What a maximum over ranks makes of NaN is up to the backend.
        flat = flat.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.MAX)
        return flat.cpu()

    def _refuse(self, problems: dict[str, str]) -> None:
        named = next(iter(problems.items()), None)
        what = "a layer on another process" if named is None else f"{named[0]} ({named[1]})"
        raise ValueError(
            f"expected attention whose logits can be told, got {what}: leave such a layer out with "
            "QKClip(modules=…)"
        )

    def _name_unheard(self) -> None:
        silent = [name for name, found in self.maxima.items() if bool(found.isneginf().all())]
        if silent:
            self._warn(
                f"no attention call of {shorten(silent)} was seen in the first step: such a layer was not run, or "
                "computes its softmax where it cannot be seen (inside a compiled graph, say), and is clipped only "
                "after a call that is seen"
            )

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        smallest, self._smallest = self._smallest, {}
        gammas = torch.cat(list(smallest.values()))
        scalars = {"clip/gamma/min": gammas.min().item()}
        scalars["clip/clipped_heads"] = float((gammas < 1).sum())
        maxima = torch.cat(list(self.maxima.values()))
        scalars["clip/max_logit/max"] = maxima.max().item()
        pl_module.log_dict(scalars, logger=False, on_step=True, on_epoch=False)
        self.account.draw(logging_step(trainer), scalars)
        for name, by_head in smallest.items():
            label = self._labels[name]
            if self.per_layer:
                scalars[f"clip/gamma/{label}"] = by_head.min().item()
                scalars[f"clip/max_logit/{label}"] = self.maxima[name].max().item()
            if self.per_head:
                for head, (gamma, largest) in enumerate(zip(by_head, self.maxima[name], strict=True)):
                    scalars[f"clip/{label}/head_{head:02d}/gamma"] = gamma.item()
                    scalars[f"clip/{label}/head_{head:02d}/max_logit"] = largest.item()
        log_scalars(trainer, scalars, logging_step(trainer))

    def _warn(self, sentence: str) -> None:
        """Say something once."""
        if sentence.split(" at step ")[0] not in self._warned:
            self._warned.add(sentence.split(" at step ")[0])
            rank_zero_warn(f"{type(self).__name__}: {sentence}")
