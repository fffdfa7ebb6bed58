"""What belongs to one fit, what goes into a pickle, and where monitors stand among callbacks."""

import pickle

import lightning as L
import models
import pytest
import torch

import lightning_qk
from lightning_qk import QKSpectrumMonitor, head_projections
from lightning_qk.callbacks._monitor import Monitor
from lightning_qk.functional import qk_moments

EXPORTED = [getattr(lightning_qk, name) for name in lightning_qk.__all__ if name != "__version__"]
MONITORS = [one for one in EXPORTED if isinstance(one, type) and issubclass(one, Monitor)]


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
