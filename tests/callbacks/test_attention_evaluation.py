"""AttentionMonitor in validation and test loops, and calls that it cannot pool."""

import copy

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_monitors import read_csv

from lightning_qk import AttentionMonitor, QKSpectrumMonitor


class Evaluated(models.Job):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val/loss", self.inner["network"](input_ids=batch, labels=batch).loss)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.inner["network"](input_ids=batch)


def monitor(**kwargs) -> AttentionMonitor:
    return AttentionMonitor(**{"rows": None, "figures_every": 0, "report": False, **kwargs})


def entropy(job: models.Job, batches) -> float:
    """Mean entropy over heads, rows and sequences from the model's own maps."""
    model = copy.deepcopy(job.inner["network"]).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = [p for batch in batches for p in model(input_ids=batch, output_attentions=True).attentions]
    return torch.cat([torch.special.entr(p.double()).sum(-1).mean((1, 2)) for p in maps]).mean().item()


def test_every_dataloader_has_its_own_values(tmp_path):
    job = Evaluated()
    loaders = [models.tokens(24, length=16), models.tokens(8, length=9)]
    trainer = models.trainer([monitor(every_n_eval_batches=2, per_layer=True)], logger=CSVLogger(tmp_path))
    trainer.validate(job, loaders, verbose=False)
    rows = read_csv(tmp_path / "lightning_logs" / "version_0")
    logged = {key: float(value) for row in rows for key, value in row.items()}
    for index, loader in enumerate(loaders):
        measured = list(loader)[::2]
        want = entropy(job, measured)
        for layer in ("layer_00", "layer_01"):
            assert f"attn/val/{layer}/entropy/dataloader_idx_{index}" in logged
        key = f"attn/val/entropy/mean/dataloader_idx_{index}"
        assert logged[key] == pytest.approx(want, rel=1e-4)
        assert trainer.callback_metrics[key].item() == pytest.approx(want, rel=1e-4)
    assert not [key for key in logged if key.startswith("attn/") and "dataloader_idx" not in key]


def test_one_dataloader_has_plain_keys_and_the_test_loop_its_own(tmp_path, capsys):
    callback = monitor()
    trainer = models.trainer([callback], logger=CSVLogger(tmp_path))
    results = trainer.test(Evaluated(), models.tokens(8))
    assert results == [{}]  # the table of the test's own results is left alone
    assert "attn/" not in capsys.readouterr().out
    assert trainer.callback_metrics["attn/test/entropy/mean"] > 0
    assert callback.notes == []
    assert callback._capture is None


def test_during_training_under_the_step_of_the_loss(tmp_path):
    job = Evaluated()
    callback = monitor()
    trainer = models.trainer([callback], logger=CSVLogger(tmp_path), max_steps=4, val_check_interval=2)
    trainer.fit(job, models.tokens(), models.tokens(8))
    rows = read_csv(tmp_path / "lightning_logs" / "version_0")
    steps = {
        key: [int(row["step"]) for row in rows if key in row]
        for key in ("val/loss", "attn/val/entropy/mean", "attn/entropy/mean")
    }
    assert steps["attn/val/entropy/mean"] == steps["val/loss"]
    assert len(steps["val/loss"]) == 2
    assert steps["attn/entropy/mean"] == [0, 1, 2, 3]
    # The weights have not changed since the last validation.
    want = entropy(job, list(models.tokens(8))[:1])
    assert trainer.callback_metrics["attn/val/entropy/mean"].item() == pytest.approx(want, rel=1e-4)


def test_neither_the_sanity_check_nor_when_switched_off(tmp_path):
    for number, arguments in enumerate(({"num_sanity_val_steps": 2, "limit_val_batches": 2}, {})):
        heard = []
        callback = monitor(every_n_eval_batches=number and 0)
        callback.measure_call = lambda name, call, heard=heard: heard.append(torch.is_grad_enabled())
        trainer = models.trainer([callback], max_steps=1, val_check_interval=10, **arguments)
        trainer.fit(Evaluated(), models.tokens(40), models.tokens(8))
        assert len(heard) == 2  # the one training step


def test_a_validation_changes_nothing_and_draws_from_no_global_generator():
    def validate(callbacks):
        L.seed_everything(11, verbose=False)
        job = Evaluated()
        models.trainer(callbacks).validate(job, models.tokens(8), verbose=False)
        return torch.get_rng_state()

    assert torch.equal(validate([]), validate([monitor(rows=5), QKSpectrumMonitor()]))


class Shrinking(models.Job):
    """From the second micro-batch on, one layer has half its heads."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            layer = self.inner["network"].transformer.h[0].attn
            layer.num_heads, layer.head_dim = 2, 16
        return super().training_step(batch, batch_idx)


def test_a_layer_that_is_called_with_two_shapes_in_a_step_is_named_once_and_left_out():
    callback = monitor(every_n_steps=1)
    trainer = models.trainer([callback], max_steps=2, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="4 heads of width 8 and then with 2 of width 16"):
        trainer.fit(Shrinking(), models.tokens())
    assert trainer.global_step == 2
    assert len(callback.notes) == 1
    first, second = (callback.history.series("entropy")[:, part] for part in (slice(4), slice(4, 8)))
    assert first.isnan().all()
    assert second.isfinite().all()


def test_lengths_may_differ_between_the_calls_of_a_step():
    batches = [torch.randint(3, models.VOCABULARY, (2, n)) for n in (7, 12)]
    job = Evaluated(lr=0.0)
    for module in job.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    callback = monitor()
    models.trainer([callback], max_steps=1, accumulate_grad_batches=2).fit(
        job, torch.utils.data.DataLoader(batches, batch_size=None)
    )
    assert callback.notes == []
    rows = [entropy(job, [batch]) * batch.numel() for batch in batches]
    want = sum(rows) / sum(batch.numel() for batch in batches)
    assert callback.history.series("entropy").mean().item() == pytest.approx(want, rel=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected every_n_eval_batches to be 0"):
        monitor(every_n_eval_batches=-1)
