"""Layers whose queries and keys have norms, or latents, read together: gradients are those of a loss term."""

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_qk import locater_penalty
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.regularizers.latents import LatentStacker
from lightning_qk.regularizers.locater import LocaterPenalty
from lightning_qk.regularizers.settings import Settings
from lightning_qk.regularizers.stacks import Stacker

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "vocab_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "a gain for each head's rows": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "a gain for all rows": lambda: Olmo2ForCausalLM(Olmo2Config(**SMALL, pad_token_id=0)),
    "one and more": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)),
}


def _latent(**options: object) -> nn.Module:
    config = {**SMALL, "num_key_value_heads": 4, "first_k_dense_replace": 3} | options
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config, **widths))


LATENTS = {"of keys": lambda: _latent(q_lora_rank=None), "of both": lambda: _latent(q_lora_rank=12)}
MODELS |= LATENTS


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    network = MODELS[name]().to(dtype)
    with torch.no_grad():
        for own, parameter in network.named_parameters():
            if any(part in own for part in ("q_norm", "k_norm", "a_layernorm")):
                parameter.normal_(1.0, 0.3)
    return network


def added(network: nn.Module, parameters: list[nn.Parameter]) -> dict[str, torch.Tensor]:
    network.zero_grad()
    penalty = LocaterPenalty(ProjectionReader(network))
    penalty.add_gradient(Settings("variance", "model", None, 1.0), 0.7, parameters)
    return {name: own.grad.clone() for name, own in network.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    network = model(name)
    reader = ProjectionReader(network)
    stacker = LatentStacker() if name in LATENTS else Stacker()
    stacks, others = stacker.stacks(reader.layers, reader.layers)
    assert [stack.names for stack in stacks] == [list(reader.layers)]
    assert not others
    (0.7 * locater_penalty(network)).backward()
    want = {name: own.grad.clone() for name, own in network.named_parameters() if own.grad is not None}
    got = added(network, list(network.parameters()))
    assert got.keys() == want.keys()
    assert sum("norm" in own for own in got) == (3 if name == "of keys" else 6)
    for own, gradient in want.items():
        torch.testing.assert_close(got[own], gradient, rtol=1e-4, atol=1e-6)


def test_only_what_is_wanted_gets_a_gradient() -> None:
    network = model("a gain for each head's rows")
    gains = [own for name, own in network.named_parameters() if "q_norm" in name]
    assert {name.split(".")[-2] for name in added(network, gains)} == {"q_norm"}


@pytest.mark.parametrize("name", ["one and more", "of both"])
def test_half_precision(name: str) -> None:
    network = model(name, torch.bfloat16)
    got = added(network, list(network.parameters()))
    reference = model(name)
    want = added(reference, list(reference.parameters()))
    for own, gradient in want.items():
        assert got[own].dtype == torch.bfloat16
        assert (got[own].float() - gradient).norm() <= 0.05 * gradient.norm()
