"""HiddenStateMonitor in an existing job: numbers, padding, cadence, and a training that does not notice it."""

import lightning as L
import models
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from test_monitors import read_csv
from torch import nn
from torch.utils.data import DataLoader

from lightning_qk import AttentionMonitor, HiddenStateMonitor, QKSpectrumMonitor
from lightning_qk.callbacks.monitors._report import RECORD_NAME, REPORT_NAME
from lightning_qk.functional import hidden_statistics
from lightning_qk.functional.hidden import HIDDEN_STATISTICS, hidden_sums
from lightning_qk.metrics.hidden import HiddenStatistics
from lightning_qk.record.history import RunRecord


class Padded(models.Job):
    """Batches with padding on the left."""

    def training_step(self, batch, batch_idx):
        network = self.inner["network"]
        mask = torch.ones_like(batch)
        mask[::2, :3] = 0
        return network(input_ids=batch, attention_mask=mask, labels=batch).loss


def monitor(**kwargs) -> HiddenStateMonitor:
    return HiddenStateMonitor(**{"report": False, "tokens": None, "sequences": None, **kwargs})


def without_dropout(job: L.LightningModule) -> L.LightningModule:
    for module in job.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return job


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_numbers_are_those_of_the_models_states_over_all_micro_batches(make):
    job = without_dropout(Padded(make(), lr=0.0))
    callback = monitor()
    trainer = models.trainer([callback], max_steps=1, accumulate_grad_batches=4)
    loader = models.tokens(16, batch_size=4)
    trainer.fit(job, loader)
    assert callback.notes == []
    assert callback.history.layers == ("embedding", "layer_00", "layer_01")
    everything = torch.cat(list(loader))
    mask = torch.ones_like(everything)
    mask[::2, :3] = 0
    network = job.inner["network"].eval()
    states = []
    last = (network.transformer.h if make is models.gpt2 else network.model.layers)[-1]
    handle = last.register_forward_hook(lambda *args: states.append(args[2]))
    with torch.no_grad():
        out = network(input_ids=everything, attention_mask=mask, output_hidden_states=True)
    handle.remove()
    last_states = states[0] if isinstance(states[0], torch.Tensor) else states[0][0]
    for index, layer in enumerate([*out.hidden_states[:2], last_states]):
        for name, value in hidden_statistics(layer, mask=mask).items():
            got = callback.history.grid(name)[index, 0]
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4, msg=f"{index} {name}")
    # The embedding is in no aggregate.
    newest = callback.history.values["effective_rank"][-1]
    logged = trainer.callback_metrics
    assert logged["hidden/effective_rank/mean"].item() == pytest.approx(newest[1:].mean().item(), rel=1e-5)
    assert logged["hidden/effective_rank/max"].item() == pytest.approx(newest[1:].max().item(), rel=1e-5)


def test_training_does_not_notice():
    def fit(callbacks):
        L.seed_everything(11, verbose=False)
        job = models.Job(models.gpt2(), optimizer="adamw")
        shuffled = DataLoader(models.tokens(32).dataset, batch_size=4, shuffle=True)
        models.trainer(callbacks, max_steps=6).fit(job, shuffled)
        return job, torch.get_rng_state()

    plain, rng = fit([])
    watched, rng_watched = fit([HiddenStateMonitor(tokens=5, sequences=2), AttentionMonitor()])
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, watched.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert torch.equal(rng, rng_watched)


def test_keys_and_cadence(tmp_path):
    callback = monitor(every_n_steps=2, per_layer=True)
    models.trainer([callback], logger=CSVLogger(tmp_path), max_steps=5, max_epochs=-1).fit(
        models.Job(models.bert()), models.tokens()
    )
    assert callback.history.steps == [1, 3]
    rows = read_csv(tmp_path / "lightning_logs" / "version_0")
    for key in ("hidden/rank_residual/min", "hidden/layer_01/cosine_abs", "hidden/embedding/effective_rank"):
        assert [int(row["step"]) for row in rows if key in row] == [1, 3]
    keys = {key for row in rows for key in row if key.startswith("hidden/")}
    assert {key.split("/")[1] for key in keys} == {*HIDDEN_STATISTICS, "embedding", "layer_00", "layer_01"}
    assert not any("head" in key for key in keys)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(precision):
    callback = monitor()
    models.trainer([callback], precision=precision).fit(Padded(models.llama()), models.tokens())
    assert callback.notes == []
    assert all(callback.history.series(name).isfinite().all() for name in HIDDEN_STATISTICS)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_counts_once(use_reentrant):
    def run(checkpoint):
        torch.manual_seed(4)
        model = models.llama()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        callback = monitor()
        heard = []
        hear = callback._hear
        callback._hear = lambda name, *args: (heard.append(name), hear(name, *args))
        models.trainer([callback], accumulate_grad_batches=2, max_steps=1).fit(
            models.Job(model), models.tokens()
        )
        return callback, heard

    plain, heard_plain = run(False)
    checkpointed, heard = run(True)
    assert len(heard) == len(heard_plain) == 3 * 2  # layers, micro-batches
    for name in HIDDEN_STATISTICS:
        torch.testing.assert_close(plain.history.series(name), checkpointed.history.series(name))


def test_stacks_and_a_vision_model():
    class Both(models.Job):
        def __init__(self):
            super().__init__(models.t5())
            config = transformers.ViTConfig(
                hidden_size=16,
                num_attention_heads=2,
                num_hidden_layers=2,
                intermediate_size=16,
                image_size=16,
                patch_size=4,
            )
            self.eye = transformers.ViTModel(config)

        def training_step(self, batch, batch_idx):
            self.eye(torch.randn(len(batch), 3, 16, 16, generator=torch.Generator().manual_seed(0)))
            return self.inner["network"](input_ids=batch, labels=batch[:, :9].contiguous()).loss

    callback = monitor()
    trainer = models.trainer([callback], max_steps=2)
    trainer.fit(Both(), models.tokens())
    assert callback.notes == []
    labels = callback.history.layers
    assert len(labels) == len(set(labels)) == 9
    newest = callback.history.values["effective_rank"][-1]
    assert newest.isfinite().all()
    is_block = torch.tensor(["layer" in label for label in labels])
    assert is_block.sum() == 6
    for name in ("mean", "min", "max"):
        want = getattr(newest[is_block], name)().item()
        assert trainer.callback_metrics[f"hidden/effective_rank/{name}"].item() == pytest.approx(want)


def test_a_history_survives_a_resume_and_the_report_has_it(tmp_path):
    def fit(steps, folder, checkpoint=None):
        callback = monitor(report=True)
        trainer = models.trainer([callback], max_steps=steps, max_epochs=-1, logger=CSVLogger(folder))
        trainer.fit(models.Job(), models.tokens(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return callback

    fit(2, tmp_path / "a")
    callback = fit(4, tmp_path / "b", tmp_path / "last.ckpt")
    assert callback.history.steps == [0, 1, 2, 3]
    folder = tmp_path / "b" / "lightning_logs" / "version_0"
    page = (folder / REPORT_NAME).read_text()
    assert "Hidden states over time" in page
    assert "hidden states of 3 layers" in page.lower()
    record = RunRecord.load(folder / RECORD_NAME)
    assert record.hidden.layers == callback.history.layers
    torch.testing.assert_close(record.hidden.series("cosine"), callback.history.series("cosine"))


def test_blocks_that_were_not_run_and_states_that_are_not_finite_are_named_once():
    class Half(models.Job):
        def __init__(self):
            super().__init__(lr=0.0)
            self.unused = models.bert()

    job = Half()
    with torch.no_grad():
        job.inner["network"].transformer.h[1].mlp.c_proj.bias[3] = torch.nan
    callback = monitor()
    with pytest.warns(UserWarning, match="hidden states") as caught:
        models.trainer([callback]).fit(job, models.tokens())
    messages = [str(w.message) for w in caught if "hidden states" in str(w.message)]
    assert len(messages) == len(callback.notes) == 2
    assert (
        "no hidden states of 3 of 6 layers were seen (the input of unused.bert.encoder.layer.0" in messages[0]
    )
    assert "not finite at step 0 in inner.network.transformer.h.1: training" in messages[1]


def test_validation_is_not_training():
    callback, alone = monitor(), monitor()
    for own, loader in ((callback, models.tokens()), (alone, None)):
        torch.manual_seed(2)
        models.trainer([own], val_check_interval=2).fit(
            without_dropout(models.Job()), models.tokens(), loader
        )
    torch.testing.assert_close(
        callback.history.series("rank_residual"), alone.history.series("rank_residual"), rtol=0, atol=0
    )


def test_a_monitor_that_fails_does_not_stop_training(monkeypatch):
    callback = monitor()
    monkeypatch.setattr(callback, "_hear", lambda *args: 1 / 0)
    trainer = models.trainer([callback])
    with pytest.warns(UserWarning, match="are left out: its hidden states could not be read"):
        trainer.fit(models.Job(), models.tokens())
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenStateMonitor(tokens=1), "tokens to be at least 2"),
        (lambda: HiddenStateMonitor(sequences=0), "sequences to be at least 1"),
        (lambda: HiddenStateMonitor(every_n_steps=0), "every_n_steps to be at least 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_module_without_blocks():
    with pytest.raises(ValueError, match="attention in a list of blocks, found none in Job"):
        models.trainer([monitor(on_unreadable="raise")]).fit(
            models.Job(torch.nn.Linear(2, 2)), models.tokens()
        )


def test_the_metric_pools_calls():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 4, generator=generator)
    metric = HiddenStatistics(["a", "b"])
    for part in (x[:1], x[1:], x[:0]):
        metric.update({"b": hidden_sums(part)})
    got = metric.compute()
    for name, value in hidden_statistics(x).items():
        torch.testing.assert_close(got[name][1], value)
        assert got[name][0].isnan()
    with pytest.raises(ValueError, match="got 'c'"):
        metric.update({"c": hidden_sums(x)})


@pytest.mark.parametrize("where", [pytest.param("network", marks=pytest.mark.slow), "module"])
def test_a_compiled_job(where):
    class Compiled(Padded):
        def training_step(self, batch, batch_idx):
            mask = torch.ones_like(batch)
            mask[::2, :3] = 0
            return self.inner["network"](input_ids=batch, attention_mask=mask).logits.square().mean()

    def fit(is_compiled):
        torch._dynamo.reset()
        torch.manual_seed(6)
        network = models.llama()
        network.config.use_cache = False
        compile_network = is_compiled and where == "network"
        job = Compiled(torch.compile(network, backend="eager") if compile_network else network, lr=0.0)
        callback = monitor(every_n_steps=2)
        compile_module = is_compiled and where == "module"
        fitted = torch.compile(job, backend="eager") if compile_module else job
        models.trainer([callback, AttentionMonitor(every_n_steps=2, report=False)]).fit(
            fitted, models.tokens()
        )
        torch._dynamo.reset()
        return callback

    plain, compiled = fit(False), fit(True)
    assert compiled.history.steps == [1, 3]
    assert compiled.notes == []
    for name in HIDDEN_STATISTICS:
        torch.testing.assert_close(
            compiled.history.series(name), plain.history.series(name), rtol=1e-4, atol=1e-4, msg=name
        )


class OddBlock(nn.Module):
    """Attention under a name that the caller chooses, so that layers of one list form several families."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.MultiheadAttention(16, 2, batch_first=True))
        self.norm = nn.LayerNorm(16)

    def forward(self, states):
        read = self.norm(states)
        return states + self.get_submodule(self.name)(read, read, read, need_weights=False)[0]


@pytest.mark.parametrize("names", [("attn", "attn"), ("local_attn", "attn"), ("attn", "global_attn", "attn")])
def test_a_block_has_the_label_of_its_attention(names):
    class Odd(models.Job):
        def __init__(self):
            super().__init__(models.gpt2())
            self.inner = nn.ModuleDict(
                {
                    "embedding": nn.Embedding(128, 16),
                    "blocks": nn.ModuleList(OddBlock(name) for name in names),
                    "head": nn.Linear(16, 128),
                }
            )

        def training_step(self, batch, batch_idx):
            states = self.inner["embedding"](batch)
            for block in self.inner["blocks"]:
                states = block(states)
            return nn.functional.cross_entropy(self.inner["head"](states).flatten(0, 1), batch.flatten())

    hidden, spectrum = monitor(), QKSpectrumMonitor(every_n_steps=1)
    models.trainer([hidden, spectrum], max_steps=1).fit(Odd(), models.tokens())
    assert len(spectrum.history.layers) == len(names)
    assert hidden.history.layers[1:] == spectrum.history.layers
