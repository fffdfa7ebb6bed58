"""Train a small Llama on text, and read what became of its heads: from the run, and from the saved weights alone.

    python examples/causal_lm.py                       # the Python of this machine, no network
    python examples/causal_lm.py --source book.txt --tokenizer words
    lightning-qk inspect runs/causal_lm/model          # afterwards, from the weights alone

Rotary models have a form W_QK for each distance between query and key: ``offsets=(0, 1, 16)`` logs three of them,
``qk/offset_16/eig_mean/mean`` and so on. Look at the table of heads at the end: which attend by position (to the
token before, say), which by content, which to nothing in particular.

Time: 52 processor seconds, one thread; ``--steps 4`` to see that it works.
"""

import argparse

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from lightning_qk import (
    AttentionMonitor,
    HeadReport,
    LocAteR,
    QKSpectrumMonitor,
    TextDataModule,
    TransformerModule,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="text files, or a name on the hub")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, words, a folder, or a name on the hub")
    parser.add_argument("--locater", type=float, default=1.0, help="weight of the penalty; 0: none")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", default="runs/causal_lm")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    data = TextDataModule(
        options.source,
        "causal_lm",
        options.tokenizer,
        block_size=128,
        batch_size=16,
        max_characters=2_000_000,
    )
    module = TransformerModule(
        {
            "model_type": "llama",
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "causal_lm",
        lr=2e-3,
        schedule="cosine",
        warmup_steps=20,
        save_pretrained_to=f"{options.out}/model",
    )
    trainer = L.Trainer(
        max_steps=options.steps,
        accelerator="auto",
        devices=1,
        log_every_n_steps=max(1, options.steps // 30),
        val_check_interval=min(100, options.steps),
        check_val_every_n_epoch=None,
        limit_val_batches=min(15, options.steps),
        gradient_clip_val=1.0,
        logger=CSVLogger(options.out, name=None, version=""),
        callbacks=[
            QKSpectrumMonitor(offsets=(0, 1, 16)),
            AttentionMonitor(),
            LocAteR(options.locater, form="limit"),
        ],
        default_root_dir=options.out,
    )
    trainer.fit(module, data)

    batch = next(iter(data.val_dataloader()))
    HeadReport.from_model(module.network, [{"input_ids": batch["input_ids"]}]).print()


if __name__ == "__main__":
    main()
