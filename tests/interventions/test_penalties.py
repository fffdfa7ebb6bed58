"""Penalties at attention calls without Lightning."""

import models
import pytest
import torch

from lightning_qk.functional import attention_entropy, diagonal_prior
from lightning_qk.heads.sites import attention_sites
from lightning_qk.interventions.penalties import (
    AttentionPenalty,
    band_measure,
    entropy_band,
    named_prior,
    prior_measure,
    prior_penalty,
)

BATCH = next(iter(models.tokens()))


def layers(model):
    return {site.module: site.name for site in attention_sites(model)}


def gradients(model, weight=None, scale=1.0, measure=None):
    model.zero_grad()
    measure = measure or band_measure(0.4, 0.5)
    with AttentionPenalty(layers(model), measure, 0.0 if weight is None else weight, model=model) as penalty:
        penalty.scale = scale
        output = model(input_ids=BATCH, labels=BATCH)
        (output.loss * scale).backward()
        seen = penalty.take()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, output, seen


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_oss"])
def test_the_gradient_is_linear_in_weight_and_scale_and_outputs_are_the_same(kind):
    model = getattr(models, kind)(attn_implementation="eager").eval()
    plain = model(input_ids=BATCH, labels=BATCH)
    none, output, _ = gradients(model)
    once, _, seen = gradients(model, 2.0)
    scaled, _, _ = gradients(model, 2.0, torch.tensor(8.0))
    twice, _, _ = gradients(model, 4.0)
    assert torch.equal(output.logits, plain.logits)
    assert seen["penalty"] > 0
    moved = 0.0
    for name in none:
        torch.testing.assert_close(scaled[name], 8 * once[name], rtol=1e-3, atol=1e-4)
        step = once[name] - none[name]
        torch.testing.assert_close(twice[name] - none[name], 2 * step, rtol=1e-3, atol=1e-4)
        moved = max(moved, float(step.norm()))
    assert moved > 0.01


def test_learnt_sinks_get_a_gradient():
    """The penalty's own share: with a loss that does not look at attention there is nothing else."""
    model = models.gpt_oss(attn_implementation="eager").eval()
    shares = {}
    for weight in (0.0, 1.0):
        got, _, _ = gradients(model, weight)
        shares[weight] = {name: got[name] for name in got if name.endswith("sinks")}
    assert len(shares[1.0]) == 2
    assert all((shares[1.0][name] != shares[0.0][name]).any() for name in shares[0.0])


def test_without_autograd_nothing_is_computed():
    model = models.llama().eval()

    def never(name, given):
        raise AssertionError("asked")

    with AttentionPenalty(layers(model), never, 1.0) as penalty:
        with torch.no_grad():
            model(input_ids=BATCH)
        penalty.enabled = False
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        penalty.enabled = True
        model.requires_grad_(False)
        model(input_ids=BATCH)
    assert penalty.take() == {}


def test_heads_and_bands():
    query, key = torch.randn(2, 2, 4, 9, 6).unbind()
    entropy = attention_entropy(query, key, normalized=True, reduction="batch")
    inside = entropy_band(query, key, float(entropy.min()) - 0.01, float(entropy.max()) + 0.01)
    assert inside.penalty == 0
    assert inside.outside == 0
    above = entropy_band(query, key, 0.0, 0.1)
    torch.testing.assert_close(above.penalty, (entropy - 0.1).mean())
    assert above.outside == 1
    torch.testing.assert_close(above.entropy, entropy.mean())
    nothing = entropy_band(query, key, 0.4, 0.5, mask=torch.zeros(9, 9, dtype=torch.bool))
    assert nothing.penalty == 0
    one = prior_penalty(query, key, diagonal_prior, heads=[1])
    torch.testing.assert_close(one, prior_penalty(query[:, 1:2], key[:, 1:2], diagonal_prior))
    assert named_prior("grounding", 3) is None
    with pytest.raises(ValueError, match="below 4"):
        prior_penalty(query, key, diagonal_prior, heads=[-1])


def test_what_goes_wrong_in_a_call_names_the_layer():
    model = models.llama()
    wrong = prior_measure(lambda: torch.ones(3, 5))
    with AttentionPenalty(layers(model), wrong, 1.0), pytest.raises(ValueError, match="prior"):
        model(input_ids=BATCH)
    with pytest.raises(ValueError, match="compute attention themselves"):
        AttentionPenalty({torch.nn.MultiheadAttention(4, 2): "own"}, wrong, 1.0)
