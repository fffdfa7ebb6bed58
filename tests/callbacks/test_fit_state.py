"""What belongs to one fit, what goes into a pickle, and where monitors stand among callbacks."""

import contextlib
import copy
import dataclasses
import pickle

import intervention_jobs
import lightning as L
import models
import pytest
import torch

import lightning_qk
from lightning_qk import CollapseGuard, QKClip, QKSpectrumMonitor, head_projections
from lightning_qk.callbacks.monitors._base import Monitor
from lightning_qk.functional import qk_moments
from lightning_qk.guard.detector import CollapseDetector

EXPORTED = [getattr(lightning_qk, name) for name in lightning_qk.__all__ if name != "__version__"]
CALLBACKS = [one.__name__ for one in EXPORTED if isinstance(one, type) and issubclass(one, L.Callback)]
MONITORS = [one for one in EXPORTED if isinstance(one, type) and issubclass(one, Monitor)]


def make(name):
    """A callback beside a guard; None where it is the guard or the remedy that the guard has."""
    if name in ("CollapseGuard", "QKClip"):
        return None
    if name in intervention_jobs.KINDS:
        return intervention_jobs.make(name, modules="*.h.0.attn")
    return getattr(lightning_qk, name)()


class Shrink(L.Callback):
    """An editor of the user's own."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.9)


def fit(callbacks, seed):
    torch.manual_seed(seed)
    job = models.Job(lr=0.05)
    models.trainer(callbacks, max_steps=2, limit_val_batches=1).fit(job, models.tokens(8), models.tokens(4))
    return job


@pytest.mark.parametrize("kind", MONITORS, ids=lambda kind: kind.__name__)
def test_a_second_fit_is_that_of_a_fresh_callback_and_pickles(kind):
    used, fresh = kind(), kind()
    fit([used], 1)
    fit([used], 2)
    fit([fresh], 2)
    copies = [pickle.loads(pickle.dumps(one)) for one in (used, fresh)]
    first, second = (one.state_dict() for one in copies)
    assert vars(copies[0]).keys() == vars(copies[1]).keys()
    if fresh.history is not None:
        assert used.history.steps == fresh.history.steps
        for name, want in fresh.history.values.items():
            for a, b in zip(used.history.values[name], want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert first.keys() == second.keys()
    assert used.notes == fresh.notes


@pytest.mark.parametrize("is_first", [True, False])
def test_monitors_observe_after_an_editor(is_first):
    monitor = QKSpectrumMonitor()
    job = fit([monitor, Shrink()] if is_first else [Shrink(), monitor], 3)
    want = torch.stack([qk_moments(h.query, h.key)["sym_var"] for h in head_projections(job).values()])
    torch.testing.assert_close(monitor.history.grid("sym_var"), want.detach())


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_every_callback_pickles_after_a_fit_in_which_a_guard_clips(name, ends, monkeypatch, tmp_path):
    """And while it runs, with all that the guard holds by then."""
    clip = QKClip(1.0, modules="*.h.1.attn")
    guard = CollapseGuard(clip, every_n_steps=1, rollback=True, lr_factor=0.5, lr_warmup=2)
    observe = CollapseDetector.observe
    monkeypatch.setattr(
        CollapseDetector,
        "observe",
        lambda self, reading: dataclasses.replace(observe(self, reading), fired=True, reason="woken"),
    )
    own = make(name)
    callbacks = [own, guard] if own is not None else [guard]
    copies = []

    class Copies(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.extend(pickle.loads(pickle.dumps(one)) for one in callbacks)
            if ends == "by an error" and batch_idx == 1:
                raise KeyError("an error of the job's own")

    job = models.Job(lr=0.05)
    trainer = models.trainer([*callbacks, Copies()], max_steps=3, default_root_dir=tmp_path)
    with pytest.raises(KeyError) if ends == "by an error" else contextlib.nullcontext():
        trainer.fit(job, models.tokens(16))
    assert guard.verdicts
    assert guard._remedy.is_awake
    assert guard.remedies[0].maxima
    for one in callbacks:
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is type(one)
        copy.deepcopy(one)
    assert [verdict.step for verdict in again.verdicts] == [verdict.step for verdict in guard.verdicts]
    assert again.remedies[0].maxima.keys() == guard.remedies[0].maxima.keys()
    assert len(copies) >= 2 * len(callbacks)
