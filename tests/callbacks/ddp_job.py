"""Run by torchrun in two processes: what the callbacks do under DDP, saved for the test to compare."""

import functools
import os
import sys
from collections import Counter
from pathlib import Path

import lightning as L
import models
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk import (
    AttentionMonitor,
    HiddenStateMonitor,
    LocAteR,
    PositionMonitor,
    QKSpectrumMonitor,
    SinkMonitor,
    TokenMonitor,
    locater_penalty,
)

WEIGHT = 5.0
MONITORS = (
    QKSpectrumMonitor,
    AttentionMonitor,
    SinkMonitor,
    PositionMonitor,
    HiddenStateMonitor,
    TokenMonitor,
)


class KeepGradients(L.Callback):
    """The gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.keep(pl_module))

    def keep(self, pl_module: L.LightningModule) -> None:
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


class CountCollectives(L.Callback):
    """Collective calls from Python, by name, from the start of each batch to that of the next."""

    NAMES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.steps.append(Counter())

    def __enter__(self) -> None:
        self._kept = {name: getattr(torch.distributed, name) for name in self.NAMES}
        for name, function in self._kept.items():
            setattr(torch.distributed, name, functools.partial(self._count, name, function))

    def __exit__(self, *_: object) -> None:
        for name, function in self._kept.items():
            setattr(torch.distributed, name, function)

    def _count(self, name, function, *args, **kwargs):
        if self.steps:
            self.steps[-1][name] += 1
        return function(*args, **kwargs)


def job(loss=None) -> models.Job:
    torch.manual_seed(3)
    out = models.Job(loss=loss, lr=0.01)
    for module in out.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # processes would draw other masks than one process does
    return out


def data(processes: int) -> DataLoader:
    """Every process its share of the same batches of eight; Lightning's own sampler would shuffle."""
    dataset = models.tokens(32).dataset
    sampler = DistributedSampler(dataset, processes, int(os.environ.get("RANK", 0)), shuffle=False)
    return DataLoader(dataset, batch_size=8 // processes, sampler=sampler)


def run(folder: Path, processes: int) -> None:
    arguments = {"max_steps": 2, "log_every_n_steps": 1, "use_distributed_sampler": False}
    if processes > 1:
        arguments |= {"strategy": "ddp", "devices": processes}
    results = {}
    cases = {
        "term": (job(lambda module: WEIGHT * locater_penalty(module)), []),
        "callback": (job(), [LocAteR(WEIGHT)]),
        # As many tokens as the eight sequences of all processes have besides their first ones: all of them.
        "share by tokens": (job(), [LocAteR("20%", sigma="tokens", tokens=8 * 15)]),
        "limit": (job(), [LocAteR(limit=0.01, tokens=8 * 15)]),
    }
    for name, (module, callbacks) in cases.items():
        keep = KeepGradients()
        models.trainer([*callbacks, keep], **arguments).fit(module, data(processes))
        results[name] = keep.gradients
    spectrum, attention = QKSpectrumMonitor(singular=True), AttentionMonitor(rows=None)
    sinks, position = SinkMonitor(rows=None, sequences=None), PositionMonitor(sequences=None)
    hidden = HiddenStateMonitor(tokens=None, sequences=None)
    tokens = TokenMonitor(tokens=None, predict_every=1)
    watched = models.trainer(
        [spectrum, attention, sinks, position, hidden, tokens],
        logger=CSVLogger(folder, version=str(processes)),
        val_check_interval=2,
        **arguments,
    )
    watched.fit(job(), data(processes), data(processes))
    for name, monitor in (
        ("attention", attention),
        ("spectrum", spectrum),
        ("sinks", sinks),
        ("position", position),
        ("hidden", hidden),
        ("tokens", tokens),
    ):
        history = monitor.history
        results[name] = {statistic: history.series(statistic) for statistic in history.statistics}
    predicted = tokens._predictions.history
    results["pred"] = {statistic: predicted.series(statistic) for statistic in predicted.statistics}
    count = CountCollectives()
    every = [kind(2, report=False) for kind in MONITORS]
    with count:
        models.trainer([count, *every], **{**arguments, "max_steps": 7}).fit(job(), data(processes))
    results["collectives"] = [dict(step) for step in count.steps]
    results["metrics"] = {key: float(value) for key, value in watched.callback_metrics.items()}
    torch.save(results, folder / f"{processes}_{watched.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
