"""What a guard reads: the numbers of the trainer's own monitors, or of quiet ones where there are none."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_qk.callbacks._monitor import Monitor
from lightning_qk.callbacks.attention import AttentionMonitor
from lightning_qk.callbacks.spectrum import QKSpectrumMonitor
from lightning_qk.guard.reading import Place
from lightning_qk.heads.reader import find_attention
from lightning_qk.logging.history import History, RunRecord

ATTENTION = ("entropy_normalized", "logit_std", "max_abs_logit")
SPECTRUM = ("sym_var", "frobenius_sq")
COSINE = "hidden/cosine"
_M = TypeVar("_M", bound=Monitor)


class _Quiet(Monitor):
    """A monitor that measures for a guard: it logs nothing and reports nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The guard has checked the trainer."""

    def publish(self, trainer: Trainer, pl_module: LightningModule | None, values: dict[str, Tensor]) -> None:
        """Remember the newest values alone."""
        assert self.history is not None  # remember_layers comes before the first measurement
        self.history = History(self.history.layers, self.history.heads, max_points=2)
        self.history.append(_step(trainer), values)

    def share(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is logged."""

    def count_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There are no aggregates."""

    def after_measuring(self, trainer: Trainer) -> None:
        """No eigenproblem is solved."""

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is left to log."""


class QuietAttention(_Quiet, AttentionMonitor):
    """Attention statistics of a few rows, for a guard."""


class QuietSpectrum(_Quiet, QKSpectrumMonitor):
    """Traces and norms of the weights, for a guard; no eigenproblem is solved."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run's start is of no interest."""

    def contribute(self, record: RunRecord) -> None:
        """Nothing is left to report."""


def _step(trainer: Trainer) -> int:
    from lightning_qk.callbacks._trainer import logging_step

    return logging_step(trainer)


class HiddenCosine:
    """Mean cosine of two tokens of a sequence in what each attention layer is given.

    Rank collapse drives it to 1. With unit vectors u of T tokens it is ``(‖Σ u‖² − T) / (T² − T)``, at a cost
    linear in T. Tokens are those that the batch's own ``attention_mask`` of shape ``(batch, T)`` keeps; without
    one, all of them.

    Args:
        model: any module with attention layers.
        tokens: of each sequence, at most so many are taken, evenly spaced.
    """

    def __init__(self, model: nn.Module, tokens: int = 64) -> None:
        self.modules = find_attention(model)
        self.tokens = tokens
        self._sums: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._keep: Tensor | None = None

    @property
    def places(self) -> list[Place]:
        """One a layer."""
        return [Place(name) for name in self.modules]

    def listen(self, batch: Any = None) -> None:
        """Hear what the layers are given with this batch, until :meth:`stop`."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._keep = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if not self._handles:
            for name, module in self.modules.items():
                hook = self._hook(name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._keep = [], None

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
            if isinstance(given, Tensor) and given.dim() == 3 and given.is_floating_point():
                found = self._cosines(given.detach())
                self._sums[name] = self._sums[name] + found if name in self._sums else found

        return hook

    def _cosines(self, hidden: Tensor) -> Tensor:
        """Sum over sequences of their mean cosines, and how many sequences."""
        stride = -(-hidden.shape[1] // self.tokens)
        unit = nn.functional.normalize(hidden[:, ::stride].float(), dim=-1)
        if self._keep is not None and self._keep.shape == hidden.shape[:2]:
            keep = (self._keep[:, ::stride] != 0).float()
            unit = unit * keep.unsqueeze(-1)
            count = keep.sum(1)
        else:
            count = unit.new_full((unit.shape[0],), unit.shape[1])
        pairs = count * (count - 1)
        cosine = (unit.sum(1).square().sum(-1) - count) / pairs.clamp_min(1)
        told = (pairs > 0).float()
        return torch.stack([(cosine * told).sum(), told.sum()])

    def compute(self, trainer: Trainer, device: torch.device) -> Tensor:
        """Means of all layers since the last call, over ranks, ``(layers,)``; a collective call."""
        sums = torch.stack([self._sums.get(name, torch.zeros(2)).to(device) for name in self.modules])
        self._sums = {}
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return (sums[:, 0] / sums[:, 1]).float().cpu()


class Watch:
    """Everything that a guard reads of a trainer, measured at a guard's steps.

    A monitor of the trainer is read where it measures at all of these steps; else a quiet one measures.

    Args:
        trainer: the trainer, at the start of a fit.
        pl_module: its module.
        every_n_steps: cadence of the guard; None follows the trainer's ``log_every_n_steps``.
        rows: query rows that a quiet monitor samples.
        callbacks: monitors that may be read.

    Raises:
        ValueError: the module holds no transformer attention.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        every_n_steps: int | None,
        rows: int,
        callbacks: Iterable[Any],
    ) -> None:
        callbacks = list(callbacks)
        every = _cadence(trainer, every_n_steps)
        own_attention = _fitting(callbacks, AttentionMonitor, trainer, every)
        own_spectrum = _fitting(callbacks, QKSpectrumMonitor, trainer, every)
        self.quiet: list[Monitor] = []
        if own_attention is None:
            own_attention = QuietAttention(
                every_n_steps, rows=rows, every_n_eval_batches=0, figures_every=0, report=False
            )
            self.quiet.append(own_attention)
        if own_spectrum is None:
            own_spectrum = QuietSpectrum(every_n_steps, figures_every=0, report=False)
            self.quiet.append(own_spectrum)
        self.attention: Monitor = own_attention
        self.spectrum: Monitor | None = own_spectrum
        self.hidden = HiddenCosine(pl_module)
        for monitor in self.quiet:
            monitor.on_fit_start(trainer, pl_module)
            if not monitor.idle:
                continue
            if monitor is self.attention:
                raise ValueError(monitor.notes[-1].removeprefix("nothing is watched: "))
            # Weights that cannot be read leave the attention itself to be watched.
            self.spectrum = None
        self.quiet = [monitor for monitor in self.quiet if not monitor.idle]

    def is_ready(self, step: int) -> bool:
        """Whether the trainer's monitors have measured a step: a guard may stand before them."""
        return all(
            monitor is None or monitor.history is None or monitor.history.steps[-1:] == [step]
            for monitor in (self.attention, self.spectrum)
        )

    def read(self, step: int) -> tuple[dict[str, Tensor], dict[str, list[Place]]]:
        """Values and places of the monitors' statistics at a step; those that were not measured are left out."""
        values: dict[str, Tensor] = {}
        places: dict[str, list[Place]] = {}
        for group, monitor, names in (
            ("attn", self.attention, ATTENTION),
            ("qk", self.spectrum, SPECTRUM),
        ):
            history = None if monitor is None else monitor.history
            if monitor is None or history is None or history.steps[-1:] != [step]:
                continue
            modules = {label: name for name, label in monitor.labels.items()}
            places[group] = [
                Place(modules.get(label, label), head)
                for label, heads in zip(history.layers, history.heads, strict=True)
                for head in range(heads)
            ]
            values.update({f"{group}/{name}": history.values[name][-1] for name in names})
        return values, places


def _cadence(trainer: Trainer, every_n_steps: int | None) -> int:
    every = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    return int(every)


def _fitting(callbacks: Iterable[Any], kind: type[_M], trainer: Trainer, every: int) -> _M | None:
    """The first monitor of a kind that measures at every multiple of the cadence."""
    for callback in callbacks:
        if isinstance(callback, kind):
            own = _cadence(trainer, callback.every_n_steps)
            if own > 0 and every % own == 0:
                return callback
    return None
