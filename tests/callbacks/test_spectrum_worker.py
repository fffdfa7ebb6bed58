"""Eigenvalues that come late: logged at their own step, bounded in number, none lost."""

import gc
import threading
import weakref

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_monitors import read_csv

from lightning_qk import QKSpectrumMonitor, head_projections
from lightning_qk.callbacks.monitors._report import RECORD_NAME
from lightning_qk.functional import qk_eigenvalues
from lightning_qk.metrics import eigenvalues as worker_module
from lightning_qk.record.history import RunRecord


class Radii(L.Callback):
    """The largest spectral radius after every step, by step, computed at once."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        heads = head_projections(pl_module).values()
        largest = max(qk_eigenvalues(head.query, head.key).abs().max().item() for head in heads)
        self.by_step[trainer.global_step - 1] = largest


def monitor(**kwargs) -> QKSpectrumMonitor:
    return QKSpectrumMonitor(**{"figures_every": 0, "report": False, **kwargs})


def logged(folder) -> dict[int, float]:
    key = "qk/spectral_radius/max"
    return {int(row["step"]): float(row[key]) for row in read_csv(folder) if key in row}


@pytest.mark.parametrize("every", [1, 3])
def test_logged_at_the_step_whose_weights_they_are(every, tmp_path):
    radii, spectrum = Radii(), monitor(every_n_steps=every)
    trainer = models.trainer([spectrum, radii], logger=CSVLogger(tmp_path), max_steps=7, max_epochs=-1)
    trainer.fit(models.Job(lr=0.3), models.tokens())
    measured = [step for step in range(7) if (step + 1) % every == 0]
    got = logged(tmp_path / "lightning_logs" / "version_0")
    assert list(got) == measured
    for step in measured:
        assert got[step] == pytest.approx(radii.by_step[step], rel=1e-5)
    assert spectrum.history.steps == [-1, *measured]
    of_history = spectrum.history.series("spectral_radius").amax(-1)[1:]
    torch.testing.assert_close(of_history, torch.tensor([radii.by_step[s] for s in measured]))
    newest = trainer.callback_metrics["qk/spectral_radius/max"].item()
    assert newest == pytest.approx(radii.by_step[measured[-1]], rel=1e-5)
    assert spectrum.notes == []


def test_training_goes_on_while_they_are_solved_and_two_snapshots_live_at_most(monkeypatch):
    alive: list[weakref.ref] = []
    most, steps_while_waiting = [], []
    release = threading.Event()
    solve = worker_module.solve_each

    def slow(cores):
        alive.extend(weakref.ref(part.matrices) for part in cores)
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        release.wait(0.2)
        return solve(cores)

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if not release.is_set():
                steps_while_waiting.append(trainer.global_step)

    monkeypatch.setattr(worker_module, "solve_each", slow)
    spectrum = monitor(every_n_steps=2)
    models.trainer([spectrum, Steps()], max_steps=6).fit(models.Job(), models.tokens())
    assert len(most) == 4  # the start and three measurements
    assert max(most) <= 2
    assert len(steps_while_waiting) == 6
    assert spectrum.history.series("spectral_radius").isfinite().all()


def test_none_is_lost_on_an_exception(tmp_path):
    class Fails(models.Job):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("the user's own error")
            return super().training_step(batch, batch_idx)

    trainer = models.trainer([monitor(report=True)], logger=CSVLogger(tmp_path))
    with pytest.raises(RuntimeError, match="the user's own error"):
        trainer.fit(Fails(), models.tokens())
    folder = tmp_path / "lightning_logs" / "version_0"
    record = RunRecord.load(folder / RECORD_NAME)
    assert record.spectrum.steps == [-1, 0, 1, 2]
    assert record.spectrum.series("spectral_radius").isfinite().all()
    assert record.eigenvalues_step == 2
    assert list(logged(folder)) == [0, 1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("lightning-qk")]


def test_none_is_lost_in_a_checkpoint(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    # Behind the monitor, so that step 1 was measured when it saves.
    trainer = models.trainer([monitor(), Save()], logger=CSVLogger(tmp_path))
    trainer.fit(models.Job(), models.tokens())
    state = torch.load(tmp_path / "middle.ckpt", weights_only=False)["callbacks"]
    history = next(value["history"] for name, value in state.items() if "QKSpectrumMonitor" in name)
    assert history["steps"] == [-1, 0, 1]
    assert history["values"]["spectral_radius"].isfinite().all()
    assert list(logged(tmp_path / "lightning_logs" / "version_0")) == [0, 1, 2, 3]


def test_an_eigenproblem_that_fails_is_said_once_and_training_goes_on(monkeypatch):
    def fail(cores):
        raise ArithmeticError("did not converge")

    monkeypatch.setattr(worker_module, "solve_each", fail)
    spectrum = monitor()
    trainer = models.trainer([spectrum])
    with pytest.warns(UserWarning, match=r"solving eigenproblems failed .*ArithmeticError: did not converge"):
        trainer.fit(models.Job(), models.tokens())
    assert trainer.global_step == 4
