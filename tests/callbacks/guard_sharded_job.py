"""Run by torchrun in two processes: a guard goes back to the start while weights and optimizer are sharded."""

import os
import sys
from pathlib import Path

import lightning as L
import models
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_strategies_job import Configured
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk import CollapseGuard
from lightning_qk.guard.detector import Verdict

ALARM = 5


class Trained(Configured):
    """With an optimizer that remembers."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Shards(L.Callback):
    """This rank's shards of the weights after each step, in the order of the parameters."""

    def __init__(self) -> None:
        self.start: list[torch.Tensor] = []
        self.after: dict[int, list[torch.Tensor]] = {}

    def on_train_start(self, trainer, module) -> None:
        self.start = shards(module)

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.after[trainer.global_step] = shards(module)


def shards(module: torch.nn.Module) -> list[torch.Tensor]:
    found = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return [one.detach().clone() for one in found]


def fit(strategy, folder: Path, precision: str) -> dict:
    guard = CollapseGuard(every_n_steps=1, rollback=True, checkpoint_every=100, lr_factor=0.5)
    observe = guard.detector.observe

    def alarm(reading):
        verdict = observe(reading)
        return Verdict(reading.step, 2.0, True, "it was told to") if reading.step == ALARM else verdict

    guard.detector.observe = alarm
    dataset = models.tokens(64).dataset
    rank = int(os.environ["RANK"])
    data = DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, 2, rank, shuffle=False))
    watch = Shards()
    trainer = models.trainer(
        [watch, guard],
        max_steps=8,
        max_epochs=-1,
        strategy=strategy,
        devices=2,
        precision=precision,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(Trained(), data)
    back = watch.after[ALARM + 1]  # as the step after the alarm found them; loggers count from 0
    return {
        "steps": trainer.global_step,
        "back": guard.rolled_back_to,
        "is_start": all(torch.equal(a, b) for a, b in zip(back, watch.start, strict=True)),
        "moved": any(not torch.equal(a, b) for a, b in zip(watch.after[ALARM], watch.start, strict=True)),
        "goes_on": any(not torch.equal(a, b) for a, b in zip(watch.after[ALARM + 2], back, strict=True)),
        "finite": all(bool(torch.isfinite(one).all()) for one in watch.after[ALARM + 2]),
    }


def run(folder: Path) -> None:
    # Not FSDP's first version: on the CPU torch crashes while it gathers the weights of any checkpoint.
    strategies = {
        "fsdp2": (lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "32-true"),
        "fsdp2 bf16": (
            lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            "bf16-true",
        ),
        "ddp bf16": (lambda: "ddp", "bf16-mixed"),
    }
    found = {}
    for name, (make, precision) in strategies.items():
        found[name] = fit(make(), folder / name, precision)
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
