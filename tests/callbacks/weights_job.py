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
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
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


class Parallel(models.Job):
    """Projections on tensor parallelism: each process computes half of the heads."""

    def configure_model(self) -> None:
        plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {
            "o_proj": RowwiseParallel()
        }
        for block in self.inner["network"].model.layers:
            parallelize_module(block.self_attn, self.device_mesh["tensor_parallel"], plan)


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
    rank = int(os.environ.get("RANK", 0)) if processes > 1 else 0
    sampler = DistributedSampler(dataset, processes, rank, shuffle=False)
    return DataLoader(dataset, batch_size=8 // processes, sampler=sampler)


def run(folder: Path, processes: int) -> None:
    results = {}
    cases = {
        "ddp": QKClip(0.5),
        "fsdp2": QKClip(0.5),
        "tensor parallel": QKClip(0.5),
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
            if case == "tensor parallel":
                arguments["strategy"] = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        torch.manual_seed(3)
        kinds = {"fsdp2": Sharded, "tensor parallel": Parallel} if processes > 1 else {}
        module = kinds.get(case, models.Job)(models.llama(), lr=0.01)
        keep = Keep()
        trainer = models.trainer([callback, keep], **arguments)
        trainer.fit(module, data(1 if case == "tensor parallel" else processes))
        results[case] = {"weights": keep.weights, "gammas": getattr(callback, "gammas", {})}
        results[case]["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    torch.save(results, folder / f"{processes}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
