"""Toy models of every architecture that the reader is tested on, built from configurations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from heads_oracle import randomize
from torch import Tensor, nn

WIDTH, TOKENS = 32, 7


class Expect(NamedTuple):
    """What the layers of a toy model must have in common."""

    layers: int
    heads: int = 4
    kv_heads: int = 4
    cross: int = 0
    rotary: bool = False
    qk_norm: bool = False
    folded: int = 0
    # Coordinates at the end of each q and k that are normalized apart from the others.
    apart: int = 0
    # A rotation of those gives them in another order.
    reordered: bool = False
    borrowed: int = 0


class Toy(NamedTuple):
    """A model type: how to build it, what to feed it, what to expect."""

    build: Callable[[], nn.Module]
    expect: Expect
    feed: str = "text"


BERT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
LLAMA = {**BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**LLAMA, "num_key_value_heads": 2}
T5 = {
    "d_model": WIDTH,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 50,
}
WHISPER = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 50,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}
BART = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}


def _of(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        if not hasattr(tf, model):
            pytest.skip(f"this transformers has no {model}")
        return getattr(tf, model)(getattr(tf, config)(**options))

    return make


ROTARY = Expect(2, rotary=True, folded=2)
ZOO: dict[str, Toy] = {
    "gpt2": Toy(_of("GPT2LMHeadModel", "GPT2Config", **GPT2), Expect(2, folded=2)),
    "gpt2-inverse-layer": Toy(
        _of("GPT2Model", "GPT2Config", **GPT2, scale_attn_by_inverse_layer_idx=True), Expect(2, folded=2)
    ),
    "gpt2-unscaled": Toy(
        _of("GPT2Model", "GPT2Config", **GPT2, scale_attn_weights=False), Expect(2, folded=2)
    ),
    "gpt2-cross": Toy(
        _of("GPT2Model", "GPT2Config", **GPT2, add_cross_attention=True),
        Expect(4, cross=2, folded=2),
        "cross",
    ),
    "bert": Toy(_of("BertForMaskedLM", "BertConfig", **BERT), Expect(2)),
    "bert-cross": Toy(
        _of("BertModel", "BertConfig", **BERT, is_decoder=True, add_cross_attention=True),
        Expect(4, cross=2),
        "cross",
    ),
    "roberta": Toy(_of("RobertaModel", "RobertaConfig", **BERT), Expect(2)),
    "distilbert": Toy(
        _of(
            "DistilBertModel",
            "DistilBertConfig",
            dim=WIDTH,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            vocab_size=50,
        ),
        Expect(2),
    ),
    "llama": Toy(
        _of("LlamaForCausalLM", "LlamaConfig", **GQA, attention_bias=True),
        ROTARY._replace(kv_heads=2),
        "rotary",
    ),
    "mistral": Toy(
        _of("MistralModel", "MistralConfig", **GQA, head_dim=12), ROTARY._replace(kv_heads=2), "rotary"
    ),
    "qwen2": Toy(_of("Qwen2Model", "Qwen2Config", **GQA), ROTARY._replace(kv_heads=2), "rotary"),
    "qwen3": Toy(
        _of("Qwen3Model", "Qwen3Config", **GQA, head_dim=12),
        ROTARY._replace(kv_heads=2, qk_norm=True),
        "rotary",
    ),
    "gpt-neox": Toy(_of("GPTNeoXModel", "GPTNeoXConfig", **BERT), ROTARY, "rotary"),
    "phi3": Toy(_of("Phi3Model", "Phi3Config", **GQA), ROTARY._replace(kv_heads=2), "rotary"),
    "gemma": Toy(
        _of("GemmaModel", "GemmaConfig", **{**GQA, "num_key_value_heads": 1}, head_dim=12),
        ROTARY._replace(kv_heads=1),
        "rotary",
    ),
    "gemma2": Toy(
        _of("Gemma2Model", "Gemma2Config", **GQA, head_dim=12, query_pre_attn_scalar=20),
        ROTARY._replace(kv_heads=2),
        "rotary",
    ),
    "gemma3": Toy(
        _of(
            "Gemma3TextModel",
            "Gemma3TextConfig",
            **GQA,
            head_dim=12,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention"],
        ),
        ROTARY._replace(kv_heads=2, qk_norm=True),
        "rotary",
    ),
    "olmo2": Toy(
        _of("Olmo2Model", "Olmo2Config", **GQA), Expect(2, kv_heads=2, rotary=True, qk_norm=True), "rotary"
    ),
    "cohere": Toy(
        _of("CohereModel", "CohereConfig", **GQA, use_qk_norm=True),
        ROTARY._replace(kv_heads=2, qk_norm=True),
        "rotary",
    ),
    "glm": Toy(
        _of("GlmModel", "GlmConfig", **GQA, head_dim=8, attention_bias=True),
        ROTARY._replace(kv_heads=2),
        "rotary",
    ),
    "stablelm": Toy(
        _of("StableLmModel", "StableLmConfig", **GQA, qk_layernorm=True, use_qkv_bias=True),
        ROTARY._replace(kv_heads=2, qk_norm=True),
        "rotary",
    ),
    "modernbert": Toy(
        _of(
            "ModernBertModel",
            "ModernBertConfig",
            **LLAMA,
            cls_token_id=1,
            sep_token_id=2,
            attention_bias=True,
        ),
        ROTARY._replace(folded=1),
        "rotary",
    ),
    "vit": Toy(_of("ViTModel", "ViTConfig", **VIT), Expect(2, folded=2), "image"),
    "t5": Toy(_of("T5Model", "T5Config", **T5), Expect(6, cross=2, folded=4), "seq2seq"),
    "whisper": Toy(_of("WhisperModel", "WhisperConfig", **WHISPER), Expect(6, cross=2, folded=4), "speech"),
    "bart": Toy(_of("BartModel", "BartConfig", **BART), Expect(3, cross=1), "seq2seq"),
    "opt": Toy(
        _of("OPTModel", "OPTConfig", **{**BERT, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
        Expect(2, folded=2),
    ),
    "gpt-bigcode": Toy(
        _of("GPTBigCodeModel", "GPTBigCodeConfig", **GPT2, multi_query=True), Expect(2, kv_heads=1, folded=2)
    ),
    "gpt-bigcode-per-head": Toy(
        _of("GPTBigCodeModel", "GPTBigCodeConfig", **GPT2, multi_query=False), Expect(2, folded=2)
    ),
}

MLA = {
    **LLAMA,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}
MOE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
LATENT = ROTARY._replace(qk_norm=True, apart=4)
NEXT = {
    **GQA,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "mlp_only_layers": [0, 1],
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
ZOO |= {
    "deepseek-v2": Toy(
        _of("DeepseekV2Model", "DeepseekV2Config", **MLA, **MOE, attention_bias=True), LATENT, "rotary"
    ),
    "deepseek-v2-lite": Toy(
        _of("DeepseekV2Model", "DeepseekV2Config", **{**MLA, "q_lora_rank": None}, **MOE), LATENT, "rotary"
    ),
    "deepseek-v3": Toy(
        _of("DeepseekV3Model", "DeepseekV3Config", **MLA, **MOE), LATENT._replace(reordered=True), "rotary"
    ),
    "deepseek-v3-half": Toy(
        _of("DeepseekV3Model", "DeepseekV3Config", **MLA, **MOE, rope_interleave=False), LATENT, "rotary"
    ),
    "minicpm3": Toy(_of("MiniCPM3Model", "MiniCPM3Config", **MLA), LATENT, "rotary"),
    "longcat-flash": Toy(
        _of(
            "LongcatFlashModel",
            "LongcatFlashConfig",
            **{
                key: value
                for key, value in MLA.items()
                if key not in ("num_hidden_layers", "intermediate_size")
            },
            head_dim=4,
            num_layers=1,
            ffn_hidden_size=32,
            expert_ffn_hidden_size=16,
            n_routed_experts=2,
            zero_expert_num=1,
            moe_topk=2,
        ),
        LATENT._replace(reordered=True, folded=0),
        "rotary",
    ),
    "qwen3-next": Toy(
        _of("Qwen3NextModel", "Qwen3NextConfig", **NEXT),
        ROTARY._replace(layers=1, kv_heads=2, qk_norm=True, folded=1),
        "rotary",
    ),
    "hunyuan": Toy(
        _of("HunYuanDenseV1Model", "HunYuanDenseV1Config", **GQA, head_dim=8),
        Expect(2, kv_heads=2, qk_norm=True, folded=2),
        "rotary",
    ),
    "esm": Toy(
        _of(
            "EsmModel",
            "EsmConfig",
            **{**BERT, "position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 2},
        ),
        Expect(2, rotary=True, folded=2),
        "counted",
    ),
    "gemma3n": Toy(
        _of(
            "Gemma3nTextModel",
            "Gemma3nTextConfig",
            **{**GQA, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
            head_dim=8,
            layer_types=SLIDING_AND_FULL * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=50,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        ROTARY._replace(layers=4, kv_heads=2, qk_norm=True, folded=0, borrowed=2),
        "rotary",
    ),
    "gemma4": Toy(
        _of(
            "Gemma4TextModel",
            "Gemma4TextConfig",
            **{**GQA, "num_hidden_layers": 4},
            head_dim=8,
            global_head_dim=8,
            layer_types=SLIDING_AND_FULL * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=50,
        ),
        ROTARY._replace(layers=4, kv_heads=2, qk_norm=True, folded=2, borrowed=2),
        "rotary",
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A toy model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return randomize(ZOO[name].build()).to(dtype).eval()


def feed(name: str, dtype: torch.dtype = torch.float64, *, positions: bool = False) -> dict[str, Tensor]:
    """Inputs; every token at position 0, where a rotary model does not rotate, unless ``positions``."""
    kind = ZOO[name].feed
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 50, (2, TOKENS), generator=generator)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}
    if kind == "speech":
        features = torch.randn(2, 8, 20, generator=generator).to(dtype)
        return {"input_features": features, "decoder_input_ids": tokens}
    if kind == "seq2seq":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
    if kind == "cross":
        states = torch.randn(2, 5, WIDTH, generator=generator).to(dtype)
        return {"input_ids": tokens, "encoder_hidden_states": states}
    if kind == "counted":
        # Some releases count tokens and take no positions: a sequence's first stands at position 0.
        return {"input_ids": tokens if positions else tokens[:, :1]}
    if kind == "rotary":
        places = torch.arange(TOKENS).expand_as(tokens) if positions else torch.zeros_like(tokens)
        return {"input_ids": tokens, "position_ids": places}
    return {"input_ids": tokens}
