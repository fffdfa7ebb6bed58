"""σReparam against singular value decompositions, on real models."""

import copy

import models
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_qk import (
    AttentionMonitor,
    LocAteR,
    QKSpectrumMonitor,
    SigmaReparam,
    add_sigma_reparam,
    head_projections,
    locater_penalty,
    plain_state_dict,
    remove_sigma_reparam,
)
from lightning_qk.interventions.sigma_reparam import sigma_gains

MODELS = {"gpt2": models.gpt2, "bert": models.bert, "llama": models.llama, "gpt_oss": models.gpt_oss}
BATCH = torch.randint(3, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def sides(model: nn.Module) -> list[Tensor]:
    """W_q and W_k of every layer that act now, (out, in)."""
    found = []
    for head in head_projections(model).values():
        found += [head.query.flatten(0, 1), head.key.flatten(0, 1)]
    return found


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("projections", ["query_key", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_at_the_start_is_the_same_and_gains_are_singular_values(name, projections):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    before, weights = model(input_ids=BATCH).logits, [weight.clone() for weight in sides(model)]
    names = add_sigma_reparam(model, projections=projections)
    torch.testing.assert_close(model(input_ids=BATCH).logits, before, rtol=0, atol=0)
    gains = torch.cat([gain.flatten() for gain in sigma_gains(model).values()])
    assert list(sigma_gains(model)) == [own for own, _ in model.named_modules() if own in names]
    tops = torch.stack([torch.linalg.svdvals(weight)[0] for weight in weights])
    for top in tops:
        assert (gains - top).abs().min() < 1e-5 * top
    if projections == "query_key":
        assert len(gains) == len(weights)
    else:
        assert len(gains) > len(weights)


@pytest.mark.parametrize("name", MODELS)
def test_a_weight_that_acts_has_the_spectral_norm_of_its_gain(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    names = add_sigma_reparam(model)
    perturb(model)
    for own in names:
        held = model.get_submodule(own).parametrizations.weight
        for _ in range(300):
            held[0].iterate(held.original)
    # Gains of a fused projection are its queries', then its keys'.
    gains = torch.cat([sigma_gains(model)[own] for own in names])
    for weight, gain in zip(sides(model), gains, strict=True):
        assert torch.linalg.svdvals(weight)[0].item() == pytest.approx(abs(gain.item()), rel=1e-3)


def test_gradients_are_those_through_the_decomposition():
    torch.manual_seed(0)
    model = models.llama().double()
    add_sigma_reparam(model)
    projection = model.model.layers[0].self_attn.q_proj
    parametrization = projection.parametrizations.weight[0]
    with torch.no_grad():
        projection.parametrizations.weight.original.normal_()
        for _ in range(2000):
            parametrization.iterate(projection.parametrizations.weight.original)
    other = projection.parametrizations.weight.original.detach().clone().requires_grad_()
    gain = parametrization.gain.detach().clone().requires_grad_()
    direction = torch.randn_like(other)
    (projection.weight * direction).sum().backward()
    (gain * other / torch.linalg.svdvals(other)[0] * direction).sum().backward()
    torch.testing.assert_close(
        projection.parametrizations.weight.original.grad, other.grad, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(parametrization.gain.grad, gain.grad)


@pytest.mark.parametrize("name", MODELS)
def test_removed_it_leaves_the_weights_that_acted(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    keys = list(model.state_dict())
    names = add_sigma_reparam(model)
    perturb(model)
    before = model(input_ids=BATCH).logits
    assert sorted(remove_sigma_reparam(model)) == sorted(names)
    torch.testing.assert_close(model(input_ids=BATCH).logits, before, rtol=0, atol=0)
    assert sorted(model.state_dict()) == sorted(keys)
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())
    for own in names:
        module = model.get_submodule(own)
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks
    model.load_state_dict(MODELS[name]().state_dict())
    assert add_sigma_reparam(model) == names


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_go_both_ways(name):
    torch.manual_seed(0)
    plain, model, third = MODELS[name]().eval(), MODELS[name]().eval(), MODELS[name]().eval()
    add_sigma_reparam(model)
    perturb(model)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(input_ids=BATCH).logits, plain(input_ids=BATCH).logits, rtol=0, atol=0)
    gains = sigma_gains(model)
    tops = {torch.linalg.svdvals(weight)[0].item() for weight in sides(plain)}
    for gain in torch.cat(list(gains.values())).tolist():
        assert min(abs(gain - top) for top in tops) < 1e-5 * gain

    perturb(model)
    third.load_state_dict(plain_state_dict(model.state_dict()))
    torch.testing.assert_close(third(input_ids=BATCH).logits, model(input_ids=BATCH).logits, rtol=0, atol=0)
    copied = copy.deepcopy(model)
    add_sigma_reparam(plain)
    plain.load_state_dict(model.state_dict())
    for other in (copied, plain):
        torch.testing.assert_close(
            other(input_ids=BATCH).logits, model(input_ids=BATCH).logits, rtol=0, atol=0
        )
    assert plain_state_dict(third.state_dict()).keys() == third.state_dict().keys()


def test_recomputation_finds_what_the_forward_found():
    gradients = []
    for use_reentrant in (None, False, True):
        torch.manual_seed(0)
        model = models.llama()
        add_sigma_reparam(model)
        perturb(model)
        model.train()
        if use_reentrant is None:
            loss = model(input_ids=BATCH, labels=BATCH).loss
        else:
            x = model.model.embed_tokens(BATCH)
            loss = checkpoint(
                lambda x, model=model: model(inputs_embeds=x, labels=BATCH).loss,
                x,
                use_reentrant=use_reentrant,
            )
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, grad in gradients[0].items():
            torch.testing.assert_close(other[name], grad)


def test_evaluation_is_no_iteration_and_reading_neither():
    model = models.gpt2()
    add_sigma_reparam(model)
    perturb(model)
    vectors = [buffer.clone() for buffer in model.buffers()]
    model.train()
    head_projections(model)
    locater_penalty(model).backward()
    model.eval()(input_ids=BATCH)
    assert all(torch.equal(a, b) for a, b in zip(vectors, model.buffers(), strict=True))


def test_what_cannot_be_reparametrized_is_refused():
    with pytest.raises(ValueError, match="parameter of the layer itself"):
        add_sigma_reparam(nn.TransformerEncoderLayer(16, 2, 16))
    with pytest.raises(ValueError, match="match at least one"):
        add_sigma_reparam(models.gpt2(), modules="*.none")
    with pytest.raises(ValueError, match="'query_key' or 'all'"):
        add_sigma_reparam(models.gpt2(), projections="values")
    model = models.gpt2()
    add_sigma_reparam(model)
    with pytest.raises(ValueError, match="parametrization or a hook"):
        add_sigma_reparam(model)


class Late(models.Job):
    """Builds its network when it is told to."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), lr=1e-2, optimizer="adamw")

    def configure_model(self) -> None:
        if isinstance(self.inner["network"], nn.Identity):
            self.inner["network"] = models.gpt2()


@pytest.mark.parametrize("make", [Late, lambda: models.Job(lr=1e-2, optimizer="adamw")])
def test_the_callback_comes_before_the_optimizer(make, tmp_path):
    torch.manual_seed(0)
    module = make()
    spectrum, attention = QKSpectrumMonitor(report=False), AttentionMonitor(report=False)
    callbacks = [SigmaReparam(), LocAteR(0.1), spectrum, attention]
    trainer = models.trainer(callbacks, max_steps=3)
    trainer.fit(module, models.tokens())
    gains = sigma_gains(module)
    assert len(gains) == 2
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(gain) for gain in gains.values()} < trained
    assert all(trainer.optimizers[0].state[gain] for gain in gains.values())
    assert "configure_model" not in module.__dict__
    for key in ("sigma_reparam/gain/mean", "qk/eig_var/mean", "attn/entropy/mean", "locater/penalty"):
        assert key in trainer.callback_metrics
    want = torch.stack([gain.mean() for gain in gains.values()]).mean().item()
    assert trainer.callback_metrics["sigma_reparam/gain/mean"].item() == pytest.approx(want, rel=1e-5)

    # On with the run, and from its checkpoint to an evaluation.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = make()
    again = models.trainer([SigmaReparam(remove_at_end=True)], max_steps=5)
    again.fit(resumed, models.tokens(), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 5
    assert not sigma_gains(resumed)
    assert "inner.network.transformer.h.0.attn.c_attn.weight" in resumed.state_dict()
    tested = make()
    models.trainer([SigmaReparam()]).validate(
        tested, models.tokens(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    for name, gain in sigma_gains(tested).items():
        assert torch.equal(gain, gains[name])


def test_a_module_without_attention_is_refused():
    with pytest.raises(ValueError, match="contains transformer attention"):
        models.trainer([SigmaReparam()]).fit(models.Job(nn.Linear(2, 2)), models.tokens())


def test_training_in_half_precision_is_stable():
    torch.manual_seed(0)
    module = models.Job(models.llama(), lr=1e-2, optimizer="adamw")
    models.trainer([SigmaReparam(projections="all")], max_steps=4, precision="bf16-mixed").fit(
        module, models.tokens()
    )
    assert all(loss.isfinite() for loss in module.losses)
