"""Whatever fails inside of a guard, training goes on, with the losses that it has without one."""

import errno
import inspect
import os
import shutil
import warnings
from pathlib import Path

import lightning as L
import models
import pytest
import torch

from lightning_qk import CollapseGuard, QKClip
from lightning_qk.callbacks.guard import _acting, _healthy, _pending, _rate, _remedy, _watch
from lightning_qk.callbacks.guard import guard as module
from lightning_qk.callbacks.guard._healthy import CHECKPOINT_NAME
from lightning_qk.guard.detector import CollapseDetector, Sensitivity

STEPS = 12
ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    torch.linalg.LinAlgError("it did not converge"),
    torch.OutOfMemoryError("out of memory"),
    KeyError("layer"),
]


def train(guard, folder, *callbacks, network=None):
    torch.manual_seed(1)
    job = (
        models.Job(network, lr=1e-3, optimizer="adamw") if network else models.Job(lr=1e-3, optimizer="adamw")
    )
    everyone = [*callbacks, *([guard] if guard else [])]
    trainer = models.trainer(everyone, max_steps=STEPS, max_epochs=-1, default_root_dir=folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(job, models.tokens(64))
    assert trainer.global_step == STEPS
    own = [str(one.message) for one in said if "CollapseGuard" in str(one.message)]
    assert len(own) == len(set(own))  # nothing twice
    return torch.cat([p.detach().flatten() for p in job.parameters()]), own


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(None, tmp_path_factory.mktemp("plain"))[0]


def inner_calls():
    """Everything that the guard's hooks call of its own parts, found by looking."""
    parts = [
        (_watch.ReadingSource, {"__init__"}),
        (_watch.HiddenCosine, {"__init__"}),
        (_rate.RateLimit, {"__init__", "reset"}),
        (_remedy.Dormant, {"__init__", "check", "always", "call", "agree"}),
        (_pending.StepLosses, {"__init__", "state_dict", "load_state_dict"}),
        (CollapseDetector, {"__init__", "restart"}),
        (
            _healthy.HealthyCheckpoint,
            {"__init__", "begin", "doubt", "state_dict", "load_state_dict"},
        ),
        (_watch.QuietAttention, {"__init__"}),
        (_watch.QuietSpectrum, {"__init__"}),
    ]
    for kind, left in parts:
        for name, found in vars(kind).items():
            if inspect.isfunction(found) and name not in left and not name.startswith("__"):
                yield kind, name
    for name in ("log_scalars", "describe_config"):
        yield module, name
    for name in ("log_alert", "run_directory"):
        yield _acting, name
    for name in (
        "part",
        "publish",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_fit_start",
        "teardown",
    ):
        yield _watch.QuietAttention, name
    yield L.Trainer, "save_checkpoint"
    yield L.LightningModule, "log_dict"
    yield os, "fsync"
    yield Path, "replace"
    yield Path, "unlink"
    yield torch, "save"


CALLS = list(inner_calls())


@pytest.mark.parametrize(("where", "name"), CALLS, ids=[f"{w.__name__}.{n}" for w, n in CALLS])
def test_a_fault_inside_neither_ends_nor_changes_a_training(where, name, plain, tmp_path, monkeypatch):
    error = ERRORS[len(where.__name__ + name) % len(ERRORS)]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, name, fail)
    watches_updates = where in (_watch.ReadingSource, _watch.QuietSpectrum)
    guard = CollapseGuard(
        every_n_steps=1,
        rollback=True,
        checkpoint_every=1,
        sensitivity=Sensitivity(update=1e6) if watches_updates else None,
    )
    weights, own = train(guard, tmp_path)
    assert torch.equal(weights, plain)
    assert len(own) <= 2
    monkeypatch.undo()
    if (where, name) != (Path, "unlink"):
        assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("error", [KeyboardInterrupt()])
def test_an_interruption_passes(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(CollapseDetector, "observe", fail)
    guard = CollapseGuard(every_n_steps=1)
    trainer = models.trainer([guard], max_steps=4, default_root_dir=tmp_path)
    with pytest.raises(SystemExit):
        trainer.fit(models.Job(), models.tokens(16))
    assert trainer.global_step == 1


def removed(folder):
    shutil.rmtree(folder, ignore_errors=True)


def candidate_removed(folder):
    for path in folder.rglob(f"{CHECKPOINT_NAME}.new"):
        path.unlink()


def a_folder_in_its_place(folder):
    path = folder / CHECKPOINT_NAME
    if not path.is_dir():
        path.unlink(missing_ok=True)
        (path / "inner").mkdir(parents=True)


def a_file_for_a_folder(folder):
    if folder.is_dir():
        shutil.rmtree(folder)
        folder.write_bytes(b"")


@pytest.mark.parametrize("damage", [removed, candidate_removed, a_folder_in_its_place, a_file_for_a_folder])
def test_files_that_others_change(damage, plain, tmp_path):
    folder = tmp_path / "run"

    class Clean(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            damage(folder)

    guard = CollapseGuard(every_n_steps=1, rollback=True, checkpoint_every=1)
    weights, own = train(guard, folder, Clean())
    assert torch.equal(weights, plain)
    assert sum("keeps no more checkpoints" in one for one in own) <= 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a_write_that_breaks_off_leaves_nothing(plain, tmp_path, monkeypatch):
    def half(self, path, **_):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"PK\x03\x04half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", half)
    weights, own = train(CollapseGuard(every_n_steps=1, checkpoint_every=1), tmp_path)
    assert torch.equal(weights, plain)
    assert ["keeps no more checkpoints" in one for one in own] == [True]
    assert not list(tmp_path.rglob(f"{CHECKPOINT_NAME}*"))


def test_one_reading_that_fails_is_one_reading(tmp_path, monkeypatch):
    observe = CollapseDetector.observe

    def fail(self, reading):
        if reading.step == 4:
            raise torch.linalg.LinAlgError("it did not converge")
        return observe(self, reading)

    monkeypatch.setattr(CollapseDetector, "observe", fail)
    guard = CollapseGuard(every_n_steps=1)
    _, own = train(guard, tmp_path)
    assert guard.event_log.curves.steps == [step for step in range(STEPS) if step != 4]
    assert own == []


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start", "on_train_batch_end", "kept"])
def test_a_remedy_that_raises_is_left_out(hook, tmp_path, monkeypatch):
    from guard_job import Sharpen

    def fail(*_, **__):
        raise ValueError("it cannot")

    remedy = QKClip(5.0)
    monkeypatch.setattr(remedy, hook, fail)
    _, own = train(CollapseGuard(remedy, every_n_steps=1, checkpoint_every=1), tmp_path, Sharpen(2, 8))
    assert any("it cannot" in one for one in own)


def test_without_attention_the_loss_is_watched(tmp_path):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 1)

        def training_step(self, batch, index):
            loss = self.layer(batch.float()).square().mean()
            return loss * float("nan") if self.global_step == 5 else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    guard = CollapseGuard(every_n_steps=1)
    trainer = models.trainer([guard], max_steps=8, max_epochs=-1, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="attention cannot be watched, the training loss is"):
        trainer.fit(Plain(), models.tokens(64))
    assert trainer.global_step == 8
    assert "loss is nan" in guard.verdicts[0].reason


def test_where_warnings_are_errors(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(CollapseDetector, "observe", lambda *_: 1 / 0)
    torch.manual_seed(1)
    job = models.Job(lr=1e-3, optimizer="adamw")
    trainer = models.trainer([CollapseGuard(every_n_steps=1)], max_steps=4, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CollapseGuard")
        trainer.fit(job, models.tokens(64))
    assert trainer.global_step == 4
