"""All three callbacks under what Lightning can do in one process: right numbers, and a training left alone."""

import threading

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from test_monitors import read_csv
from transformers.modeling_utils import AttentionInterface

from lightning_qk import (
    AttentionMonitor,
    LocAteR,
    QKSpectrumMonitor,
    TokenMonitor,
    head_projections,
    locater_penalty,
)
from lightning_qk.functional import qk_moments

WEIGHT = 0.5


def monitors(**kwargs) -> list:
    arguments = {"figures_every": 0, "report": False, **kwargs}
    return [QKSpectrumMonitor(**arguments), AttentionMonitor(rows=None, **arguments)]


def fit(job: L.LightningModule, callbacks: list, loader=None, val=None, **kwargs) -> L.Trainer:
    L.seed_everything(4, verbose=False)
    trainer = models.trainer(callbacks, **kwargs)
    trainer.fit(job, loader or models.tokens(), val)
    return trainer


def seeded(make):
    torch.manual_seed(9)
    return make()


def same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def check_spectrum(callback: QKSpectrumMonitor, job: torch.nn.Module) -> None:
    """The newest values are those of the weights as they are."""
    with torch.no_grad():
        want = [qk_moments(head.query, head.key)["sym_var"] for head in head_projections(job).values()]
    torch.testing.assert_close(callback.history.grid("sym_var"), torch.stack(want))


class Manual(models.Job):
    """Steps its optimizer by hand, at every ``stride``-th batch."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__(lr=0.05)
        self.automatic_optimization = False
        self.stride = stride

    def training_step(self, batch, batch_idx):
        loss = self.inner["network"](input_ids=batch, labels=batch).loss
        self.manual_backward(loss / self.stride)
        if (batch_idx + 1) % self.stride == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("stride", "every"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2)])
def test_manual_optimization(stride, every):
    plain, watched = seeded(lambda: Manual(stride)), seeded(lambda: Manual(stride))
    spectrum, attention = callbacks = monitors(every_n_steps=every)
    # Counted in optimizer steps.
    fit(plain, [], max_steps=3, max_epochs=-1)
    fit(watched, callbacks, max_steps=3, max_epochs=-1)
    assert same_parameters(plain, watched)
    assert spectrum.notes == attention.notes == []
    # Never on a batch that did not step, and a step that is due is not missed though its number falls between.
    assert len(attention.history) == len(spectrum.history) - 1 > 0
    assert attention.history.steps == spectrum.history.steps[1:]
    assert attention.history.series("entropy").isfinite().all()
    if every == 1:
        assert len(attention.history) == 3
        check_spectrum(spectrum, watched)


def test_manual_optimization_has_the_penalty():
    class Written(Manual):
        def training_step(self, batch, batch_idx):
            loss = self.inner["network"](input_ids=batch, labels=batch).loss
            self.manual_backward(loss + WEIGHT * locater_penalty(self))
            self.optimizers().step()
            self.optimizers().zero_grad()

    by_callback, by_hand = seeded(Manual), seeded(Written)
    fit(by_callback, [LocAteR(WEIGHT)], max_steps=3)
    fit(by_hand, [], max_steps=3)
    for a, b in zip(by_callback.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class TwoModels(L.LightningModule):
    """Two models, an optimizer each, stepped in turn in one batch."""

    def __init__(self, penalty: bool = False) -> None:
        super().__init__()
        self.first, self.second = models.gpt2(), models.llama()
        self.automatic_optimization = False
        self.penalty = penalty

    def training_step(self, batch, batch_idx):
        for model, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            optimizer.zero_grad()
            loss = model(input_ids=batch, labels=batch).loss
            if self.penalty:
                loss = loss + WEIGHT * locater_penalty(model)
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(model.parameters(), lr=0.02) for model in (self.first, self.second)]


def test_several_optimizers():
    spectrum, attention = callbacks = monitors()
    plain, watched = seeded(TwoModels), seeded(TwoModels)
    # Two optimizer steps a batch.
    fit(plain, [], max_steps=6)
    fit(watched, callbacks, max_steps=6)
    assert same_parameters(plain, watched)
    assert attention.history.steps == [0, 1, 2]
    assert spectrum.history.steps == [-1, 0, 1, 2]
    assert len(attention.history.layers) == 4
    assert attention.history.series("entropy").isfinite().all()
    check_spectrum(spectrum, watched)
    # And each parameter has the penalty's gradient exactly once a step.
    by_callback, by_hand = seeded(TwoModels), seeded(lambda: TwoModels(penalty=True))
    fit(by_callback, [LocAteR(WEIGHT)], max_steps=6)
    fit(by_hand, [], max_steps=6)
    for a, b in zip(by_callback.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Late(L.LightningModule):
    """Has no network before ``configure_model``."""

    def configure_model(self) -> None:
        if not hasattr(self, "network"):
            torch.manual_seed(1)
            self.network = models.gpt2()

    def training_step(self, batch, batch_idx):
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def test_a_network_that_is_built_in_configure_model():
    spectrum, attention = callbacks = monitors()
    job = Late()
    fit(job, [*callbacks, LocAteR(WEIGHT)])
    assert spectrum.notes == attention.notes == []
    assert attention.history.series("entropy").isfinite().all()
    check_spectrum(spectrum, job)


def test_weight_averaging_leaves_training_weights_watched_and_validates_the_averaged(tmp_path):
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")

    def run(callbacks):
        job = seeded(lambda: models.Job(lr=0.3))
        trainer = fit(
            job,
            [averaging.EMAWeightAveraging(decay=0.5), *callbacks],
            val=models.tokens(8),
            max_steps=4,
            max_epochs=1,
            val_check_interval=4,
        )
        return job, trainer

    class Validated(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            with torch.no_grad():
                heads = head_projections(pl_module).values()
                self.trace = torch.cat([qk_moments(head.query, head.key)["trace"] for head in heads])

    seen = Validated()
    spectrum, attention = callbacks = monitors()
    plain, _ = run([])
    watched, trainer = run([*callbacks, seen])
    assert same_parameters(plain, watched)
    assert spectrum.notes == attention.notes == []
    assert attention.history.steps == [0, 1, 2, 3]
    assert "attn/val/entropy/mean" in trainer.callback_metrics
    # The averaged weights, which were validated, are others than those in training.
    assert not torch.allclose(seen.trace, spectrum.history.values["trace"][-1], rtol=1e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradient_checkpointing_is_counted_once(use_reentrant, implementation):
    def run(checkpoint, callbacks):
        model = models.llama(attn_implementation=implementation)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        job = models.Job(model)
        heard = []
        for callback in callbacks:
            if isinstance(callback, AttentionMonitor):
                hear = callback.measure_call
                callback.measure_call = lambda name, call, hear=hear: heard.append(name) or hear(name, call)
        fit(job, callbacks, accumulate_grad_batches=2, max_steps=2)
        return job, heard

    plain = monitors()
    _, heard_plain = run(False, plain)
    checkpointed = monitors()
    _, heard = run(True, checkpointed)
    assert len(heard) == len(heard_plain) == 2 * 2 * 2  # layers, micro-batches, steps
    for a, b in zip(plain, checkpointed, strict=True):
        assert b.notes == []
        for name in a.history.statistics:
            torch.testing.assert_close(
                a.history.series(name), b.history.series(name), rtol=1e-4, atol=1e-5, equal_nan=True
            )


def test_fast_dev_run_measures_its_batch_and_leaves_nothing(tmp_path):
    callbacks = [QKSpectrumMonitor(), AttentionMonitor(), LocAteR(WEIGHT)]
    fit(models.Job(), callbacks, val=models.tokens(8), fast_dev_run=True, default_root_dir=tmp_path)
    assert callbacks[0].history.steps == [-1, 0]
    assert callbacks[1].history.steps == [0]
    assert not list(tmp_path.iterdir())
    assert [note for callback in callbacks[:2] for note in callback.notes] == []


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    def run(steps, folder, checkpoint=None):
        job = models.Job(optimizer="adamw")
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in job.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for module in job.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        callbacks = [*monitors(every_n_steps=2), LocAteR(WEIGHT, form="target")]
        trainer = models.trainer(callbacks, max_steps=steps, max_epochs=-1, logger=CSVLogger(folder))
        trainer.fit(job, models.tokens(4), ckpt_path=checkpoint)  # always the same batch
        return job, callbacks, trainer

    whole, in_one, _ = run(8, tmp_path / "whole")
    _, _, trainer = run(4, tmp_path / "first")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, in_two, _ = run(8, tmp_path / "second", tmp_path / "a.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(in_one[:2], in_two[:2], strict=True):
        assert a.history.steps == b.history.steps
        for name in a.history.statistics:
            torch.testing.assert_close(
                a.history.series(name), b.history.series(name), rtol=1e-4, atol=1e-5, equal_nan=True
            )
    rows = read_csv(tmp_path / "second" / "lightning_logs" / "version_0")
    assert [int(row["step"]) for row in rows if "attn/entropy/mean" in row] == [5, 7]


def test_trainers_in_threads_do_not_disturb_each_other():
    before = AttentionInterface.get_interface, torch.nn.functional.scaled_dot_product_attention

    def one(seed: int, callbacks: list) -> models.Job:
        torch.manual_seed(seed)
        job = models.Job(models.bert() if seed else models.gpt2())
        for module in job.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in job.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        models.trainer(callbacks, max_steps=6).fit(job, models.tokens())
        return job

    alone = {seed: monitors(every_n_steps=seed + 1) for seed in (0, 1)}
    jobs = {seed: one(seed, callbacks) for seed, callbacks in alone.items()}
    together = {seed: monitors(every_n_steps=seed + 1) for seed in (0, 1)}
    results: dict[int, models.Job] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: one(seed, together[seed])}))
        for seed in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert same_parameters(jobs[seed], results[seed])
        for a, b in zip(alone[seed], together[seed], strict=True):
            assert a.notes == b.notes == []
            assert a.history.steps == b.history.steps
            for name in a.history.statistics:
                torch.testing.assert_close(a.history.series(name), b.history.series(name), equal_nan=True)
    assert (AttentionInterface.get_interface, torch.nn.functional.scaled_dot_product_attention) == before


def test_monitors_go_on_when_adapters_are_merged_and_unloaded():
    """All layers then have other names, and projections that were read are gone."""

    class Merged(models.Job):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.inner["network"] = self.inner["network"].merge_and_unload().requires_grad_(True)
                self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())

    job = Merged(
        get_peft_model(
            models.llama(),
            LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False),
        )
    )
    tokens = TokenMonitor(every_n_steps=1, report=False)
    watched = [*monitors(every_n_steps=1), tokens]
    fit(job, watched, max_steps=4)
    check_spectrum(watched[0], job)
    for monitor in watched:
        assert monitor.notes == []
        assert all(row.isfinite().all() for row in monitor.history.values[monitor.history.statistics[0]])
