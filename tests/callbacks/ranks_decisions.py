"""What else fails in one of the two processes of ranks_job: what is decided together, and what is changed."""

import os
from contextlib import nullcontext
from pathlib import Path

import models
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from ranks_failing import Failing
from sharded_strategies_job import Configured
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk import (
    AttentionPrior,
    AttentionProbes,
    CollapseGuard,
    LocAteR,
    QKClip,
    QKSpectrumMonitor,
    UpdateCap,
)
from lightning_qk.callbacks import _self_check
from lightning_qk.callbacks.guard import _watch
from lightning_qk.callbacks.interventions import qk_clip
from lightning_qk.callbacks.monitors import probes, spectrum
from lightning_qk.interventions import penalties, update_cap
from lightning_qk.metrics import singular
from lightning_qk.metrics import spectrum as moments
from lightning_qk.regularizers import locater

ALWAYS = range(1, 10_000)
SECOND = range(2, 3)


class Resumed(QKSpectrumMonitor):
    """Of a run that goes on: it reads the weights at the start."""

    def find_layers(self, trainer, pl_module):
        super().find_layers(trainer, pl_module)
        self.load_state_dict({"singular": {"before": {}, "norms": {}}})


def awake(remedy):
    guard = CollapseGuard(remedy, every_n_steps=1, checkpoint_every=0)
    guard._remedy.is_awake = True
    return guard


def spectra():
    return QKSpectrumMonitor(singular=True, report=False)


WATCHING = {
    "a guard's begin": (lambda: CollapseGuard(every_n_steps=1), _watch.ReadingSource, "begin", ALWAYS),
    "a guard's layers": (
        lambda: CollapseGuard(every_n_steps=1),
        _watch.QuietAttention,
        "find_layers",
        ALWAYS,
    ),
    "a guard's spectra": (
        lambda: CollapseGuard(every_n_steps=1),
        _watch.QuietSpectrum,
        "find_layers",
        ALWAYS,
    ),
    "what was found": (spectra, _self_check.Check, "settle", ALWAYS),
    "settled layers": (spectra, spectrum.QKSpectrumMonitor, "_settle", ALWAYS),
    "probed models": (lambda: AttentionProbes(["exchangeability"]), probes.AttentionProbes, "_find", ALWAYS),
    "probes logged": (
        lambda: AttentionProbes(["exchangeability"]),
        probes.AttentionProbes,
        "count_layers",
        ALWAYS,
    ),
    "sharded update": (spectra, moments.QKSpectrum, "update", ALWAYS),
    "sharded cores": (spectra, singular.SingularValues, "cores", ALWAYS),
    "between gathers of moments": (spectra, moments, "qk_products", range(3, 4)),
    "between gathers of cores": (spectra, singular, "qk_singular_core", range(3, 4)),
    "sharded recall": (
        lambda: Resumed(singular=True, report=False),
        singular.SingularValues,
        "cores",
        range(1, 2),
    ),
    "between gathers of a recall": (
        lambda: Resumed(singular=True, report=False),
        singular,
        "qk_singular_core",
        range(1, 2),
    ),
}
"""Name → who watches, and what fails when: nothing of the training may change."""

CHANGING = {
    "cap": (lambda: UpdateCap(1e-4), update_cap, "subspace_iteration", range(6, 7)),
    "cap remembers": (lambda: UpdateCap(1e-4), update_cap, "_rows", range(6, 7)),
    "penalty": (lambda: LocAteR(0.5), locater, "penalty_and_gradients", SECOND),
    "penalty of means": (lambda: LocAteR(0.5, form="target"), locater.LocaterPenalty, "refresh", SECOND),
    "sharded penalty": (lambda: LocAteR(0.5), locater, "penalty_and_gradients", range(3, 4)),
    "sharded means": (lambda: LocAteR(0.5, form="target"), locater, "penalty_and_gradients", range(4, 5)),
    "clip": (lambda: QKClip(0.5), qk_clip, "apply_clip", SECOND),
    "clip's maxima": (lambda: QKClip(0.5), qk_clip.QKClip, "_own_maxima", SECOND),
    "remedy after a batch": (lambda: awake(QKClip(0.5)), qk_clip.QKClip, "on_train_batch_end", SECOND),
    "remedy before a batch": (lambda: awake(QKClip(0.5)), qk_clip.QKClip, "on_train_batch_start", SECOND),
    "remedy of gradients": (lambda: awake(LocAteR(0.5)), LocAteR, "on_before_optimizer_step", SECOND),
    "one of two remedies": (
        lambda: awake([LocAteR(0.5), QKClip(0.5)]),
        LocAteR,
        "on_train_batch_start",
        SECOND,
    ),
    "attention's penalty": (lambda: AttentionPrior(prior="diagonal"), penalties.Auxiliary, "take", ALWAYS),
}
"""The same of what changes a training: both processes have the same weights."""

BOTH = ("penalty", "sharded penalty", "clip", "cap")
"""What also fails on both processes, which has to come to the same."""


def fit(callbacks: list, folder: Path, is_sharded: bool) -> dict:
    torch.manual_seed(3)
    data = models.tokens(32).dataset
    loader = DataLoader(
        data, batch_size=4, sampler=DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False)
    )
    strategy = (
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if is_sharded else DDPStrategy()
    )
    job = Configured() if is_sharded else models.Job(lr=0.05)
    probed = any(isinstance(one, AttentionProbes) for one in callbacks)
    trainer = models.trainer(
        callbacks,
        max_steps=2,
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
        default_root_dir=folder,
        limit_val_batches=int(probed),
        val_check_interval=2,
    )
    trainer.fit(job, loader, loader if probed else None)
    weights = [parameter.detach() for parameter in job.parameters()]
    return {
        "losses": torch.stack(job.losses),
        "weights": [
            (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone() for weight in weights
        ],
    }


def run(folder: Path) -> dict:
    """What each fit came to: one process fails, then for some both."""
    rank = int(os.environ["RANK"])
    results = {("plain", is_sharded): fit([], folder, is_sharded) for is_sharded in (False, True)}
    for index, (name, (make, owner, attribute, calls)) in enumerate((WATCHING | CHANGING).items()):
        is_sharded = "sharded" in name or "gathers" in name
        for who in ((index % 2,), *([(0, 1)] if name in BOTH else [])):
            print(rank, name, who, flush=True)
            failing = Failing(calls)
            with failing.at(owner, attribute) if rank in who else nullcontext():
                found = fit([make()], folder, is_sharded)
            results[name, len(who)] = {
                **found,
                "failed": failing.count >= calls.start,
                "is_sharded": is_sharded,
            }
    return results
