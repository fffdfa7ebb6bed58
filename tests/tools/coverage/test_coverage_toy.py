"""Toy models: small, alike in what matters, and the same each time."""

import contextlib

import pytest
import torch
from coverage_toys import toy

from tools.coverage import catalogue
from tools.coverage.feed import feeds
from tools.coverage.toy import LADDER, build, shrunk


def config(model_type: str):  # type: ignore[no-untyped-def]
    return shrunk(catalogue.config(model_type), LADDER[0], model_type)


def test_heads_stay_and_widths_shrink_alike() -> None:
    whole, small = catalogue.config("llama"), config("llama")
    assert small.num_attention_heads == whole.num_attention_heads
    assert small.hidden_size * 8 == whole.hidden_size
    assert small.head_dim * 8 == whole.head_dim
    assert small.num_hidden_layers == 2
    assert small.vocab_size <= 160


def test_every_kind_of_layer_stays() -> None:
    for model_type in ("gemma3_text", "gpt_oss", "qwen3_next", "gemma4_text"):
        whole, small = catalogue.config(model_type), config(model_type)
        assert set(small.layer_types) == set(whole.layer_types)
        assert len(small.layer_types) == small.num_hidden_layers <= 4


def test_layers_that_differ_keep_their_difference() -> None:
    small = config("gemma4_text")
    widths = {layer.head_dim for layer in small.per_layer_config}
    assert len(widths) == 2


def test_tokens_stay_apart_and_in_the_vocabulary() -> None:
    small = config("qwen2_vl")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = [getattr(small, name) for name in names]
    assert len(set(tokens)) == len(tokens)
    assert max(tokens) < small.text_config.vocab_size


def test_a_toy_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(next(catalogue.classes("bert")), config("bert"))
    torch.rand(3)
    second = build(next(catalogue.classes("bert")), config("bert"))
    torch.set_rng_state(before)
    assert torch.equal(torch.get_rng_state(), before)
    state = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, state[name])
    assert not first.training
    biases = [value for name, value in state.items() if name.endswith("bias")]
    assert biases
    assert all(bias.abs().max() > 0 for bias in biases)


@pytest.mark.parametrize("model_type", ["bert", "vit", "whisper", "t5", "llama"])
def test_inputs_suit_the_forward(model_type: str) -> None:
    model = toy(model_type)
    with torch.no_grad():
        output = model(**next(iter(feeds(model, model_type))))
    assert output[0].isfinite().all()


@pytest.mark.parametrize(
    "model_type",
    [
        "fun_asr_nano_encoder",  # features as wide as its first linear map
        "minicpmv4_6_vision",  # patches of several images in a strip
        "paddleocr_vl_vision",  # grids and patches one by one
        "qwen3_omni_moe_audio_encoder",  # frames of several sounds
        "sam3_mask_decoder",  # states of other parts, known by name
        "molmo2_adapter",  # an override
    ],
)
def test_some_inputs_suit_the_forward_of_a_part(model_type: str) -> None:
    model = toy(model_type)
    output = None
    with torch.no_grad():
        for given in feeds(model, model_type):
            with contextlib.suppress(Exception):
                output = model(**given)
                break
    assert output is not None
    assert next(iter(output.values())).isfinite().all()


def test_overrides_of_a_part_hold_in_the_whole() -> None:
    for vision in (config("llama4").vision_config, config("llama4_vision_model")):
        assert vision.intermediate_size == 4 * vision.hidden_size


def test_inputs_are_the_same_each_time() -> None:
    first, second = (next(iter(feeds(toy("t5"), "t5"))) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
