"""Settings that are trained, methods that are compared, and all that a run's numbers depend on."""

from typing import Any

METHODS = (
    "baseline",
    "variance",
    "tokens",
    "share",
    "plain_share",
    "limit",
    "target",
    "raised",
    "weight_decay",
    "sigma_reparam",
    "entropy",
    "entropy_band",
    "qk_clip",
    "qk_norm",
)
"""Seven of them are LocAteR; all but the first, σReparam and QK-norm take a coefficient (QK-clip's is its cap).

``variance`` and ``target`` are its two forms as they come: the latter holds each head's mean where it starts.
Where training starts from random weights that is about zero, and with ν = 1 the mean's share of the penalty is
small. ``raised`` is the target form of a single-head model with ν = n and the mean for which ``xi = s tr W_QK``
is 1, the middle of the regime that theory calls localized. ``tokens`` is the variance form of the token-aware
spectrum, and ``share`` the same with a share of the gradient's norm in place of a coefficient; ``plain_share`` is
the share of the plain form. ``limit`` is the limit form as it comes.
"""
_FREE = ("baseline", "sigma_reparam", "qk_norm")

_WORDS = {"kind": "words", "vocab_size": 4000, "block_size": 128, "batch_size": 8}
_CLASSIC = {"lr": 1e-3, "schedule": "constant"}
_GPT = {"layers": 4, "heads": 4, "width": 128}

SETTINGS: dict[str, dict[str, Any]] = {
    # One layer, one head, the norm after each block, all widths 128, as configs/paper_wikitext2.yaml; but weights
    # start as PyTorch's modules draw them, and the output matrix is one of its own: tokens have unit variance
    # then, as in theory, where OPT's own start has 0.0004 and W_QK grows to thousands before it matters.
    "paper": {
        "initialization": "torch",
        "model": {
            "model_type": "opt",
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 128,
            "max_position_embeddings": 128,
            "do_layer_norm_before": False,
            "tie_word_embeddings": False,
            "dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": _WORDS,
        "optimizer": _CLASSIC,
        "steps": 800,
        "parts": ["choose", "test"],
    },
    "gpt_pre": {
        "model": {
            "model_type": "gpt2",
            "n_layer": _GPT["layers"],
            "n_head": _GPT["heads"],
            "n_embd": _GPT["width"],
            "n_positions": 128,
        },
        "data": _WORDS,
        "optimizer": _CLASSIC | {"warmup_steps": 40},
        "steps": 400,
    },
    "gpt_post": {
        "model": {
            "model_type": "opt",
            "num_hidden_layers": _GPT["layers"],
            "num_attention_heads": _GPT["heads"],
            "hidden_size": _GPT["width"],
            "word_embed_proj_dim": _GPT["width"],
            "ffn_dim": 4 * _GPT["width"],
            "max_position_embeddings": 128,
            "do_layer_norm_before": False,
            "activation_function": "gelu",
            "dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": _WORDS,
        # At 1e-3 tokens of all post-LN runs become alike (cosine 1.0) and none learns more than word frequencies.
        "optimizer": {"lr": 5e-4, "schedule": "linear", "warmup_steps": 100},
        "steps": 400,
    },
    "llama": {
        "model": {
            "model_type": "llama",
            "num_hidden_layers": _GPT["layers"],
            "num_attention_heads": _GPT["heads"],
            "num_key_value_heads": 2,
            "hidden_size": _GPT["width"],
            "intermediate_size": 3 * _GPT["width"],
            "max_position_embeddings": 128,
        },
        "data": _WORDS,
        "optimizer": _CLASSIC | {"warmup_steps": 40},
        "steps": 400,
    },
    "vit": {
        "task": "image_classification",
        "model": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "num_labels": 10,
        },
        "data": {"kind": "digits", "batch_size": 50, "train": 500, "choose": 297},
        "optimizer": _CLASSIC | {"warmup_steps": 40},
        "steps": 400,
    },
    "sst2": {
        "task": "sequence_classification",
        "model": "all-MiniLM-L6-v2",
        "data": {"kind": "sst2", "batch_size": 8, "max_length": 32, "train": 8000, "evaluate": 1200},
        "optimizer": {"lr": 5e-5, "schedule": "linear", "warmup_ratio": 0.1},
        "steps": 120,
    },
    # All weights frozen but those of adapters, on a model whose own softmax has strong sinks.
    "smollm2": {
        "model": "SmolLM2-135M-Instruct",
        "lora": 8,
        "data": {"kind": "words", "block_size": 64, "batch_size": 1},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 5},
        "steps": 60,
    },
}
SETTINGS["fast"] = SETTINGS["llama"] | {"optimizer": {"lr": 1e-2, "schedule": "constant"}}
# The start that failures.py brings entropy collapse about with: query and key weights eight times as large.
SETTINGS["rough"] = SETTINGS["fast"] | {"qk_init": 8.0}
# All of failures.py's mode of entropy collapse: twelve layers besides, and twice the learning rate.
SETTINGS["collapse"] = SETTINGS["rough"] | {
    "model": {
        "model_type": "granite",
        "hidden_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "attention_multiplier": 32**-0.5,
    },
    "optimizer": {"lr": 2e-2, "schedule": "constant"},
}
SETTINGS["smollm2_full"] = {name: own for name, own in SETTINGS["smollm2"].items() if name != "lora"} | {
    "optimizer": {"lr": 2e-5, "schedule": "constant", "warmup_steps": 5}
}


def configuration(
    setting: str, method: str, coefficient: float | str | None, seed: int, **changed: Any
) -> dict[str, Any]:
    """Everything that a run's numbers depend on, as plain JSON.

    Args:
        setting: one of :data:`SETTINGS`.
        method: one of :data:`METHODS`.
        coefficient: of its penalty; None for those that have none.
        seed: of weights, order of batches and dropout.
        changed: other values of the setting's own fields, such as ``steps``; ``evaluate_batches``, where not all
            of what is held out is to be evaluated; and ``watched=False``, where nothing is wanted of the steps.
    """
    if (coefficient is None) != (method in _FREE):
        raise ValueError(f"expected a coefficient for all but {', '.join(_FREE)}, got {coefficient}")
    fields = {"task": "causal_lm", "parts": ["test"], **SETTINGS[setting], **changed}
    return {"setting": setting, "method": method, "coefficient": coefficient, "seed": seed, **fields}
