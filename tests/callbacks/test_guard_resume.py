"""A resumed run goes on as one that was never interrupted, and takes no file that is not shown to be its own."""

import copy
import pickle

import lightning as L
import models
import pytest
import torch
from guard_job import Sharpen

from lightning_qk import AttentionMonitor, CollapseGuard, QKClip, QKSpectrumMonitor
from lightning_qk.callbacks.guard._healthy import CHECKPOINT_NAME, holds
from lightning_qk.guard.detector import Sensitivity

STEPS = 24


class Saves(L.Callback):
    """A checkpoint of the job's own after some steps."""

    def __init__(self, folder, *steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.path(trainer.global_step))

    def path(self, step):
        return self.folder / f"own-{step}.ckpt"


def callbacks(kind, guard):
    own = [AttentionMonitor(1, rows=None, report=False, figures_every=0)]
    own += [QKSpectrumMonitor(1, report=False, figures_every=0)]
    return {"quiet": [guard], "updates": [guard], "before": [guard, *own], "after": [*own, guard]}[kind]


def fit(folder, seed, kind="quiet", every=1, path=None, save=(), steps=STEPS, checkpoint_every=2):
    guard = CollapseGuard(
        QKClip(5.0),
        every_n_steps=every,
        rollback=True,
        lr_factor=0.5,
        lr_warmup=3,
        checkpoint_every=checkpoint_every,
        sensitivity=Sensitivity(update=3.0) if kind == "updates" else None,
    )
    torch.manual_seed(seed)
    job = models.Job(lr=1e-3, optimizer="adamw")
    for module in job.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # Lightning's checkpoints have no state of random generators
    # The job's own come last, as ModelCheckpoint does.
    trainer = models.trainer(
        [Sharpen(13, 20), *callbacks(kind, guard), Saves(folder, *save)],
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
    )
    trainer.fit(job, models.tokens(4), ckpt_path=path, weights_only=False)
    return guard, torch.cat([p.detach().flatten() for p in job.parameters()])


def same(one, other):
    assert one[0].verdicts == other[0].verdicts != []
    assert one[0].rolled_back_to == other[0].rolled_back_to is not None
    assert one[0].event_log.curves.steps == other[0].event_log.curves.steps
    curves = [guard.event_log.curves.series("guard/score").tolist() for guard, _ in (one, other)]
    assert curves[0] == curves[1]
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("kind", "every"),
    [("quiet", 1), ("quiet", 3), ("updates", 1), ("updates", 2), ("before", 1), ("after", 2)],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, seed, kind, every):
    at = (4, 13, 17)
    # What goes on after each of these checkpoints is an abandoned later run for those that resume.
    whole = fit(tmp_path, seed, kind, every, save=at)
    # A guard whose remedies edit weights comes before the monitors: it judges a step when the next begins, and the
    # last one at the end.
    assert whole[0].event_log.curves.steps == list(range(every - 1, STEPS, every))
    for step in at:
        resumed = fit(tmp_path, seed, kind, every, path=tmp_path / f"own-{step}.ckpt")
        same(whole, resumed)


def test_the_start_is_gone_back_to_and_not_what_an_abandoned_run_left(tmp_path):
    whole = fit(tmp_path, 3, save=(5,), checkpoint_every=1)
    assert whole[0].rolled_back_to is not None
    resumed = fit(tmp_path, 3, path=tmp_path / "own-5.ckpt", checkpoint_every=1)
    same(whole, resumed)


def test_a_file_of_another_run_is_never_taken(tmp_path):
    whole = fit(tmp_path, 0, save=(8,), steps=9)
    assert whole[0]._healthy.step is not None
    for path in tmp_path.glob(f"{CHECKPOINT_NAME}*"):
        path.unlink()
    other = fit(tmp_path, 5, steps=12)  # a run of its own in the same folder
    (tmp_path / CHECKPOINT_NAME).stat()
    with pytest.warns(UserWarning, match="is gone, or what lies there is another"):
        resumed = fit(tmp_path, 0, path=tmp_path / "own-8.ckpt", steps=9)
    mark = resumed[0]._healthy._current.mark
    assert mark.split(":")[1] == whole[0]._healthy._run != other[0]._healthy._run
    assert holds(tmp_path / CHECKPOINT_NAME, mark)


def test_a_checkpoint_holds_its_own_identity_alone(tmp_path):
    guard, _ = fit(tmp_path, 0, save=(12,), steps=13)
    current = guard._healthy._current
    assert holds(tmp_path / CHECKPOINT_NAME, current.mark)
    assert not holds(tmp_path / "own-12.ckpt", current.mark)  # refers to it
    whole = (tmp_path / CHECKPOINT_NAME).read_bytes()
    (tmp_path / CHECKPOINT_NAME).write_bytes(whole[: len(whole) // 2])
    assert not holds(tmp_path / CHECKPOINT_NAME, current.mark)


def test_the_healthy_checkpoint_itself_is_one_to_resume_from(tmp_path):
    fit(tmp_path, 0, steps=13)
    again = tmp_path / "again.ckpt"
    again.write_bytes((tmp_path / CHECKPOINT_NAME).read_bytes())
    guard, _ = fit(tmp_path, 0, path=again, steps=13)
    assert guard.event_log.curves.steps == list(range(13))


def test_a_second_fit_is_a_new_run(tmp_path):
    guard, _ = fit(tmp_path / "one", 0)
    assert guard.verdicts
    again = pickle.loads(pickle.dumps(copy.deepcopy(guard)))
    assert [type(one) for one in again.remedies] == [QKClip]

    def fold(own, folder):
        torch.manual_seed(2)
        job = models.Job(lr=1e-3, optimizer="adamw")
        trainer = models.trainer([own], max_steps=10, max_epochs=-1, default_root_dir=folder)
        trainer.fit(job, models.tokens(64))
        return torch.cat([p.detach().flatten() for p in job.parameters()])

    fresh = CollapseGuard(
        QKClip(5.0), every_n_steps=1, rollback=True, lr_factor=0.5, lr_warmup=3, checkpoint_every=2
    )
    want = fold(fresh, tmp_path / "fresh")
    for number, own in enumerate((guard, again)):
        assert torch.equal(want, fold(own, tmp_path / f"fold{number}"))
        assert own.verdicts == []
        assert own.rolled_back_to is None
        assert own._rate.factor == 1
        assert own.event_log.curves.steps == fresh.event_log.curves.steps
        assert not own._remedy.is_awake
