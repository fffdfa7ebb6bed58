"""Run by torchrun in two processes: one of them fails somewhere inside of a guard, and both go on."""

import os
import sys
from pathlib import Path

import lightning as L
import models
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk import CollapseGuard
from lightning_qk.callbacks.guard import _healthy, _pending, _watch
from lightning_qk.guard.detector import CollapseDetector

PLACES = [
    (CollapseDetector, "observe", 0),
    (CollapseDetector, "observe", 1),
    (_watch.HiddenCosine, "take", 1),
    (_watch.ReadingSource, "read", 0),
    (_watch.ReadingSource, "begin_batch", 1),
    (_pending.StepLosses, "add", 1),
    (_healthy.HealthyCheckpoint, "_put", 0),
    (_healthy.HealthyCheckpoint, "_promoted", 0),
    (torch, "save", 0),
    (CollapseGuard, "state_dict", 1),
]


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def losses(rank: int, folder: Path, guard: CollapseGuard | None) -> list[float]:
    torch.manual_seed(1)
    dataset = models.tokens(48).dataset
    data = DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, 2, rank, shuffle=False))
    job = models.Job(lr=1e-3, optimizer="adamw")
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            seen.append(float(outputs["loss"]))

    trainer = models.trainer(
        [Watch(), *([guard] if guard else [])],
        max_steps=6,
        max_epochs=-1,
        strategy="ddp",
        devices=2,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(job, data)
    return seen


def run(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    found = {"plain": losses(rank, folder / "plain", None)}
    for number, (where, name, failing) in enumerate(PLACES):
        before = getattr(where, name)
        if rank == failing:
            setattr(where, name, fail)
        guard = CollapseGuard(every_n_steps=1, checkpoint_every=1, rollback=True)
        found[f"{where.__name__}.{name} on {failing}"] = losses(rank, folder / str(number), guard)
        setattr(where, name, before)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
