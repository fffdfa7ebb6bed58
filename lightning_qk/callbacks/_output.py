"""What callbacks hand over to Lightning: values that all processes agree on, and lines beside a progress bar."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric


class Agreed(Metric):
    """A value that is the same on every process already, so that nothing has to be reduced.

    Lightning takes a number for that of one process, and recommends to reduce it when an epoch ends.

    Args:
        value: a number, or a tensor with one element.
    """

    full_state_update = False
    value: Tensor

    def __init__(self, value: float | Tensor) -> None:
        super().__init__(sync_on_compute=False)
        tensor = torch.as_tensor(value).detach()
        dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
        self.add_state("value", torch.zeros((), dtype=dtype, device=tensor.device))
        self.update(tensor.to(dtype).reshape(()))

    def update(self, value: Tensor) -> None:
        """Replace the value."""
        self.value = value

    def compute(self) -> Tensor:
        """The value."""
        return self.value


def log_at_step(trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
    """Give ``trainer.callback_metrics`` values of a step, and the loggers none; no collective call.

    Lightning's own ``log`` would copy each of a hundred values to the device, and look at each again at every step
    of the epoch.

    Args:
        trainer: the trainer, in a hook in which ``log`` may be called.
        pl_module: its module.
        values: key → number.
    """
    given = dict(zip(values, torch.tensor(list(values.values())).unbind(), strict=True))
    trainer.callback_metrics.update(given)
    kept = trainer.callback_metrics
    if any(kept.get(name) is not value for name, value in given.items()):
        # They were a copy, or another callback has logged one of the names.
        pl_module.log_dict(given, logger=False, on_step=True, on_epoch=False)


def log_agreed(pl_module: LightningModule, values: Mapping[str, float | Tensor], **options: Any) -> None:
    """Give ``trainer.callback_metrics`` values of an epoch that are the same on every process; no collective call.

    Args:
        pl_module: whose ``log`` may be called now.
        values: key → value.
        options: of ``LightningModule.log``.
    """
    for name, value in values.items():
        # Lightning would look for the metric among the module's attributes.
        pl_module.log(
            name,
            Agreed(value),
            logger=False,
            on_step=False,
            on_epoch=True,
            metric_attribute="lightning_qk",
            **options,
        )


def inform(sentence: str) -> None:
    """Log on rank zero, in a line of its own beside a progress bar."""
    with beside_bars():
        rank_zero_info(sentence)


@contextmanager
def beside_bars() -> Iterator[None]:
    """Have what is logged written above the progress bars that are drawn, of tqdm or rich."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with nullcontext() if tqdm is None else tqdm.external_write_mode(file=sys.stderr), _past_no_proxy():
        yield


@contextmanager
def _past_no_proxy() -> Iterator[None]:
    """Let Lightning's log handlers write to ``sys.stderr`` as it is now.

    They keep the stream of the time when Lightning was imported. rich's live displays put one of their own in its
    place, since what is written past it stays in the middle of a bar, or is erased with it.
    """
    behind = [
        handler
        for name in ("lightning.pytorch", "pytorch_lightning")
        for handler in logging.getLogger(name).handlers
        if type(handler) is logging.StreamHandler and _is_behind(sys.stderr, handler.stream)
    ]
    moved = [(handler, handler.setStream(sys.stderr)) for handler in behind]
    try:
        yield
    finally:
        for handler, stream in moved:
            if stream is not None:
                handler.setStream(stream)


def _is_behind(proxy: Any, stream: Any) -> bool:
    """Whether ``proxy`` is rich's in the place of ``stream``."""
    return getattr(proxy, "rich_proxied_file", None) is stream


def end_progress_bar(trainer: Trainer) -> None:
    """Let the bar of a run that ends stand where it is, so that what is printed next is below it and stays.

    rich erases as many lines as its bar has when it draws it again, whatever was printed in between. Bars of other
    kinds stay as they are, on a line of their own.

    Args:
        trainer: of the run, which draws no more bars.
    """
    bar = trainer.progress_bar_callback
    progress = getattr(bar, "progress", None)
    live = getattr(progress, "live", None)
    # In a file it is printed once, when the bar itself stops it.
    if live is not None and live.is_started and live.console.is_interactive:
        progress.stop()  # type: ignore[union-attr]
    # tqdm's is open where an error ended the run.
    for name in ("_train_progress_bar", "_val_progress_bar"):
        one = getattr(bar, name, None)
        if one is not None and hasattr(one, "close"):
            one.close()
