"""Jobs for the tests of callbacks that change a training, and every such callback that the package exports."""

import inspect

import lightning as L
import models
import torch

import lightning_qk
from lightning_qk.callbacks.interventions._base import Intervention
from lightning_qk.record.history import RunRecord

# As strong as makes a difference within a few steps; whatever is not named here is made without arguments.
ARGUMENTS = {
    "AttentionPrior": {"weight": 1.0, "prior": "window"},
    "EntropyBand": {"low": 0.5, "high": 0.6, "weight": 1.0},
    "LocAteR": {"weight": 0.3, "form": "target"},
    "QKClip": {"cap": 1.0},
    "UpdateCap": {"cap": 1e-4, "iterations": 1},
}
KINDS = {
    name: value
    for name in lightning_qk.__all__
    if inspect.isclass(value := getattr(lightning_qk, name)) and issubclass(value, Intervention)
}
EDITORS = {name: kind for name, kind in KINDS.items() if "when" in inspect.signature(kind).parameters}


def make(name, **more):
    return KINDS[name](**ARGUMENTS.get(name, {}), **more)


class At(L.Callback):
    """Does something to the job once, after some step."""

    def __init__(self, action, step=2, hook="on_train_batch_end"):
        self.action, self.step = action, step
        setattr(self, hook, self._run)

    def _run(self, trainer, pl_module, *_):
        if trainer.global_step >= self.step and self.action is not None:
            action, self.action = self.action, None
            action(pl_module)


class Seeded(models.Job):
    """Random numbers of a step depend on the step alone."""

    def __init__(self, seed=0, model=None):
        torch.manual_seed(seed)
        super().__init__(models.gpt2() if model is None else model, lr=1e-2, optimizer="adamw")
        self.train()

    def training_step(self, batch, batch_idx):
        torch.manual_seed(1000 + self.global_step)
        # A resumed epoch begins with its first batches, as Lightning has it.
        batch = torch.randint_like(batch, 3, models.VOCABULARY)
        return super().training_step(batch, batch_idx)


def data(count=64):
    return models.tokens(count)


def fit(callbacks, job=None, val=False, ckpt=None, **arguments):
    job = Seeded() if job is None else job
    trainer = models.trainer(callbacks, **{"num_sanity_val_steps": 0, **arguments})
    more = {} if ckpt is None else {"ckpt_path": ckpt, "weights_only": False}
    trainer.fit(job, data(), data(8) if val else None, **more)
    return trainer, job


def weights(job):
    return {name: value.clone() for name, value in job.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def account(callback):
    record = RunRecord()
    callback.contribute(record)
    return record.scalars, record.events
