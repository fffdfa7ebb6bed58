"""What holds for every callback that changes a training: resumes, second fits, copies."""

import copy
import pickle

import lightning as L
import pytest
from intervention_jobs import EDITORS, KINDS, Seeded, account, assert_same, data, fit, make, weights

from lightning_qk import QKClip, UpdateCap
from lightning_qk.callbacks.interventions._base import Intervention


def test_there_are_interventions():
    assert {"QKClip", "UpdateCap", "SigmaReparam", "LocAteR", "SoftCap", "SpectrumScaling"} <= KINDS.keys()
    assert set(EDITORS) == {"QKClip", "UpdateCap", "SigmaReparam"}
    for name in KINDS:
        callback = make(name)
        assert isinstance(callback, Intervention)
        assert callback.kept()["account"] == callback.event_log.state_dict()


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_is_one_that_was_not_interrupted(name, tmp_path):
    whole = make(name)
    logged = {"log_every_n_steps": 3}
    _, want = fit([whole], max_steps=8, val=True, **logged)
    half, path = make(name), tmp_path / "half.ckpt"
    trainer, _ = fit([half], max_steps=4, val=True, **logged)
    trainer.save_checkpoint(path)
    resumed = make(name)
    _, got = fit([resumed], Seeded(seed=7), val=True, max_steps=8, ckpt=path, **logged)
    assert_same(weights(got), weights(want))
    assert account(resumed) == account(whole)


@pytest.mark.parametrize("name", KINDS)
def test_a_second_fit_is_that_of_a_new_callback(name):
    callback, fresh = make(name), make(name)
    fit([callback], Seeded(seed=1), max_steps=3, val=True)
    _, got = fit([callback], Seeded(seed=2), max_steps=3, val=True)
    _, want = fit([fresh], Seeded(seed=2), max_steps=3, val=True)
    assert_same(weights(got), weights(want))
    assert account(callback) == account(fresh)
    assert repr(callback.kept()) == repr(fresh.kept())


@pytest.mark.parametrize("name", KINDS)
def test_they_can_be_copied_and_pickled_after_a_fit(name):
    callback = make(name)
    pickle.loads(pickle.dumps(callback))
    fit([callback], max_steps=2, val=True)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert account(other) == account(callback)
        _, got = fit([other], max_steps=2, val=True)
        _, want = fit([make(name)], max_steps=2, val=True)
        assert_same(weights(got), weights(want))


class CopyInMidRun(L.Callback):
    def __init__(self, other):
        self.other = other
        self.copies = []

    def on_train_batch_end(self, *_):
        self.copies += [copy.deepcopy(self.other), pickle.loads(pickle.dumps(self.other))]


@pytest.mark.parametrize("name", KINDS)
def test_they_can_be_copied_while_they_work(name):
    callback = make(name)
    fit([callback, own := CopyInMidRun(callback)], max_steps=2)
    assert len(own.copies) == 4


def test_two_of_one_key_keep_their_own_accounts(tmp_path):
    """Lightning refuses two callbacks of one key that have a ``state_dict``."""

    def pair():
        return [UpdateCap(1e-4, modules="*"), UpdateCap(1e-5, modules="*")]

    trainer, _ = fit(first := pair(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    fit(second := pair(), max_steps=3, ckpt=tmp_path / "run.ckpt")
    assert account(first[0]) != account(first[1])
    assert [account(one) for one in second] == [account(one) for one in first]


def test_a_test_from_a_checkpoint_leaves_the_account(tmp_path):
    clip = QKClip(1.0)
    trainer, job = fit([clip], max_steps=2)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    trainer, job = fit([clip], max_steps=5)
    before = account(clip)
    trainer.validate(job, data(8), ckpt_path=tmp_path / "early.ckpt", weights_only=False, verbose=False)
    assert account(clip) == before
