"""Run by torchrun in two processes: QK-Clip under DDP and FSDP2, saved for the test to compare."""

import os
import sys
from pathlib import Path

import lightning as L
import models
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk import QKClip


class Sharded(models.Job):
    """Blocks on FSDP2."""

    def configure_model(self) -> None:
        network = self.inner["network"]
        if self.device_mesh is not None and not isinstance(network, DTensor):
            for block in network.model.layers:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(network, mesh=self.device_mesh["data_parallel"])


class Keep(L.Callback):
    """Weights at the end, whole."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            self.weights[name] = whole.detach().clone()


def data(processes: int) -> DataLoader:
    dataset = models.tokens(32).dataset
    sampler = DistributedSampler(dataset, processes, int(os.environ.get("RANK", 0)), shuffle=False)
    return DataLoader(dataset, batch_size=8 // processes, sampler=sampler)


def run(folder: Path, processes: int) -> None:
    results = {}
    for case in ("ddp", "fsdp2"):
        arguments = {"max_steps": 2, "use_distributed_sampler": False}
        if processes > 1:
            arguments["devices"] = processes
            arguments["strategy"] = "ddp"
            if case == "fsdp2":
                arguments["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        torch.manual_seed(3)
        kind = Sharded if case == "fsdp2" and processes > 1 else models.Job
        module = kind(models.llama(), lr=0.01)
        clip, keep = QKClip(0.5), Keep()
        trainer = models.trainer([clip, keep], **arguments)
        trainer.fit(module, data(processes))
        results[case] = {"gammas": clip.gammas, "weights": keep.weights}
    torch.save(results, folder / f"{processes}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
