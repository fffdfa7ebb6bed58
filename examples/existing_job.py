"""A Lightning job as it was, and what it takes to watch its attention: an import and three lines with a plus.

    python examples/existing_job.py

Nothing else of the job knows of lightning-qk: take the marked lines out and it trains as before. Look at the table
of layers that is printed at the end, at the page ``lightning_qk_report.html`` in the folder that it names, and at
the new columns ``qk/…``, ``attn/…`` and ``locater/…`` of the ``metrics.csv`` beside it.

Time: 76 processor seconds, one thread; ``--steps 4`` to see that it works.
"""

import argparse
import sysconfig
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor  # +


class Job(L.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128, "vocab_size": 256}
        self.net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def training_step(self, batch, batch_idx):
        loss = self.net(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def blocks(length):
    """Bytes of the standard library's modules, cut into rows."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)[:1_000_000]
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return data[: len(data) // length * length].view(-1, length)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="runs/existing_job")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=options.steps,
        accelerator="auto",
        devices=1,
        log_every_n_steps=max(1, options.steps // 20),
        logger=CSVLogger(options.out, name=None, version=""),
        callbacks=[
            L.pytorch.callbacks.ModelCheckpoint(save_last=True),
            QKSpectrumMonitor(),  # + eigenvalues of every head's W_QK
            AttentionMonitor(),  # + entropy, sinks, the largest logit
            LocAteR(),  # + regularizes; leave it out to look on only
        ],
    )
    trainer.fit(Job(), DataLoader(blocks(128), batch_size=16, shuffle=True))


if __name__ == "__main__":
    main()
