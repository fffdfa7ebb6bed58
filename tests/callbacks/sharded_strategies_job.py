"""Run by torchrun in two processes, or alone: the callbacks under Lightning's strategies, saved to compare."""

import os
import sys
from pathlib import Path

import lightning as L
import models
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk import (
    AttentionMonitor,
    HiddenStateMonitor,
    LocAteR,
    QKSpectrumMonitor,
    TokenMonitor,
    locater_penalty,
)

WEIGHT = 0.5


class Configured(models.Job):
    """The network comes with `configure_model`, sharded where there is a mesh."""

    def __init__(self, loss=None, blocks: bool = True) -> None:
        super().__init__(nn.Identity(), lr=0.05, loss=loss)
        self.blocks = blocks

    def configure_model(self) -> None:
        if not isinstance(self.inner["network"], nn.Identity):
            return
        torch.manual_seed(3)
        network = models.llama()
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            if mesh["tensor_parallel"].size() > 1:
                plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
                for layer in network.model.layers:
                    parallelize_module(
                        layer.self_attn, mesh["tensor_parallel"], {**plan, "o_proj": RowwiseParallel()}
                    )
            for layer in network.model.layers if self.blocks else ():
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(network, mesh=mesh["data_parallel"])
        self.inner["network"] = network


class Partitioned(Configured):
    """Optimizer states in parts, as ZeRO stage 1."""

    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=self.lr)


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning asks for a GPU by the exact class, and never tells torch that the device is the CPU."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        original = FullyShardedDataParallel.__init__

        def init(unit, /, *args, **kwargs) -> None:
            original(unit, *args, **{**kwargs, "device_id": torch.device("cpu")})

        FullyShardedDataParallel.__init__ = init
        try:
            return super()._setup_model(model)
        finally:
            FullyShardedDataParallel.__init__ = original


class KeepGradients(L.Callback):
    """The whole gradients of the last optimizer step, after clipping."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.keep(trainer, pl_module))

    def keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def take() -> None:
            for name, parameter in pl_module.named_parameters():
                grad = parameter.grad
                grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
                self.gradients[name.replace("_fsdp_wrapped_module.", "")] = grad.clone()

        root = trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(root, with_grads=True):
                take()
        else:
            take()


def data(processes: int) -> DataLoader:
    """Every process its share of the same batches of eight; Lightning's own sampler would shuffle."""
    dataset = models.tokens(32).dataset
    sampler = DistributedSampler(
        dataset, processes, int(os.environ.get("RANK", 0)) % processes, shuffle=False
    )
    return DataLoader(dataset, batch_size=8 // processes, sampler=sampler)


def fit(
    folder: Path,
    processes: int,
    module: models.Job | None = None,
    locater: LocAteR | None = None,
    **arguments,
) -> dict:
    keep, spectrum = KeepGradients(), QKSpectrumMonitor(report=False, singular=True)
    attention = AttentionMonitor(rows=None, report=False)
    hidden = HiddenStateMonitor(tokens=None, sequences=None, report=False)
    tokens = TokenMonitor(tokens=None, predict_every=1, report=False)
    as_loss = module is not None and module.extra_loss is not None
    trainer = models.trainer(
        [spectrum, attention, hidden, tokens, *([] if as_loss else [locater or LocAteR(WEIGHT)]), keep],
        max_steps=2,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **arguments,
    )
    trainer.fit(module or Configured(), data(processes))
    histories = {
        "spectrum": spectrum.history,
        "attention": attention.history,
        "hidden": hidden.history,
        "tokens": tokens.history,
        "pred": tokens._predictions.history,
    }
    return {
        "gradients": keep.gradients,
        **{key: {name: own.series(name) for name in own.statistics} for key, own in histories.items() if own},
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "notes": spectrum.notes + attention.notes + hidden.notes,
        "notes of tokens": tokens.notes,
    }


def by_tokens() -> LocAteR:
    """All tokens of a step's eight sequences besides their first ones, of all processes together."""
    return LocAteR("20%", sigma="tokens", tokens=8 * 15)


def run(folder: Path, processes: int) -> None:
    results = {}
    setups = {
        "plain": {},
        "clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        "clamped": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        "half": {"precision": "bf16-mixed"},
    }
    if processes == 1:
        for setup, arguments in setups.items():
            results[setup] = fit(folder, 1, **arguments)
        results["tokens"] = fit(folder, 1, locater=by_tokens())
        torch.save(results, folder / "alone.pt")
        return
    two = {"devices": 2}
    for setup in ("plain", "clipped", "half"):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        results[f"fsdp2 {setup}"] = fit(folder, 2, strategy=strategy, **two, **setups[setup])
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    results["fsdp2 tokens"] = fit(folder, 2, locater=by_tokens(), strategy=strategy, **two)
    for name, blocks in (("blocks", True), ("whole", False)):
        # Gathered weights of the outermost group stay so between forward and backward.
        module = Configured(lambda job: WEIGHT * locater_penalty(job), blocks)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        results[f"fsdp2 loss {name} plain"] = fit(folder, 2, module, strategy=strategy, **two)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    results["tp plain"] = fit(folder, 1, strategy=strategy, **two)
    results["ddp static plain"] = fit(folder, 2, strategy=DDPStrategy(static_graph=True), **two)
    results["ddp unused plain"] = fit(folder, 2, strategy=DDPStrategy(find_unused_parameters=True), **two)
    results["zero1 plain"] = fit(folder, 2, Partitioned(), strategy="ddp", **two)
    wrap = {type(models.llama().model.layers[0])}
    for setup in ("plain", "clamped"):
        strategy = CPUFSDPStrategy(auto_wrap_policy=wrap)
        results[f"fsdp {setup}"] = fit(folder, 2, strategy=strategy, **two, **setups[setup])
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
