"""Run by torchrun in two processes, one of which fails at one place: what each saw, saved for the test."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import models
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

import lightning_qk
from lightning_qk import AttentionMonitor, HiddenStateMonitor, PositionMonitor, QKSpectrumMonitor, SinkMonitor
from lightning_qk.callbacks import _captured, _monitor, attention, hidden, spectrum
from lightning_qk.logging import forgotten, history
from lightning_qk.metrics import eigenvalues, means

PLACES = {
    "measuring spectra": (spectrum.QKSpectrum, "update"),
    "cores of singular values": (spectrum.SingularValues, "cores"),
    "eigenproblems": (eigenvalues, "core_eigenvalues"),
    "solving at all": (eigenvalues, "solve_each"),
    "measuring a call": (attention, "attention_sums"),
    "measuring states": (hidden, "hidden_sums"),
    "pooling": (means.HeadMeans, "update"),
    "copying to the host": (_captured, "flat_values"),
    "remembering": (history.History, "append"),
    "temporary files": (forgotten.tempfile, "TemporaryFile"),
    "logging": (_monitor, "log_scalars"),
    "finding layers": (_captured, "find_attention"),
    "beginning to listen": (_captured.CaptureMonitor, "begin_batch"),
    "ending to listen": (HiddenStateMonitor, "end_batch"),
    "the end": (_monitor.Monitor, "finish"),
}
"""What fails → where."""
ONCE = ("eigenproblems", "measuring a call", "pooling")
"""What also fails at one call alone."""


class Failing:
    """Fails at every call, or at some of them, in place of what is there."""

    def __init__(self, calls: range) -> None:
        self.calls, self.count = calls, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count in self.calls:
            raise torch.linalg.LinAlgError("injected") if self.count % 2 else OSError(28, "injected")
        return self.real(*args, **kwargs)

    def at(self, owner: object, name: str):
        self.real = getattr(owner, name)
        # A function is bound to its instance, an object is not.
        return mock.patch.object(owner, name, lambda *args, **kwargs: self(*args, **kwargs))


def fit(folder: Path, callbacks: list) -> dict:
    torch.manual_seed(3)
    job = models.Job(lr=0.05)
    data = models.tokens(96).dataset
    sampler = DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False)
    trainer = models.trainer(
        callbacks,
        max_steps=5,
        strategy=DDPStrategy(),
        devices=2,
        use_distributed_sampler=False,
        logger=CSVLogger(folder),
        val_check_interval=3,
        limit_val_batches=1,
    )
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    trainer.fit(job, loader, loader)
    return {
        "losses": torch.stack(job.losses),
        "weights": [parameter.detach().clone() for parameter in job.parameters()],
        "metrics": {
            key: float(value) for key, value in trainer.callback_metrics.items() if "loss" not in key
        },
        "notes": {type(one).__name__: one.notes for one in callbacks},
        "steps": {type(one).__name__: one.history.steps for one in callbacks if one.history is not None},
    }


def monitors() -> list:
    return [
        QKSpectrumMonitor(singular=True),
        AttentionMonitor(rows=4),
        SinkMonitor(),
        PositionMonitor(),
        HiddenStateMonitor(),
    ]


def run(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    results = {"plain": fit(folder, [])}
    for index, (name, (owner, attribute)) in enumerate(PLACES.items()):
        for calls in (range(1, 10_000), *((range(2, 3),) if name in ONCE else ())):
            # The first process fails at one half of the places, the second at the other.
            failing = Failing(calls).at(owner, attribute) if rank == index % 2 else nullcontext()
            with failing:
                print(rank, name, len(calls), flush=True)
                results[name, len(calls)] = fit(folder / f"{index}_{len(calls)}", monitors())
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert Path(lightning_qk.__file__).parents[1] == Path(__file__).parents[2]
    run(Path(sys.argv[1]))
