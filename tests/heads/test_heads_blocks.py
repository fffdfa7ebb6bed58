"""Which modules are taken for the blocks of a model."""

import models
import pytest
import torch
import transformers
from torch import nn

from lightning_qk.heads.sites import find_blocks

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4))


def bart() -> nn.Module:
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return transformers.BartModel(transformers.BartConfig(d_model=16, vocab_size=30, **sides, **ffn))


def torch_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)


@pytest.mark.parametrize(
    ("make", "names", "first"),
    [
        (models.gpt2, ["transformer.h.0", "transformer.h.1"], [True, False]),
        (models.bert, ["bert.encoder.layer.0", "bert.encoder.layer.1"], [True, False]),
        (models.llama, ["model.layers.0", "model.layers.1"], [True, False]),
        # Sublayers are a list too.
        (
            models.t5,
            [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)],
            [True, False] * 2,
        ),
        (bart, [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)], [True, False] * 2),
        # Stages are one.
        (
            swin,
            ["encoder.layers.0.blocks.0", "encoder.layers.0.blocks.1", "encoder.layers.1"],
            [True, False, True],
        ),
        (torch_encoder, ["layers.0", "layers.1"], [True, False]),
        # A list of models.
        (
            lambda: nn.ModuleList([models.gpt2(), vit()]),
            ["0.transformer.h.0", "0.transformer.h.1", "1.layers.0", "1.layers.1"],
            [True, False] * 2,
        ),
    ],
)
def test_blocks(make, names, first):
    model = make()
    blocks, without = find_blocks(model)
    assert [name.replace("1.encoder.layer.", "1.layers.") for name in blocks] == names
    assert [block.is_first for block in blocks.values()] == first
    assert without == {}
    for name, block in blocks.items():
        assert model.get_submodule(name) is block.module


def test_models_around_a_block_nearest_first():
    blocks, _ = find_blocks(models.Job(models.t5()))
    kinds = [[type(model).__name__ for model in block.models] for block in blocks.values()]
    assert kinds == [["T5Stack", "T5ForConditionalGeneration"]] * 4


def test_attention_in_no_list_is_named():
    blocks, without = find_blocks(nn.TransformerEncoderLayer(16, 2))
    assert blocks == {}
    assert list(without) == ["self_attn"]
    assert find_blocks(torch.nn.Linear(2, 2)) == ({}, {})
