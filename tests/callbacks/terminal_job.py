"""Trains a sick model in a terminal, once for each width and bar, with a bar of several lines.

Arguments: a folder, then bars such as ``80-rich``.
"""

import fcntl
import struct
import sys
import termios
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from models import gpt2

from lightning_qk import AttentionMonitor, QKSpectrumMonitor


class Job(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = gpt2()
        with torch.no_grad():
            for block in self.net.transformer.h:
                block.attn.c_attn.weight *= 100

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.net(input_ids=batch, labels=batch).loss
        for index in range(4):
            self.log(f"a_metric_with_a_long_name_{index}", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def main(folder: str, *cases: str) -> None:
    for case in cases:
        columns, bar = case.split("-")
        fcntl.ioctl(sys.stdout.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 40, int(columns), 0, 0))
        print(f"BEGIN {case}", flush=True)
        trainer = L.Trainer(
            max_steps=4,
            log_every_n_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=str(Path(folder) / case),
            callbacks=[
                {"rich": RichProgressBar, "tqdm": TQDMProgressBar}[bar](),
                QKSpectrumMonitor(),
                AttentionMonitor(),
            ],
        )
        trainer.fit(
            Job(), torch.utils.data.DataLoader(torch.randint(0, 30, (16, 16)), batch_size=4, num_workers=0)
        )
    print("END", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
