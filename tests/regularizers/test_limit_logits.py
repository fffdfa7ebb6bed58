"""The limit form where logits are no bilinear form of tokens, against logits computed here, in float64."""

import copy
from collections.abc import Callable

import models
import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_qk import head_projections, locater_penalty
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.regularizers.locater import LocaterPenalty
from lightning_qk.regularizers.settings import Settings
from lightning_qk.tokens import LayerInputs

LIMIT = 0.5
_SIZES = {**models._GROUPED, "head_dim": 8}


def heads(rows: Tensor, count: int) -> Tensor:
    return rows.unflatten(-1, (count, -1)).transpose(0, 1)


def of_gpt2(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    query, key, _ = (x @ layer.c_attn.weight + layer.c_attn.bias).chunk(3, -1)
    return heads(query, 4), heads(key, 4)


def of_bert(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return heads(layer.query(x), 4), heads(layer.key(x), 4)


def of_qwen2(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return heads(layer.q_proj(x), 4), heads(layer.k_proj(x), 2)


def of_qwen3(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    query, key = of_qwen2(layer, x)
    return layer.q_norm(query), layer.k_norm(key)


def of_olmo2(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return heads(layer.q_norm(layer.q_proj(x)), 4), heads(layer.k_norm(layer.k_proj(x)), 2)


def of_deepseek(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    query = heads(layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x))), 4)
    latent, shared = layer.kv_a_proj_with_mqa(x).split([10, 4], -1)
    key = heads(layer.kv_b_proj(layer.kv_a_layernorm(latent)), 4)[..., :8]
    return query, torch.cat([key, shared.expand(4, -1, -1)], -1)


def qwen2() -> nn.Module:
    return models.build(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**models._GROUPED))


def qwen3() -> nn.Module:
    return models.build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**_SIZES))


def olmo2() -> nn.Module:
    return models.build(transformers.Olmo2ForCausalLM, transformers.Olmo2Config(**models._GROUPED))


def deepseek() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **{**models._GROUPED, "num_key_value_heads": 4},
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=2,
    )
    return models.build(transformers.DeepseekV3ForCausalLM, config)


CASES: dict[
    str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]], int]
] = {
    "gpt2": (models.gpt2, of_gpt2, 8),
    "bert": (models.bert, of_bert, 8),
    "qwen2": (qwen2, of_qwen2, 8),
    "qwen3": (qwen3, of_qwen3, 8),
    "olmo2": (olmo2, of_olmo2, 8),
    "deepseek": (deepseek, of_deepseek, 12),
}


def network(kind: str) -> nn.Module:
    """Biases and gains are not as they are at the start."""
    torch.manual_seed(0)
    model = CASES[kind][0]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2 if "norm" in name else 0.5)
    return model


def seen(model: nn.Module, tokens: int = 4 * 11) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters its layers."""
    batch = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    with LayerInputs(model, tokens=tokens) as inputs, torch.no_grad():
        model(input_ids=batch)
    return inputs.inputs()


def dense(kind: str, model: nn.Module, inputs: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, dict]:
    """Penalty and gradients from the logits of all pairs of tokens."""
    own, (_, make, d_head) = copy.deepcopy(model).double(), CASES[kind]
    total = torch.zeros((), dtype=torch.float64)
    for name, (tokens, _) in inputs.items():
        query, key = make(own.get_submodule(name), tokens.double())
        key = key.repeat_interleave(len(query) // len(key), 0)
        variance = (d_head**-0.5 * query @ key.mT).var(-1, correction=0).mean(-1)
        total = total + (variance.sqrt() / LIMIT).log().clamp_min(0).square().sum()
    parameters = dict(own.named_parameters())
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return total.detach(), dict(zip(parameters, found, strict=True))


def assert_gradients(model: nn.Module, want: dict, weight: float) -> None:
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if want[name] is None else weight * want[name]
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got - expected).norm() <= 1e-4 * expected.norm() + 1e-5, name


@pytest.mark.parametrize("kind", CASES)
def test_penalty_and_gradient_are_those_of_the_logits(kind):
    model = network(kind)
    inputs = seen(model)
    value, gradients = dense(kind, model, inputs)
    assert value > 1
    penalty = locater_penalty(model, form="limit", inputs=inputs, limit=LIMIT)
    torch.testing.assert_close(penalty.double(), value, rtol=1e-5, atol=0)
    penalty.backward()
    assert_gradients(model, gradients, 1.0)

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    reader = ProjectionReader(model)
    penalizer = LocaterPenalty(reader, by_tokens=True, limited=True)
    settings = Settings("limit", "model", None, 1.0, None, LIMIT, inputs)
    total, reached = penalizer.add_gradient(settings, 2.0, list(model.parameters()))
    assert reached
    for got in (total, penalizer.value(settings)):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=0)
    assert_gradients(model, gradients, 2.0)


def test_norms_make_the_length_of_projections_meaningless():
    model = network("qwen3")
    inputs = seen(model)
    before = locater_penalty(model, form="limit", inputs=inputs, limit=LIMIT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter *= 30
    torch.testing.assert_close(
        locater_penalty(model, form="limit", inputs=inputs, limit=LIMIT), before, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "deepseek"])
def test_of_nothing_there_is_nothing(kind):
    """Weights of zero, and layers without tokens."""
    model = network(kind)
    inputs = seen(model)
    empty = {name: (tokens, torch.zeros_like(weight)) for name, (tokens, weight) in inputs.items()}
    assert locater_penalty(model, form="limit", inputs=empty, limit=1e-6) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    penalty = locater_penalty(model, form="limit", inputs=inputs, limit=1e-6)
    penalty.backward()
    assert penalty == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_projections_alone_have_their_biases():
    model = network("gpt2")
    inputs = seen(model)
    penalty = locater_penalty(head_projections(model), form="limit", inputs=inputs, limit=LIMIT)
    torch.testing.assert_close(penalty.double(), dense("gpt2", model, inputs)[0], rtol=1e-5, atol=0)


def test_what_the_loss_does_not_train_stays_without_a_gradient():
    """An optimizer moves a parameter whose gradient is zero, by its momentum or weight decay."""
    model = network("qwen2")
    inputs = seen(model)
    own = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in own.items() if ".0." in name}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    settings = Settings("limit", "model", None, 1.0, None, LIMIT, inputs)
    penalizer = LocaterPenalty(ProjectionReader(model), by_tokens=True, limited=True)
    _, reached = penalizer.add_gradient(settings, 1.0, list(own.values()))
    assert reached
    assert trained["model.layers.0.self_attn.q_proj.weight"].grad.any()
    assert all(parameter.grad is None for name, parameter in own.items() if name not in trained)


def test_a_layer_that_runs_several_times_has_the_tokens_of_all_runs():
    config = transformers.AlbertConfig(
        hidden_size=32,
        embedding_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
        max_position_embeddings=64,
    )
    model = models.build(transformers.AlbertForMaskedLM, config).eval()
    own: list[Tensor] = []
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    layer.register_forward_pre_hook(lambda _, args: own.append(args[0][:, 1:].flatten(0, 1).detach()))
    ((tokens, _),) = seen(model).values()
    torch.testing.assert_close(tokens, torch.cat(own))
