"""TokenMonitor: the moments of the job's own calls, and a training that does not notice it."""

import copy
import warnings
from pathlib import Path

import models
import pytest
import scipy.stats
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from test_monitors import read_csv

from lightning_qk import AttentionMonitor, TokenMonitor, head_projections, predict_attention, token_moments
from lightning_qk.functional import qk_moments
from lightning_qk.functional.spectrum import MOMENTS
from lightning_qk.heads import find_attention
from lightning_qk.record.history import RunRecord
from lightning_qk.record.predictions import agreement
from lightning_qk.record.states import KNOWN, LEFT_OUT, NO_VALUE, NOT_FINITE
from lightning_qk.tokens import TokenMomentsWarning

QUIET = {"figures_every": 0, "report": False}


def monitor(**kwargs) -> TokenMonitor:
    return TokenMonitor(**{"tokens": None, "predict_every": 0, **QUIET, **kwargs})


def without_dropout(model):
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
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
    (batch,) = models.tokens(8, batch_size=8)
    callback, attention = monitor(predict_every=1, surrogates=64), AttentionMonitor(rows=None, **QUIET)
    logger = CSVLogger(tmp_path)
    models.trainer([callback, attention], max_steps=1, logger=logger).fit(job, models.tokens(8, batch_size=8))
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
    rows = read_csv(Path(logger.log_dir))
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
    trainer = models.trainer([callback], max_steps=6)
    trainer.fit(models.Job(), models.tokens(24))
    assert callback.history.steps == [0, 1, 2, 3, 4, 5]
    predicted = callback._predictions.history
    assert predicted.steps == [0, 3, 5]
    for name in ("entropy_normalized", "logit_std"):
        newest = float(trainer.callback_metrics[f"pred/{name}/mean"])
        assert newest == pytest.approx(float(predicted.values[name][-1].mean()), rel=1e-5)
        assert newest != pytest.approx(float(predicted.values[name][-2].mean()), rel=1e-5)
    quiet = monitor(predict_every=0)
    models.trainer([quiet], max_steps=2).fit(models.Job(), models.tokens(8, batch_size=8))
    assert not quiet._predictions.history.layers


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_job_does_not_notice_it(precision):
    """Losses, weights and random numbers, with dropout and accumulation, are bit-identical."""

    def fit(*callbacks):
        torch.manual_seed(0)
        model = models.llama()
        for layer in find_attention(model).values():
            layer.attention_dropout = 0.2
        job = models.Job(model, lr=0.05)
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

    model, whole, parts = without_dropout(models.llama()), monitor(), monitor()
    for callback, size, accumulate in ((whole, 8, 1), (parts, 2, 4)):
        job = Padded(model, lr=0.0)
        loader = models.tokens(8, batch_size=8)
        loader = torch.utils.data.DataLoader(loader.dataset, batch_size=size)
        models.trainer([callback], max_steps=1, accumulate_grad_batches=accumulate).fit(job, loader)
        assert callback.notes == []
    for name in MOMENTS:
        torch.testing.assert_close(
            parts.history.values[name][-1], whole.history.values[name][-1], rtol=1e-4, atol=1e-6
        )
    (batch,) = models.tokens(8, batch_size=8)
    keep = torch.ones_like(batch)
    keep[::2, -5:] = 0
    keep[1::2, :3] = 0
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


def bart():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return models.build(transformers.BartForConditionalGeneration, config)


def bloom():
    config = transformers.BloomConfig(vocab_size=models.VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    return models.build(transformers.BloomForCausalLM, config)


def mpt():
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=models.VOCABULARY)
    return models.build(transformers.MptForCausalLM, config)


def qwen3():
    config = transformers.Qwen3Config(**{**models._GROUPED, "head_dim": 8})
    return models.build(transformers.Qwen3ForCausalLM, config)


def deepseek():
    config = transformers.DeepseekV3Config(
        vocab_size=models.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, intermediate_size=32, first_k_dense_replace=1, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=1, moe_intermediate_size=16, n_shared_experts=1, pad_token_id=0,
    )  # fmt: skip
    return models.build(transformers.DeepseekV3ForCausalLM, config)


def shared_keys():
    """The last layers use keys of an earlier one."""
    config = transformers.Gemma3nTextConfig(
        **{**models._GROUPED, "head_dim": 8, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=5,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=models.VOCABULARY,
        activation_sparsity_pattern=[0.0] * 4, laurel_rank=4,
    )  # fmt: skip
    return models.build(transformers.Gemma3nForCausalLM, config)


@pytest.mark.parametrize("make", [models.t5, bart, bloom, mpt, qwen3, deepseek, shared_keys, models.gpt_oss])
def test_other_layers_are_right_or_named(make):
    """Against ``token_moments``, whose own tests are dense: see tests/tokens."""
    job = models.Job(without_dropout(make()), lr=0.0)
    model = copy.deepcopy(job.inner["network"])
    (batch,) = models.tokens(4)
    callback = monitor(predict_every=1, surrogates=1)
    models.trainer([callback], max_steps=1).fit(job, models.tokens(4))
    heads = head_projections(model)
    inputs = {"input_ids": batch}
    if model.config.is_encoder_decoder:
        inputs["labels"] = batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenMomentsWarning)
        moments = token_moments(model, [inputs])
    seen = 0
    for index, (name, label) in enumerate(callback.labels.items()):
        short = name.removeprefix("inner.network.")
        got = callback.history.split(callback.history.values["trace_sq"][-1])[index].double()
        if not heads[short].self_attention:
            assert got.isnan().all()
            assert (callback.history.state(label) == NO_VALUE).all()
        elif short not in moments:
            assert any(name in note for note in callback.notes)
            assert got.isnan().all()
        else:
            want = moments[short].spectrum(heads[short].scaling, n=heads[short].width[0])["trace_sq"]
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
            seen += 1
        predicted = callback._predictions.history
        value = predicted.split(predicted.values["entropy_normalized"][-1])[index]
        assert value.isfinite().all() == (short in moments and moments[short].unexplained is None)
    assert seen


def test_a_layer_without_known_rotation_is_named_once_and_the_rest_go_on():
    model = models.llama()

    def reverse(_, args, kwargs):
        turns = tuple(part.flip(-2) for part in kwargs["position_embeddings"])
        return args, {**kwargs, "position_embeddings": turns}

    model.model.layers[1].self_attn.register_forward_pre_hook(reverse, with_kwargs=True)
    callback = monitor(predict_every=1)
    models.trainer([callback], max_steps=3).fit(models.Job(model), models.tokens(12))
    assert len([note for note in callback.notes if "could not be undone" in note]) == 1
    assert callback.states.tolist() == [KNOWN] * 4 + [LEFT_OUT] * 4
    assert callback.history.values["trace"][-1][:4].isfinite().all()


def test_positions_that_a_job_gives_are_heeded():
    class Packed(models.Job):
        def training_step(self, batch, batch_idx):
            place = (torch.arange(16) % 5)[None].expand(len(batch), -1)
            return self.inner["network"](input_ids=batch, position_ids=place, labels=batch).loss

    callback = monitor()
    models.trainer([callback], max_steps=1).fit(Packed(models.llama()), models.tokens(4))
    assert callback.notes == []
    assert callback.history.values["trace"][-1].isfinite().all()


def test_compiled_models():
    job = models.Job(without_dropout(models.llama()), lr=0.0)
    plain, compiled = monitor(), monitor()
    models.trainer([plain], max_steps=1).fit(copy.deepcopy(job), models.tokens(4))
    job.inner["network"].compile(backend="eager")
    models.trainer([compiled], max_steps=1).fit(job, models.tokens(4))
    assert compiled.notes == []
    for name in MOMENTS:
        torch.testing.assert_close(
            compiled.history.values[name][-1], plain.history.values[name][-1], rtol=1e-4, atol=1e-6
        )


def test_validation_is_measured_and_generation_is_not(tmp_path):
    class Generating(models.Job):
        def training_step(self, batch, batch_idx):
            self.inner["network"].generate(batch[:, :4], max_new_tokens=3, do_sample=False)
            return super().training_step(batch, batch_idx)

    job = Generating(without_dropout(models.gpt2()), lr=0.0)
    alone, callback, logger = monitor(), monitor(), CSVLogger(tmp_path)
    models.trainer([alone], max_steps=1).fit(
        models.Job(copy.deepcopy(job.inner["network"]), lr=0.0), models.tokens(4)
    )
    models.trainer([callback], max_steps=1, logger=logger, limit_val_batches=1).fit(
        job, models.tokens(4), models.tokens(4)
    )
    assert any("generate" in note for note in callback.notes)
    torch.testing.assert_close(callback.history.values["trace"][-1], alone.history.values["trace"][-1])
    rows = read_csv(Path(logger.log_dir))
    values = {key: float(value) for row in rows for key, value in row.items() if value}
    assert values["qk/tokens/val/trace/mean"] == pytest.approx(values["qk/tokens/trace/mean"], rel=1e-4)


def test_what_is_not_finite_is_named():
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 3] = torch.nan
    callback = monitor(predict_every=1)
    trainer = models.trainer([callback], max_steps=1)
    trainer.fit(models.Job(model, lr=0.0), models.tokens(4))
    # A mean of the heads that are left would look healthy.
    assert trainer.callback_metrics["pred/entropy/mean"].isnan()
    assert any("not finite" in note and "h.1" in note for note in callback.notes)
    assert callback.states[:4].tolist() == [KNOWN] * 4
    assert NOT_FINITE in callback.states[4:].tolist()


@pytest.mark.parametrize(
    "argument", [{"tokens": 1}, {"surrogates": 0}, {"predict_every": -1}, {"offsets": (0.5,)}]
)
def test_arguments_are_checked(argument):
    with pytest.raises(ValueError, match="expected"):
        TokenMonitor(**argument)
