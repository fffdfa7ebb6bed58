"""Run by torchrun in two processes: what changes weights under DDP and FSDP2, saved for the test to compare."""

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

from lightning_qk import QKClip, SigmaReparam, UpdateCap


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
    cases = {
        "ddp": QKClip(0.5),
        "fsdp2": QKClip(0.5),
        "update cap": UpdateCap(1e-3),
        "sigma reparam": SigmaReparam(),
    }
    for case, callback in cases.items():
        arguments = {"max_steps": 2, "use_distributed_sampler": False}
        if processes > 1:
            arguments["devices"] = processes
            arguments["strategy"] = "ddp"
            if case == "fsdp2":
                arguments["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        torch.manual_seed(3)
        kind = Sharded if case == "fsdp2" and processes > 1 else models.Job
        module = kind(models.llama(), lr=0.01)
        keep = Keep()
        trainer = models.trainer([callback, keep], **arguments)
        trainer.fit(module, data(processes))
        results[case] = {"weights": keep.weights, "gammas": getattr(callback, "gammas", {})}
        results[case]["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    torch.save(results, folder / f"{processes}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
