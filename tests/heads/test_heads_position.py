"""What positions do to the logits, told for each layer of models whose papers say it."""

import pytest
import transformers as tf
from heads_zoo import BERT, GPT2, GQA, T5, VIT

from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.reader import ProjectionReader, head_projections

SWIN = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "image_size": 16,
    "patch_size": 2,
    "window_size": 4,
}
CONFORMER = {
    **{name: BERT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "intermediate_size": 48,
    "conv_dim": [16],
    "conv_stride": [2],
    "conv_kernel": [2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
FALCON = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
SAM = {**VIT, "num_pos_feats": 16, "output_channels": 16, "mlp_dim": 48, "window_size": 2}
BIASED = "relative bias"
PRODUCT = "relative product"

# Family, options, what all its layers that are read have.
MODELS = {
    "llama": ("Llama", GQA, {"rotary"}),
    "bert": ("Bert", BERT, {"none"}),
    "gpt2": ("GPT2", GPT2, {"none"}),
    "vit": ("ViT", VIT, {"none"}),
    "t5": ("T5", T5, {BIASED, "none"}),
    "umt5": ("UMT5", T5, {BIASED, "none"}),
    "mpnet": ("MPNet", BERT, {BIASED}),
    "swin": ("Swin", SWIN, {BIASED}),
    "layoutlmv3 with biases": (
        "LayoutLMv3",
        {
            **BERT,
            "has_relative_attention_bias": True,
            "coordinate_size": 4,
            "shape_size": 4,
            "visual_embed": False,
        },
        {BIASED},
    ),
    "layoutlmv3 without": (
        "LayoutLMv3",
        {
            **BERT,
            "has_relative_attention_bias": False,
            "has_spatial_attention_bias": False,
            "coordinate_size": 6,
            "shape_size": 4,
            "visual_embed": False,
        },
        {"none"},
    ),
    "beit with biases": ("Beit", {**VIT, "use_relative_position_bias": True}, {BIASED}),
    "beit with shared biases": ("Beit", {**VIT, "use_shared_relative_position_bias": True}, {BIASED}),
    "beit without": ("Beit", VIT, {"none"}),
    "wavlm": ("WavLM", {**CONFORMER, "num_buckets": 8}, {BIASED}),
    "conformer with relative positions": ("Wav2Vec2Conformer", CONFORMER, {PRODUCT}),
    "conformer with rotary": (
        "Wav2Vec2Conformer",
        {**CONFORMER, "position_embeddings_type": "rotary"},
        {"rotary"},
    ),
    "conformer without": ("Wav2Vec2Conformer", {**CONFORMER, "position_embeddings_type": None}, {"none"}),
    "deberta": (
        "DebertaV2",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
        {PRODUCT},
    ),
    "deberta without": ("DebertaV2", {**BERT, "relative_attention": False, "pos_att_type": []}, {"none"}),
    "xlnet": (
        "XLNet",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 50},
        {PRODUCT},
    ),
    "sam": ("SamVision", {**SAM, "use_rel_pos": True}, {PRODUCT}),
    "sam without": ("SamVision", {**SAM, "use_rel_pos": False}, {"none"}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}, {"alibi"}),
    "mpt": (
        "Mpt",
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 50, "max_seq_len": 16},
        {"alibi"},
    ),
    "falcon with alibi": ("Falcon", {**FALCON, "alibi": True}, {"alibi"}),
    "falcon with rotary": ("Falcon", {**FALCON, "alibi": False}, {"rotary"}),
}


def build(family: str, options: dict):
    if not hasattr(tf, family + "Config"):
        pytest.skip(f"this transformers has no {family}")
    return getattr(tf, family + "Model")(getattr(tf, family + "Config")(**options))


@pytest.mark.parametrize("name", MODELS)
def test_what_positions_do(name):
    family, options, expected = MODELS[name]
    model = build(family, options)
    reader = ProjectionReader(model)
    assert {layer.position for layer in reader.layers.values()} == expected, reader.unread
    assert {heads.position for heads in reader.values()} == expected


def test_layers_without_a_table_share_that_of_the_first():
    read = head_projections(tf.T5Model(tf.T5Config(**T5)))
    for name, heads in read.items():
        assert heads.position == ("none" if "EncDec" in name else BIASED)


def test_layers_of_one_model_that_rotate_and_not():
    config = tf.SmolLM3Config(**GQA, no_rope_layers=[1, 0])
    read = head_projections(tf.SmolLM3Model(config))
    assert [heads.position for heads in read.values()] == ["rotary", "none"]


def test_what_cannot_be_told_is_none():
    class Attention(tf.models.bert.modeling_bert.BertSelfAttention):
        def forward(self, hidden_states, pair_bias=None):
            return super().forward(hidden_states)

    model = tf.BertModel(tf.BertConfig(**BERT))
    for layer in model.encoder.layer:
        layer.attention.self.__class__ = Attention
    plans = ProjectionReader(model).layers
    assert plans
    assert all(isinstance(plan, LayerReader) and plan.position is None for plan in plans.values())
