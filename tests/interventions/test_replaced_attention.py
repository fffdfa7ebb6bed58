"""SoftCap and HardAttention on whole models, without and with a trainer."""

import lightning as L
import models
import pytest
import torch
import transformers
from transformers.modeling_utils import AttentionInterface

from lightning_qk import AttentionMonitor, EntropyBand, HardAttention, SoftCap
from lightning_qk.heads.sites import attention_sites
from lightning_qk.interventions.replaced_attention import HardRetrieval, SoftCapped, soft_capped_attention

CAP = 2.0
BATCH = next(iter(models.tokens()))


def layers(model):
    sites = list(attention_sites(model))
    cross = frozenset(site.name for site in sites if site.is_cross)
    return {site.module: site.name for site in sites}, cross


def run(model, padded=True):
    mask = torch.ones_like(BATCH)
    if padded:
        mask[:2, 12:] = 0
    labels = BATCH.masked_fill(mask == 0, -100)
    output = model(input_ids=BATCH, attention_mask=mask, labels=labels)
    output.loss.backward()
    logits = output.logits.detach()
    return logits[mask.bool()], {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "mistral", "t5", "gpt_oss"])
def test_a_cap_beyond_all_logits_changes_nothing_and_a_low_one_does(kind, implementation):
    model = getattr(models, kind)(attn_implementation=implementation).eval()
    want = run(model)
    names, cross = layers(model)
    for cap, is_same in ((1e6, True), (CAP, False)):
        model.zero_grad()
        with SoftCapped(names, cap, cross=cross, model=model):
            got = run(model)
        if is_same:
            assert_close(got, want)
        else:
            assert (got[0] - want[0]).abs().max() > 0.01
    model.zero_grad()
    after = run(model)
    assert torch.equal(after[0], want[0])


def test_the_cap_is_that_of_gemma2():
    """A Gemma 2 without its cap, capped here, is a Gemma 2."""
    capped = models.gemma2(attn_implementation="eager").eval()
    config = transformers.Gemma2Config(**{**capped.config.to_dict(), "attn_logit_softcapping": None})
    bare = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    bare.load_state_dict(capped.state_dict())
    # The class has attributes of a cap, without a value.
    with SoftCapped(layers(bare)[0], 2.0):
        got = run(bare)
    assert_close(got, run(capped))
    with pytest.raises(ValueError, match="of its own"):
        SoftCapped(layers(capped)[0], 2.0)


def test_dropout_is_kept():
    query, key, value = torch.randn(3, 2, 4, 64, 8).unbind()
    key, value = key[:, :2], value[:, :2]
    with pytest.raises(ValueError, match="cap"):
        soft_capped_attention(query, key, value, 0.0)
    torch.manual_seed(0)
    got = soft_capped_attention(query, key, torch.ones_like(value), 5.0, dropout=0.4, is_causal=True)
    assert got.std() > 0.1  # weights no longer add up to 1
    assert got.mean() == pytest.approx(1.0, abs=0.05)
    still = soft_capped_attention(query, key, torch.ones_like(value), 5.0, dropout=0.4, training=False)
    torch.testing.assert_close(still, torch.ones_like(still))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_hard_attention_is_the_limit_of_sharp_softmax(kind):
    """Logits times a large number: softmax takes the largest alone."""
    model = getattr(models, kind)(attn_implementation="eager").double().eval()
    names, cross = layers(model)
    with HardRetrieval(names, cross=cross):
        got = run(model)
    assert all(gradient.isfinite().all() for gradient in got[1].values())
    for module in names:
        module.scaling = getattr(module, "scaling", 1.0) * 1e5
        if kind == "t5":
            model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data *= 1
    if kind != "t5":  # its bias is not scaled
        want = run(model)
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)


def test_sinks_are_refused_by_name():
    model = models.gpt_oss(attn_implementation="eager")
    with (
        HardRetrieval(layers(model)[0]),
        pytest.raises(ValueError, match=r"layers\.0\.self_attn.*learnt sink"),
    ):
        run(model)


def fit(callbacks, model=None, **kwargs):
    L.seed_everything(2, verbose=False)
    torch.manual_seed(2)
    job = models.Job(models.llama() if model is None else model, lr=0.01)
    trainer = models.trainer(callbacks, **{"max_steps": 2, **kwargs})
    trainer.fit(job, models.tokens(), models.tokens(4))
    return job, trainer


def test_callbacks_are_at_work_in_training_and_evaluation_and_leave_nothing():
    before = dict(vars(AttentionInterface))
    model = models.llama()
    config = model.config.to_dict()
    monitor = AttentionMonitor(rows=None, every_n_eval_batches=1)
    job, trainer = fit(
        [SoftCap(0.5), monitor, EntropyBand(weight=0.1, low=0.2, high=0.3)], model, val_check_interval=2
    )
    assert dict(vars(AttentionInterface)) == before
    assert model.config.to_dict() == config
    metrics = trainer.callback_metrics
    # The monitor hears what is computed, the penalty too.
    for key in ("attn/max_abs_logit/max", "attn/val/max_abs_logit/max"):
        assert 0.4 < metrics[key] <= 0.5
    assert metrics["soft_cap/cap"] == 0.5
    assert float(metrics["entropy_band/entropy"]) == pytest.approx(
        float(metrics["attn/entropy_normalized/mean"]), rel=1e-3
    )
    assert metrics["entropy_band/entropy"] > 0.9
    plain, _ = fit([])
    assert job.losses[0] != plain.losses[0]
    names, cross = layers(job.inner["network"])
    with SoftCapped(names, 0.5, cross=cross):
        inside = float(job.inner["network"](input_ids=models_batch(), labels=models_batch()).loss)
    assert inside == pytest.approx(float(metrics["val/loss"]), rel=1e-4)
    outside = models.trainer([SoftCap(0.5)]).validate(job, models.tokens(4), verbose=False)[0]["val/loss"]
    assert outside == pytest.approx(inside, rel=1e-4)


def models_batch():
    return next(iter(models.tokens(4)))


@pytest.mark.parametrize("setup", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_hard_attention_trains(setup):
    monitor = AttentionMonitor(rows=None)
    job, _ = fit([HardAttention(), monitor], max_steps=8, **setup)
    assert all(loss.isfinite() for loss in job.losses)
    assert torch.stack(job.losses[-4:]).mean() < torch.stack(job.losses[:4]).mean()
    assert any("left out" in note for note in monitor.notes)


def test_gradient_checkpointing_gives_the_same_gradient():
    results = []
    for is_on in (False, True):
        torch.manual_seed(4)
        model = models.llama()
        if is_on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with SoftCapped(layers(model)[0], CAP):
            results.append(run(model))
    assert_close(*results)


def test_two_replacements_of_one_layer_are_refused():
    with pytest.raises(ValueError, match=r"got two for .*layers\.0\.self_attn"):
        fit([SoftCap(), HardAttention()])
    fit([SoftCap(modules="*.0.*"), HardAttention(modules="*.1.*")])
    with pytest.raises(ValueError, match="cap"):
        SoftCap(0.0)
    with pytest.raises(ValueError, match="of its own"):
        fit([SoftCap()], models.gemma2())


@pytest.mark.slow
def test_a_compiled_model_is_capped_too():
    model = models.llama().eval()
    want = model(input_ids=BATCH).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=BATCH).logits, want, rtol=1e-4, atol=1e-4)
    with SoftCapped(layers(model)[0], CAP, model=compiled):
        capped = model(input_ids=BATCH).logits
        torch.testing.assert_close(compiled(input_ids=BATCH).logits, capped, rtol=1e-4, atol=1e-4)
        assert (capped - want).abs().max() > 0.01
    torch.testing.assert_close(compiled(input_ids=BATCH).logits, want, rtol=1e-4, atol=1e-4)
