"""Jobs that collapse and jobs that do not, and, run by torchrun, a guard in two processes."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import models
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk import CollapseGuard, QKClip, head_projections


class Sharpen(L.Callback):
    """Query weights that grow by half at every step from one on, in the second layer."""

    def __init__(self, start: int = 8, stop: int = 16, rank: int | None = None) -> None:
        self.start, self.stop, self.rank = start, stop, rank

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if self.start <= trainer.global_step < self.stop:
            with torch.no_grad():
                list(head_projections(module).values())[1].query.mul_(1.5)


def fit(
    guard: CollapseGuard, *callbacks: L.Callback, steps: int = 20, data: Any = None, **arguments: Any
) -> Any:
    torch.manual_seed(1)
    job = models.Job(lr=1e-3, optimizer="adamw")
    path = arguments.pop("ckpt_path", None)
    trainer = models.trainer([*callbacks, guard], max_steps=steps, max_epochs=-1, **arguments)
    trainer.fit(job, data or models.tokens(64), ckpt_path=path, weights_only=False)
    return trainer, job


def run(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dataset = models.tokens(64).dataset
    data = DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, 2, rank, shuffle=False))
    guard = CollapseGuard(QKClip(5.0), every_n_steps=1, rollback=True, lr_factor=0.5, checkpoint_every=2)
    _, job = fit(
        guard,
        Sharpen(),
        data=data,
        strategy="ddp",
        devices=2,
        use_distributed_sampler=False,
        default_root_dir=folder / "run",
    )
    found = {
        "alarms": [(verdict.step, verdict.reason) for verdict in guard.verdicts],
        "back": guard.rolled_back_to,
        "weights": torch.cat([parameter.detach().flatten() for parameter in job.parameters()]),
    }
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
