"""Run by torchrun in two processes: gradients of a penalty's callback and of the same term in the loss."""

import os
import sys
from pathlib import Path

import lightning as L
import models
import torch
from penalty_oracle import Term, build, divergence
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk import AttentionPrior, DifferentiableAttentionMask

WEIGHT = 3.0


class Keep(L.Callback):
    def __init__(self):
        self.gradients = {}

    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.keep(pl_module))

    def keep(self, pl_module):
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def fit(loss=None, callbacks=(), model=None):
    dataset = models.tokens(32).dataset
    sampler = DistributedSampler(dataset, 2, int(os.environ["RANK"]), shuffle=False)
    keep = Keep()
    trainer = models.trainer(
        [*callbacks, keep], max_steps=1, strategy="ddp", devices=2, use_distributed_sampler=False
    )
    L.seed_everything(3, verbose=False)
    model = build("gpt2") if model is None else model
    trainer.fit(models.Job(model, loss=loss), DataLoader(dataset, batch_size=4, sampler=sampler))
    return keep.gradients, trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Term(divergence(torch.eye(16)), WEIGHT).listening("gpt2") as term:
        want, _ = fit(term)
    got, trainer = fit(callbacks=[AttentionPrior(weight=WEIGHT, prior="diagonal")])
    none, _ = fit()
    gated, _ = fit(callbacks=[DifferentiableAttentionMask(max_length=16, weight=0.01)], model=build("llama"))
    results = {
        "term": want,
        "callback": got,
        "none": none,
        "gates": {name: grad for name, grad in gated.items() if "attention_gates" in name},
        "own": term.values[-1],
        "logged": float(trainer.callback_metrics["attention_prior/kl"]),
    }
    torch.save(results, Path(sys.argv[1]) / f"{trainer.global_rank}.pt")
