"""QKSpectrumMonitor with spectra of updates: of what the weights changed by between two measurements."""

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_monitors import read_csv
from test_spectrum_singular import Weights

from lightning_qk import QKSpectrumMonitor
from lightning_qk.functional import update_spectra
from lightning_qk.metrics.singular import SINGULAR_STATISTICS, UPDATE_STATISTICS


def monitor(every: int | None = None, **kwargs) -> QKSpectrumMonitor:
    return QKSpectrumMonitor(every, **{"figures_every": 0, "report": False, "updates": True, **kwargs})


def fit(callbacks, job=None, seed=0, path=None, count=32, **kwargs):
    torch.manual_seed(seed)
    job = job or models.Job(models.llama(), lr=0.3)
    models.trainer(callbacks, **kwargs).fit(job, models.tokens(count), ckpt_path=path, weights_only=False)


@pytest.mark.parametrize("precision", [None, "bf16-true"])
@pytest.mark.parametrize("every", [1, 2])
def test_values_are_those_of_the_weights(every, precision):
    """Grouped queries; the newest change is since the measurement before, not since the step before."""
    weights, spectrum = Weights(), monitor(every)
    fit([spectrum, weights], precision=precision)
    assert spectrum.notes == []
    assert spectrum.history.steps == [-1, *range(every - 1, 4, every)]
    measured = [weights.taken[step + 1] for step in spectrum.history.steps]
    for name in UPDATE_STATISTICS:
        assert spectrum.history.grid(name, 0).isnan().all()
    for index in range(1, len(measured)):
        before, after = measured[index - 1], measured[index]
        want = [update_spectra(*after[name][:2], *before[name][:2]) for name in after]
        for name in UPDATE_STATISTICS:
            expected = torch.stack([layer[name.removeprefix("update_")] for layer in want])
            got = spectrum.history.grid(name, index).double()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-12, msg=f"{index} {name}")


def test_cross_attention_has_them_too():
    class Translate(models.Job):
        def training_step(self, batch, batch_idx):
            return self.inner["network"](input_ids=batch, labels=batch[:, :9].contiguous()).loss

    spectrum = monitor()
    fit([spectrum], Translate(models.t5(), lr=0.1), max_steps=2)
    assert len(spectrum.history.layers) == 6
    for name in UPDATE_STATISTICS:
        assert spectrum.history.grid(name).isfinite().all()


def test_keys_only_on_request(tmp_path):
    for updates in (False, True):
        logger = CSVLogger(tmp_path, version=str(updates))
        fit([monitor(updates=updates)], max_steps=2, logger=logger)
        keys = set().union(*read_csv(tmp_path / "lightning_logs" / str(updates)))
        for name in UPDATE_STATISTICS:
            assert (f"qk/{name}/mean" in keys) == updates
            assert (f"qk/{name}/{'min' if name.endswith('rank') else 'max'}" in keys) == updates
        assert ("qk/layer_01/update_delta2_norm" in keys) == updates
        assert "qk/sigma_1/mean" not in keys


def test_beside_singular_values_both_are_as_alone():
    found = {}
    for name, asked in {
        "both": {"singular": True},
        "updates": {},
        "singular": {"singular": True, "updates": False},
    }.items():
        found[name] = monitor(**asked)
        fit([found[name]])
    for alone, names in (("updates", UPDATE_STATISTICS), ("singular", SINGULAR_STATISTICS)):
        for name in (*names, "sym_var", "spectral_radius"):
            one, other = (found[which].history.series(name) for which in (alone, "both"))
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stop", [3, 4], ids=["between measurements", "at a measurement"])
def test_a_resumed_run_misses_no_update(tmp_path, stop):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    # An epoch is a batch, so that a resumed run has the data of the other.
    whole = monitor(2)
    fit([whole, Save()], count=4, max_steps=8)
    resumed = monitor(2)
    fit([resumed], seed=9, path=tmp_path / "middle.ckpt", count=4, max_steps=8)
    assert resumed.history.steps == whole.history.steps
    assert whole.history.steps[-3:] == [3, 5, 7]
    for name in UPDATE_STATISTICS:
        assert whole.history.series(name)[1:].isfinite().all()
        torch.testing.assert_close(
            resumed.history.series(name), whole.history.series(name), rtol=1e-5, atol=0, equal_nan=True
        )
