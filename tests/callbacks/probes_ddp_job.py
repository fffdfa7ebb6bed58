"""Run by torchrun in two processes: AttentionProbes, of which one probe fails on one rank."""

import os
import sys
from pathlib import Path

import models
import torch
from ddp_job import data, job

from lightning_qk import AttentionProbes


def marks(call):
    if os.environ.get("RANK") == "1":
        raise OSError("no marks here")
    return call["input_ids"] < 20


def run(folder: Path, processes: int) -> None:
    callback = AttentionProbes(
        ["explanation", "exchangeability", "parallel_context", "irrelevant"],
        tokens=16,
        irrelevant=marks,
        heads=True,
    )
    arguments = {"use_distributed_sampler": False, "default_root_dir": str(folder / str(processes))}
    if processes > 1:
        arguments |= {"strategy": "ddp", "devices": processes}
    trainer = models.trainer([callback], **arguments)
    trainer.validate(job(), data(processes), verbose=False)
    results = {
        "values": {name: callback.history.series(name)[0] for name in callback.history.statistics},
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "notes": callback.notes,
    }
    torch.save(results, folder / f"{processes}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
