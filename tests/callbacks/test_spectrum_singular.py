"""QKSpectrumMonitor with singular values: those of the weights after each step, and of the change between."""

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_monitors import read_csv

from lightning_qk import QKSpectrumMonitor, head_projections
from lightning_qk.functional import effective_rank, energy_concentration, qk_singular_values, update_ratio
from lightning_qk.metrics.singular import SINGULAR_STATISTICS, SingularValues


class Weights(L.Callback):
    """Query and key weights at the start and after every step."""

    def __init__(self) -> None:
        self.taken: list[dict] = []

    def take(self, trainer, pl_module, *args) -> None:
        heads = head_projections(pl_module)
        self.taken.append(
            {
                name: (head.query.detach().double(), head.key.detach().double(), head.scaling)
                for name, head in heads.items()
            }
        )

    on_train_start = on_train_batch_end = take


def monitor(**kwargs) -> QKSpectrumMonitor:
    return QKSpectrumMonitor(**{"figures_every": 0, "report": False, "singular": True, **kwargs})


@pytest.mark.parametrize(("make", "precision"), [(models.llama, None), (models.llama, "bf16-true")])
def test_values_are_those_of_the_weights(make, precision):
    torch.manual_seed(0)
    weights, spectrum = Weights(), monitor()
    models.trainer([spectrum, weights], max_steps=3, precision=precision).fit(
        models.Job(make(), lr=0.3), models.tokens()
    )
    assert spectrum.notes == []
    assert spectrum.history.steps == [-1, 0, 1, 2]
    for index, taken in enumerate(weights.taken):
        wanted = {name: [] for name in SINGULAR_STATISTICS}
        for name, (query, key, scaling) in taken.items():
            singular = qk_singular_values(query, key)
            wanted["sigma_1"].append(singular[:, 0])
            wanted["energy_top_1"].append(energy_concentration(singular, 1))
            wanted["energy_top_4"].append(energy_concentration(singular, 4))
            wanted["effective_rank"].append(effective_rank(singular))
            wanted["logit_bound"].append(singular[:, 0] * scaling * query.shape[-1])
            if index:
                before = weights.taken[index - 1][name][:2]
                wanted["update_ratio"].append(update_ratio(query, key, *before)["qk"])
        for name, parts in wanted.items():
            got = spectrum.history.grid(name, index).double()
            if not parts:
                assert got.isnan().all()
                continue
            torch.testing.assert_close(got, torch.stack(parts), rtol=2e-3, atol=1e-5, msg=f"{index} {name}")


def test_the_bound_holds_for_tokens_of_that_norm():
    torch.manual_seed(1)
    model = models.llama()
    heads = head_projections(model)
    values = SingularValues({name: head.heads for name, head in _plans(model).items()})
    from lightning_qk.metrics.eigenvalues import solve

    bound = values.values(0, solve(values.cores(heads)))["logit_bound"]
    start = 0
    for head in heads.values():
        x, y = (torch.nn.functional.normalize(torch.randn(500, 32), dim=-1) * 32**0.5 for _ in range(2))
        key = head.key.repeat_interleave(2, dim=0)
        logits = head.scaling * torch.einsum("hde,ne,hdf,mf->hnm", head.query, x, key, y)
        assert (logits.abs().amax((1, 2)) <= bound[start : start + 4] * 1.0001).all()
        start += 4


def _plans(model):
    from lightning_qk.heads.reader import ProjectionReader

    return ProjectionReader(model).layers


def test_keys_only_on_request(tmp_path):
    for singular in (False, True):
        logger = CSVLogger(tmp_path, version=str(singular))
        trainer = models.trainer([monitor(singular=singular)], max_steps=2, logger=logger)
        trainer.fit(models.Job(), models.tokens())
        keys = set().union(*read_csv(tmp_path / "lightning_logs" / str(singular)))
        for name in SINGULAR_STATISTICS:
            assert (f"qk/{name}/max" in keys) == singular
            assert (f"qk/layer_01/{name}" in keys) == (singular and name in ("sigma_1", "update_ratio"))
        assert "qk/spectral_radius/max" in keys


def test_the_other_numbers_stay_as_they_are():
    def run(singular):
        torch.manual_seed(3)
        callback = monitor(singular=singular)
        job = models.Job()
        models.trainer([callback]).fit(job, models.tokens())
        return callback.history, job, torch.get_rng_state(), callback._eigenvalues

    plain, job, rng, eigenvalues = run(False)
    more, watched, rng_watched, more_eigenvalues = run(True)
    for name in plain.statistics:
        torch.testing.assert_close(plain.series(name), more.series(name), rtol=0, atol=0, equal_nan=True)
    assert set(more.statistics) == {*plain.statistics, *SINGULAR_STATISTICS}
    assert eigenvalues.keys() == more_eigenvalues.keys()
    assert all(torch.equal(a, b) for a, b in zip(job.parameters(), watched.parameters(), strict=True))
    assert torch.equal(rng, rng_watched)


def test_cross_attention_has_them_too():
    class Translate(models.Job):
        def training_step(self, batch, batch_idx):
            return self.inner["network"](input_ids=batch, labels=batch[:, :9].contiguous()).loss

    spectrum = monitor()
    models.trainer([spectrum], max_steps=2).fit(Translate(models.t5()), models.tokens())
    assert len(spectrum.history.layers) == 6
    for name in SINGULAR_STATISTICS:
        assert spectrum.history.grid(name).isfinite().all()
    cross = [index for index, label in enumerate(spectrum.history.layers) if "cross" in label]
    torch.testing.assert_close(
        spectrum.history.grid("sigma_1")[cross], spectrum.history.grid("singular_max")[cross]
    )


def test_a_checkpoint_in_between_changes_nothing(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def run(callbacks):
        torch.manual_seed(5)
        callback = monitor()
        models.trainer([callback, *callbacks]).fit(models.Job(), models.tokens())
        return callback.history.series("update_ratio")

    torch.testing.assert_close(run([]), run([Save()]), equal_nan=True)
