"""Weights multiplied head by head, seen at the attention call of real models."""

import copy

import models
import peft
import pytest
import torch
import transformers
from heads_oracle import run
from heads_zoo import ZOO, build, feed
from torch import nn
from torch.nn.utils import parametrizations

from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.interventions.head_scaler import head_scalers
from lightning_qk.interventions.qk_clip import clip_qk


def products(call) -> torch.Tensor:
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    return call.query @ key.mT


@pytest.mark.parametrize("name", ZOO)
def test_products_of_every_head_are_scaled_by_its_gamma(name):
    """GQA, fused and transposed layouts, biases, rotations, latent attention; norms behind are refused."""
    model, inputs = build(name), feed(name, positions=True)
    before = run(model, inputs)
    reader = ProjectionReader(model)
    plans = reader.layers
    lenders = {plan.key_layer for plan in plans.values()} - {None}
    seen = 0
    for layer, plan in plans.items():
        # A group's gamma is that of its largest head, whichever it is.
        largest = torch.linspace(0.5, 4.0, plan.heads, dtype=torch.float64).roll(1)
        changed = copy.deepcopy(model)
        if plan.normalizes or plan.position == "relative product" or plan.key_layer or layer in lenders:
            with pytest.raises(ValueError, match="modules="):
                clip_qk(changed, {layer: largest}, cap=1.0, alpha=0.3)
            assert all(
                torch.equal(a, b) for a, b in zip(changed.parameters(), model.parameters(), strict=True)
            )
            continue
        gamma = clip_qk(changed, {layer: largest}, cap=1.0, alpha=0.3)[layer]
        want = (1 / largest.view(plan.sizes.kv_heads, -1).amax(1)).clamp(max=1)
        torch.testing.assert_close(gamma, want)
        after = run(changed, inputs)[layer]
        factor = gamma.repeat_interleave(plan.heads // plan.sizes.kv_heads)[:, None, None]
        want = factor * products(before[layer])
        # Some rotate in float32, whatever their weights are.
        assert (products(after) - want).norm() < 1e-6 * want.norm()
        seen += 1
    assert seen or any(plan.normalizes or plan.key_layer for plan in plans.values())


def test_nothing_else_is_changed():
    model = models.gpt2()
    before = copy.deepcopy(model.state_dict())
    name = next(iter(ProjectionReader(model)))
    clip_qk(model, {name: torch.tensor([1.0, 8.0, 1.0, 1.0])}, cap=2.0)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{name}.c_attn.weight", f"{name}.c_attn.bias"} or changed == {f"{name}.c_attn.weight"}
    ratio = model.state_dict()[f"{name}.c_attn.weight"] / before[f"{name}.c_attn.weight"]
    want = torch.ones(96)
    want[8:16] = want[32 + 8 : 32 + 16] = 0.5
    torch.testing.assert_close(ratio, want.expand_as(ratio))


def videomae() -> nn.Module:
    """Biases of queries are parameters of the layer itself."""
    config = transformers.VideoMAEConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_frames=2,
    )
    return transformers.VideoMAEModel(config)


def multihead() -> nn.Module:
    """Bare fused parameters."""
    return nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)


@pytest.mark.parametrize("make", [videomae, multihead, models.bert])
def test_biases_and_half_precision_are_scaled(make):
    model = make().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    reader = ProjectionReader(model)
    name = next(iter(reader))
    before = reader.layers[name].copy()
    assert before.query_bias is not None
    clip_qk(model, {name: torch.full((4,), 16.0)}, cap=1.0)
    after = reader[name]
    for side in ("query", "query_bias", "key", "key_bias"):
        old = getattr(before, side)
        if old is not None:
            torch.testing.assert_close(getattr(after, side), old / 4, rtol=0, atol=0)


def lora() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    return peft.inject_adapter_in_model(config, models.llama())


def spectral() -> nn.Module:
    model = models.llama()
    for module in model.modules():
        if hasattr(module, "k_proj"):
            parametrizations.spectral_norm(module.k_proj)
    return model


def tied() -> nn.Module:
    model = models.llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    return model


def frozen() -> nn.Module:
    return models.llama().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lora, "adapter.*merge or drop"),
        (spectral, "parametrization or a hook.*remove it"),
        (tied, "another module shares: untie"),
        (frozen, "frozen: unfreeze"),
    ],
)
def test_weights_that_are_no_plain_parameters_are_refused(make, reason):
    model = make()
    reader = ProjectionReader(model)
    with pytest.raises(
        ValueError, match=f"expected query and key weights of model.layers.0.self_attn.*{reason}"
    ):
        head_scalers(reader, reader)


def test_one_layer_that_is_called_often_is_scaled_once():
    """ALBERT: one module for all layers."""
    config = transformers.AlbertConfig(
        hidden_size=32, embedding_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.AlbertModel(config)
    reader = ProjectionReader(model)
    (name,) = reader
    before = reader[name].query.clone()
    clip_qk(reader, {name: torch.full((4,), 4.0)}, cap=1.0)
    torch.testing.assert_close(reader[name].query, before / 2)
