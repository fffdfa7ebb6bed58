"""TokenMonitor: the moments of the job's own calls, and a training that does not notice it."""

import copy

import models
import pytest
import scipy.stats
import torch
from lightning.pytorch.loggers import CSVLogger
from test_monitors import read_csv

from lightning_qk import AttentionMonitor, TokenMonitor, head_projections, predict_attention, token_moments
from lightning_qk.functional import qk_moments
from lightning_qk.functional.spectrum import MOMENTS
from lightning_qk.heads import find_attention
from lightning_qk.record.history import RunRecord
from lightning_qk.record.predictions import agreement

QUIET = {"figures_every": 0, "report": False}


def monitor(**kwargs) -> TokenMonitor:
    return TokenMonitor(**{"tokens": None, "predict_every": 0, **QUIET, **kwargs})


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def hidden(model, batch, **kwargs):
    """What enters each attention layer, by hooks of the test's own."""
    found, handles = {}, []
    for name, module in find_attention(model).items():

        def hook(_, args, kwargs, name=name):
            found[name] = args[0] if args else kwargs["hidden_states"]

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model.eval()(input_ids=batch, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def covariance(x):
    flat = x.double().flatten(0, -2)
    return (flat - flat.mean(0)).T @ (flat - flat.mean(0)) / len(flat)


@pytest.mark.parametrize("make", [models.gpt2, models.bert, models.llama, models.mistral, models.gemma2])
def test_spectra_are_those_of_the_dense_covariance_of_the_hidden_states(make):
    job = models.Job(without_dropout(make()), lr=0.0)
    model = copy.deepcopy(job.inner["network"])
    (batch,) = models.tokens(4)
    callback = monitor()
    models.trainer([callback], max_steps=1).fit(job, models.tokens(4))
    assert callback.notes == []
    entered, heads = hidden(model, batch), head_projections(model)
    for index, (name, x) in enumerate(entered.items()):
        head = heads[name]
        query, key = head.query.detach().double(), head.key.detach().double()
        want = qk_moments(head.scaling * query, key, covariance(x[:, 1:]))
        for statistic in MOMENTS:
            got = callback.history.split(callback.history.values[statistic][-1])[index]
            size = float(want[statistic].abs().max())
            torch.testing.assert_close(got.double(), want[statistic], rtol=1e-3, atol=1e-3 * size)


@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.bert])
def test_predictions_are_those_of_the_pooled_moments(make, tmp_path):
    """The monitor's means by position are coarser than those of ``token_moments``; all else is the same."""
    job = models.Job(without_dropout(make()), lr=0.0)
    model = copy.deepcopy(job.inner["network"])
    (batch,) = models.tokens(8)
    callback, attention = monitor(predict_every=1, surrogates=64), AttentionMonitor(rows=None, **QUIET)
    logger = CSVLogger(tmp_path)
    models.trainer([callback, attention], max_steps=1, logger=logger).fit(job, models.tokens(8))
    assert callback.notes == []
    record = RunRecord()
    callback.contribute(record)
    attention.contribute(record)
    pred = record.histories["pred"]
    moments, heads = token_moments(model, [batch]), head_projections(model)
    for index, (name, head) in enumerate(heads.items()):
        want = predict_attention(
            head, moments[name], length=batch.shape[1], is_causal=make is not models.bert, sequences=64
        )
        for statistic in ("entropy_normalized", "sink_first", "logit_std", "max_prob", "linear_share"):
            got = pred.split(pred.values[statistic][-1])[index]
            torch.testing.assert_close(got, want[statistic], rtol=0.1, atol=0.05)
    # What the moments do not explain, by hand.
    gaps = [
        (attention.history.values[name][-1] - pred.values[name][-1]).abs()
        for name in ("sink_first", "diagonal", "max_prob")
    ]
    torch.testing.assert_close(pred.values["semantic_share"][-1], torch.stack(gaps).amax(0))
    rows = read_csv(tmp_path)
    logged = {key for row in rows for key, value in row.items() if value}
    assert {"pred/entropy_normalized/mean", "pred/semantic_share/mean", "pred/semantic_share/max"} <= logged
    assert {"qk/tokens/sym_var/mean", "qk/tokens/sym_var/max", "qk/tokens/layer_00/eig_var"} <= logged
    count, rho, error = agreement(record, "entropy_normalized")
    one, other = pred.values["entropy_normalized"][-1], attention.history.values["entropy_normalized"][-1]
    assert count == len(one)
    assert error == pytest.approx(float((one - other).abs().mean()), rel=1e-5)
    assert rho == pytest.approx(float(scipy.stats.spearmanr(one, other).statistic), abs=1e-6)


def test_predictions_come_at_their_own_cadence_and_at_the_end():
    callback = monitor(predict_every=3, surrogates=1, tokens=4)
    models.trainer([callback], max_steps=6).fit(models.Job(), models.tokens(24))
    assert callback.history.steps == [0, 1, 2, 3, 4, 5]
    assert callback._predictions.history.steps == [0, 3, 5]
    quiet = monitor(predict_every=0)
    models.trainer([quiet], max_steps=2).fit(models.Job(), models.tokens(8))
    assert not quiet._predictions.history.layers


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_job_does_not_notice_it(precision):
    """Losses, weights and random numbers, with dropout and accumulation, are bit-identical."""

    def fit(*callbacks):
        torch.manual_seed(0)
        job = models.Job(models.llama(attention_dropout=0.2), lr=0.05)
        trainer = models.trainer(list(callbacks), max_steps=3, accumulate_grad_batches=2, precision=precision)
        trainer.fit(job, models.tokens(24))
        return job, torch.rand(3)

    callback = monitor(predict_every=1, surrogates=1, tokens=5, offsets=(0, 2))
    plain, after = fit()
    watched, same = fit(callback)
    assert callback.notes == []
    assert len(callback.history) == 3
    assert torch.equal(torch.stack(plain.losses), torch.stack(watched.losses))
    assert torch.equal(after, same)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    for module in watched.modules():
        assert not module._forward_pre_hooks


def test_micro_batches_are_pooled_and_padding_is_left_out():
    class Padded(models.Job):
        def training_step(self, batch, batch_idx):
            keep = torch.ones_like(batch)
            keep[::2, -5:] = 0
            keep[1::2, :3] = 0
            return self.inner["network"](input_ids=batch, attention_mask=keep, labels=batch).loss

    whole, parts = monitor(), monitor()
    for callback, size, accumulate in ((whole, 8, 1), (parts, 2, 4)):
        job = Padded(without_dropout(models.llama()), lr=0.0)
        loader = models.tokens(8)
        loader = torch.utils.data.DataLoader(loader.dataset, batch_size=size)
        models.trainer([callback], max_steps=1, accumulate_grad_batches=accumulate).fit(job, loader)
        assert callback.notes == []
    for name in MOMENTS:
        torch.testing.assert_close(
            parts.history.values[name][-1], whole.history.values[name][-1], rtol=1e-4, atol=1e-6
        )
    job = Padded(without_dropout(models.llama()), lr=0.0)
    (batch,) = models.tokens(8)
    keep = torch.ones_like(batch)
    keep[::2, -5:] = 0
    keep[1::2, :3] = 0
    model = job.inner["network"]
    entered = hidden(model, batch, attention_mask=keep)
    first = keep.argmax(1)
    keep[torch.arange(len(keep)), first] = 0
    (name, head), *_ = head_projections(model).items()
    sigma = covariance(entered[name][keep.bool()])
    want = qk_moments(head.scaling * head.query.detach().double(), head.key.detach().double(), sigma)
    got = whole.history.split(whole.history.values["sym_var"][-1])[0]
    torch.testing.assert_close(got.double(), want["sym_var"], rtol=1e-3, atol=1e-7)


def test_offsets():
    job = models.Job(without_dropout(models.llama()), lr=0.0)
    model = copy.deepcopy(job.inner["network"])
    (batch,) = models.tokens(4)
    callback = monitor(offsets=(3,), support="head")
    models.trainer([callback], max_steps=1).fit(job, models.tokens(4))
    (name, x), *_ = hidden(model, batch).items()
    head = head_projections(model)[name]
    want = qk_moments(
        head.scaling * head.query.detach().double(), head.key.detach().double(), covariance(x[:, 1:]),
        support="head", offset=-3, rotary=head.rotary,
    )  # fmt: skip
    got = callback.history.split(callback.history.values["offset_3/eig_var"][-1])[0]
    torch.testing.assert_close(got.double(), want["eig_var"], rtol=1e-3, atol=1e-6)
