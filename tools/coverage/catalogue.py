"""Model types of the installed transformers, the classes that build them, and overrides of generic rules."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def model_types() -> list[str]:
    """Every type that has a configuration, by name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def config(model_type: str) -> Any:
    """The type's default configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()


def classes(model_type: str) -> Iterator[type]:
    """The classes that build the type: those of the automatic classes, the base model first, then others."""
    import transformers
    from transformers.models.auto import modeling_auto

    mappings = sorted(
        name for name in vars(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
    )
    mappings.sort(key=lambda name: name != "MODEL_MAPPING_NAMES")
    seen = set()
    for mapping in mappings:
        names = getattr(modeling_auto, mapping).get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            found = getattr(transformers, name, None)
            if found is not None and found not in seen:
                seen.add(found)
                yield found
    for found in _by_config(model_type):
        if found not in seen:
            yield found


def _by_config(model_type: str) -> list[type]:
    """Models in the files beside the configuration's that take it; the shortest name is the base."""
    from transformers import PreTrainedModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    package = sys.modules[kind.__module__].__package__ or ""
    folder = os.path.dirname(sys.modules[kind.__module__].__file__ or "")
    names = sorted(entry[:-3] for entry in os.listdir(folder) if entry.startswith("modeling_"))
    modules = []
    for name in names:
        with contextlib.suppress(ImportError):
            modules.append(importlib.import_module(f"{package}.{name}"))
    found = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and getattr(value, "config_class", None) is kind
        and not value.__name__.endswith("PreTrainedModel")
    ]
    return sorted(
        found, key=lambda value: (not value.__name__.endswith(("Model", "Encoder")), len(value.__name__))
    )


_IMAGE_WORDS = {"<image>": 20, **{f"IMGIMG{'ABCDEFGHIJ'[n]}Z": 30 + n for n in range(10)}}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _sections(recipe: Any, *sections: int) -> list[int]:
    _, *rest = (part // recipe.divisor for part in sections)
    return [sum(sections) // recipe.divisor - sum(rest), *rest]


def _scales(finest: int) -> list[list[int]]:
    return [[finest // scale] * 2 for scale in (1, 2, 4)]


_SAM: dict[str, Any] = {
    "prompt_encoder_config.image_embedding_size": lambda recipe: recipe.image // 16,
    "vision_config.num_pos_feats": lambda recipe: 128 // recipe.divisor,
    "vision_config.global_attn_indexes": [1],
}


CONFIG_OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64},
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "emu3": {"vocabulary_map": _IMAGE_WORDS},
    "emu3_text_model": {"vocabulary_map": _IMAGE_WORDS},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": _ROPE | {"mrope_section": [2, 1, 1]}}
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE | {"mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    # Applied also where it is a part: a type's overrides follow those of its parts.
    "ernie4_5_vl_moe_text": {"rope_parameters.mrope_section": lambda recipe: _sections(recipe, 24, 24, 16)},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "bamba": {"attn_layer_indices": [1]},
    "cvt": {"depth": [1, 2, 3]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kosmos-2.5": {"latent_query_num": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "moonshine_streaming": {"num_key_value_heads": 8, "encoder_config.num_key_value_heads": 8},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dots3_note_audio_encoder": {
        "feature_size": 128,
        "samples_per_token": 1280,
        "adapter_input_size": lambda recipe: 1280 // recipe.divisor,
    },
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    # Keypoints that are pruned leave padding behind whose cosines and sines are zero.
    "lightglue": {"width_confidence": -1, "depth_confidence": -1},
    "llama4_vision_model": {"intermediate_size": lambda recipe: 3072 // recipe.divisor},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_6_vision": {"insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "moshi_depth": {"input_size": 128},
    "omdet-turbo": {
        "timm_kwargs": {},
        "encoder_in_channels": [16, 32, 48],
        "num_queries": 20,
        "apply_layernorm_after_vision_backbone": False,
    },
    "perceiver": {"d_latents": 160, "num_latents": 16, "num_self_attends_per_block": 2},
    "phi4_multimodal_audio": {
        "input_size": 80,
        "ext_pw_out_channel": lambda recipe: 1024 // recipe.divisor,
        "depthwise_separable_out_channel": lambda recipe: 1024 // recipe.divisor,
    },
    "pvt": {"num_encoder_blocks": 4},
    "qwen2_5_omni_audio_encoder": {"n_window": 16},
    "qwen2_5_omni_token2wav": {"bigvgan_config.upsample_initial_channel": 192},
    "sam": _SAM,
    "sam_hq": _SAM,
    "sam2": {
        "vision_config.backbone_channel_list": lambda recipe: [
            n // recipe.divisor for n in (768, 384, 192, 96)
        ],
        "vision_config.backbone_feature_sizes": lambda recipe: _scales(recipe.image // 4),
    },
    "sam3_tracker": {"vision_config.backbone_feature_sizes": lambda recipe: _scales(recipe.image // 14 * 4)},
    "seggpt": {"image_size": [128, 64]},
    "step3p5": {"sliding_window": 8},
    "swin2sr": {"depths": [2, 2], "num_heads": [6, 6], "num_layers": 2, "image_size": 32},
    "timesfm2_5": {"context_length": 512},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "xmod": {"default_language": "en_XX"},
}
"""Model type → path of a field in the configuration → its value, or a function of the recipe."""

INPUTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "blt_local_decoder": {"inputs_embeds": ("float", 2, 12, 128), "patch_embeds": ("float", 2, 6, 256)},
    "blt_local_encoder": {
        "input_ids": ("int", 90, 2, 12),
        "patch_ids": ("int", 5, 2, 12),
        "num_patches": ("number", 5),
    },
    "dots3_note_audio_encoder": {
        "input_features": ("float", 2, 128, 128),
        "chunk_sample_lengths": ("value", 20480, 15360),
    },
    "efficientloftr": {"pixel_values": ("float", 1, 2, 3, 64, 64)},
    "lightglue": {"pixel_values": ("float", 1, 2, 3, 64, 64)},
    "lxmert": {
        "input_ids": ("int", 90, 2, 12),
        "visual_feats": ("float", 2, 5, 256),
        "visual_pos": ("float", 2, 5, 4),
    },
    "molmo2_adapter": {"image_features": ("float", 2, 12, 288), "pooled_patches_idx": ("int", 24, 6, 4)},
    "moshi_depth": {"input_ids": ("int", 90, 2, 8), "last_hidden_state": ("float", 2, 1, 128)},
    "muse_glimmer_assistant": {
        "noise_embeds": ("float", 2, 16, 416),
        "context_hidden_states": ("float", 2, 5, 832),
    },
    "omdet-turbo": {
        "pixel_values": ("float", 2, 3, 64, 64),
        "classes_input_ids": ("int", 90, 6, 7),
        "classes_attention_mask": ("ones", 6, 7),
        "tasks_input_ids": ("int", 90, 2, 7),
        "tasks_attention_mask": ("ones", 2, 7),
        "classes_structure": ("value", 3, 3),
    },
    "qwen2_5_omni_dit": {
        "hidden_states": ("float", 2, 12, 80),
        "condition_vector": ("float", 2, 12, 80),
        "speaker_embedding": ("float", 2, 12, 24),
        "quantized_code": ("int", 90, 2, 6),
        "time_step": ("value", 0.25, 0.75),
    },
    "qwen2_5_omni_token2wav": {
        "code": ("int", 90, 1, 6),
        "conditioning": ("float", 1, 24),
        "reference_mel": ("float", 1, 12, 80),
        "num_steps": ("number", 2),
    },
    "voxtral_realtime_text": {"input_ids": ("int", 90, 2, 12), "t_cond": ("float", 512)},
}
"""Model type → argument of the forward → what to pass: ("float", *shape), ("int", high, *shape), ("ones", *shape),
("zeros", *shape), ("bool", *shape), a tensor of these numbers ("value", *numbers), or one
number ("number", number)."""
