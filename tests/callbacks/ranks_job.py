"""Run by torchrun in two processes, one of which fails at one place: what each saw, saved for the test."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import models
import ranks_decisions
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from ranks_failing import Failing
from torch.utils.data import DataLoader, DistributedSampler

import lightning_qk
from lightning_qk import (
    AttentionMonitor,
    HiddenStateMonitor,
    PositionMonitor,
    QKSpectrumMonitor,
    SinkMonitor,
    TokenMonitor,
)
from lightning_qk.callbacks.monitors import _base as _monitor
from lightning_qk.callbacks.monitors import (
    _captured,
    _listening,
    _predictions,
    attention,
    spectrum,
    tokens,
)
from lightning_qk.metrics import eigenvalues, later, means
from lightning_qk.metrics.attention import AttentionStatistics
from lightning_qk.record import forgotten, history

SPECTRUM, STATES, CALLS = "QKSpectrumMonitor", "HiddenStateMonitor", "AttentionMonitor"

PLACES = {
    "measuring spectra": (spectrum.QKSpectrum, "update", (SPECTRUM, STATES)),
    "cores of singular values": (spectrum.SingularValues, "cores", (SPECTRUM, STATES)),
    "eigenproblems": (eigenvalues, "core_eigenvalues", (SPECTRUM,)),
    "solving at all": (eigenvalues, "solve_each", (SPECTRUM,)),
    "measuring a call": (attention, "attention_sums", (CALLS, STATES)),
    "sums of tokens": (tokens, "token_sums", ("TokenMonitor", CALLS)),
    "predicting": (_predictions, "predict_attention", ("TokenMonitor", CALLS)),
    "measuring states": (later, "hidden_sums", (STATES, CALLS)),
    "pooling": (means.HeadMeans, "update", (CALLS, "SinkMonitor", SPECTRUM)),
    "building a metric": (AttentionMonitor, "metric", (CALLS, "PositionMonitor", SPECTRUM)),
    "values": (AttentionStatistics, "compute", (CALLS, "PositionMonitor", SPECTRUM)),
    "states of heads": (_listening.ListeningMonitor, "states_of", (CALLS, "PositionMonitor", SPECTRUM)),
    "remembering": (history.History, "append", (SPECTRUM, CALLS)),
    "temporary files": (forgotten.tempfile, "TemporaryFile", (SPECTRUM, STATES)),
    "logging": (_monitor, "log_scalars", (SPECTRUM, CALLS, STATES)),
    "finding layers": (_captured, "find_attention", (CALLS, SPECTRUM)),
    "beginning to listen": (_listening.ListeningMonitor, "begin_batch", (CALLS, SPECTRUM)),
    "ending to listen": (HiddenStateMonitor, "end_batch", (STATES, CALLS)),
    "the end": (_monitor.Monitor, "finish", (SPECTRUM, CALLS, "SinkMonitor", "PositionMonitor", STATES)),
}
"""What fails → where, and what watches: monitors that it concerns, and one that goes on."""
ONCE = ("eigenproblems", "measuring a call", "pooling", "building a metric")
"""What also fails at one call alone."""


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


def monitors(names: tuple[str, ...]) -> list:
    every = [
        QKSpectrumMonitor(singular=True),
        AttentionMonitor(rows=4),
        SinkMonitor(),
        PositionMonitor(),
        HiddenStateMonitor(),
        TokenMonitor(predict_every=1),
    ]
    return [one for one in every if type(one).__name__ in names]


def run(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    results = {"plain": fit(folder, [])}
    for index, (name, (owner, attribute, who)) in enumerate(PLACES.items()):
        for calls in (range(1, 10_000), *((range(2, 3),) if name in ONCE else ())):
            # The first process fails at one half of the places, the second at the other.
            failing = Failing(calls).at(owner, attribute) if rank == index % 2 else nullcontext()
            with failing:
                print(rank, name, len(calls), flush=True)
                results[name, len(calls)] = fit(folder / f"{index}_{len(calls)}", monitors(who))
    torch.save(results | ranks_decisions.run(folder), folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert Path(lightning_qk.__file__).parents[1] == Path(__file__).parents[2]
    run(Path(sys.argv[1]))
