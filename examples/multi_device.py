"""Two processes train one model: data parallel (DDP), or weights in shards (FSDP2).

    python examples/multi_device.py                     # DDP, two CPU processes (--accelerator gpu: two GPUs)
    python examples/multi_device.py --strategy fsdp2

The same by config, without a script:

    lightning-qk fit --config configs/quickstart.yaml --config configs/ddp.yaml
    torchrun --nproc_per_node=2 --no-python \\
        lightning-qk fit --config configs/quickstart.yaml --config configs/fsdp2.yaml

The callbacks are those of one process: values are pooled over processes, sharded weights gathered one layer at a
time, and the first process alone logs and writes the report. Look at the last line: the number of measurements,
and the entropy that every process agrees on.

Time: 24 processor seconds, one thread; ``--steps 4`` to see that it works.
"""

import argparse

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor, TextDataModule, TransformerModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="runs/multi_device")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    if options.strategy == "ddp":
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    else:
        strategy = ModelParallelStrategy(data_parallel_size=options.devices, tensor_parallel_size=1)
    attention = AttentionMonitor()
    trainer = L.Trainer(
        max_steps=options.steps,
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=strategy,
        log_every_n_steps=max(1, options.steps // 6),
        limit_val_batches=min(5, options.steps),
        logger=CSVLogger(options.out, name=None, version=""),
        callbacks=[QKSpectrumMonitor(), attention, LocAteR()],
        default_root_dir=options.out,
    )
    module = TransformerModule(
        {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128}, lr=2e-3
    )
    # batch_size counts for each process.
    trainer.fit(module, TextDataModule(block_size=128, batch_size=8, max_characters=1_000_000))
    entropy = trainer.callback_metrics["attn/entropy/mean"]
    print(f"process {trainer.global_rank}: {len(attention.history)} measurements, entropy {entropy:.4f} nats")


if __name__ == "__main__":
    main()
