"""Shrink any transformers configuration to toy size, and build the model it describes.

One divisor for all widths keeps what must stay equal equal, multiples multiples and sums sums, also between the
configurations of a model's parts; the numbers of heads stay, so that every layout stays what it is.
"""

import contextlib
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from tools.coverage.catalogue import CONFIG_OVERRIDES


class Recipe(NamedTuple):
    """How far to shrink.

    Attributes:
        divisor: what widths are divided by.
        layers: layers of each stack, and one of each kind where the configuration names kinds.
        image: upper bound of an image's side, in pixels.
    """

    divisor: int
    layers: int
    image: int


LADDER = (
    Recipe(8, 2, 64),
    Recipe(4, 2, 64),
    Recipe(16, 2, 64),
    Recipe(8, 2, 128),
    Recipe(8, 8, 64),
    Recipe(2, 2, 64),
    Recipe(4, 2, 256),
    Recipe(1, 2, 64),
    Recipe(1, 2, 1024),
)
"""Tried in turn until one builds and runs."""

VOCABULARY = 160
_MAX_POSITIONS = 2048
_MAX_FRAMES = 64
_WIDE = 5000
_LIST_TYPES = (list, tuple)

_LAYERS = re.compile(
    r"^(num_|n_)?(\w+_)?(layers?|depth|blocks)$|^depths$|^(num_)?(\w+_)?num_layers$|^n_layer$|^layers_block_num$"
)
_NO_LAYERS = re.compile(
    r"shared|dense_layers|feature|feat|lstm|postnet|predict|nextn|adapter|conv|residual|window|predictor|prenet|"
    r"res_blocks|divisor|index|freeze|start|end|insert|upscale|fov|random|topk|block_size|per_layer|stage|heads|"
    r"timestamp|iou|head_depth|max_depth|min_depth|local|global|select|hidden_size|intermediate|which|mtp"
)
_VOCABULARY = re.compile(
    r"vocab_size$|vocab$|ngram_vocab_size_base|^num_embeddings$|^vocabulary_size$|vocab_size_per_layer_input|^n_codes_total_$"
)
_TOKEN = re.compile(r"(token_id|token_index|_token_ids|eos_token|lang_id|_token)$|^(video|image|audio)_token")
_POSITIONS = re.compile(
    r"max_position_embeddings$|^n_positions$|^n_ctx$|^max_seq_len$|^max_(source|target)_positions$"
)
_IMAGE = re.compile(
    r"^(pretrain_|max_|min_)?(image|img|input|crop|spec)_(size|height|width)$|^image_(height|width)$"
)
_WIDTH = re.compile(
    r"hidden|dim|width|channels|rank|inner|ffn|ff$|mlp|embed|emb$|proj|n_embd|d_model|d_kv|d_ff|d_head|dff|"
    r"head_size|feats$|_size$|scalar|units|planes|mid_channels|filters|rotary|size_global|kv_channels|d_rel"
)
_NO_WIDTH = re.compile(
    r"^num_(?!pos_feats|filters)|^n_(?!embd|inner)|^max_|^min_|layers?$|ratio|patch_size|kernel|stride|window|vocab|"
    r"position|token|mel|rate|chunk|codebook_size|chunk_size|image|img|merge|pool|group|tubelet|act$|factor|freq|"
    r"interval|context|prob|count|input_size|block_size|^in_channels|num_channels|audio_channels|input_channels|"
    r"act_dim|state_dim|convolution|cache|expert_capacity|^num|buckets|type_vocab|feedforward_mult|^expand|"
    r"batch_size|sample_size|seed|crop|embeddings$|index_topk|roi_size|_heads$|subsampl\w*_(kernel|stride)|"
    r"query_dim|out_channels_|nfft|fft_length|frame|sequence|segment|depth_size|vector_size|upsample_rate|grid|pos_emb_width"
)
_EXPERTS = re.compile(r"^(moe_)?(num_|n_)(\w+_)?experts$|^num_experts$|^moe_num_experts$")
_NO_EXPERTS = re.compile(r"shared|per_tok|zero|expert_group")
_TOP_K = re.compile(
    r"experts_per_tok|experts_per_token|^moe_top_?k$|^moe_k$|^top_k_experts$|router_top_k|^top_k$"
)


def shrunk(config: Any, recipe: Recipe, model_type: str) -> Any:
    """Make a configuration small, in place, with its parts.

    Returns:
        The configuration.
    """
    taken: dict[int, int] = {}
    if recipe.divisor == 8 and _widest(config) > _WIDE:
        recipe = recipe._replace(divisor=16)
    _shrink(config, recipe, taken)
    _override(config, recipe, model_type)
    return config


def _override(config: Any, recipe: Recipe, model_type: str) -> None:
    """Apply a type's overrides, after those of its parts' types."""
    for value in list(vars(config).values()):
        if _is_config(value):
            _override(value, recipe, value.model_type)
    for path, value in CONFIG_OVERRIDES.get(model_type, {}).items():
        owner, *parts = config, *path.split(".")
        for part in parts[:-1]:
            owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
        _set(owner, parts[-1], value(recipe) if callable(value) else value)


def _widest(config: Any) -> int:
    own = [vars(config).get(name, 0) for name in ("hidden_size", "d_model", "n_embd")]
    parts = [_widest(value) for value in vars(config).values() if _is_config(value)]
    return max([0, *parts, *(value for value in own if isinstance(value, int))])


def _shrink(config: Any, recipe: Recipe, taken: dict[int, int]) -> None:
    by_layer = _take_layer_overrides(config)
    patch = _patch(config)
    fields = dict(vars(config))
    for key, value in fields.items():
        if _is_config(value):
            if value.model_type in _FOREIGN_BACKBONES:
                _set(config, key, _small_backbone(value))
                _set(config, "use_timm_backbone", False)
            else:
                _shrink(value, recipe, taken)
        elif value is None and _TOP_K.search(key):
            _set(config, key, 2)
        elif value is None and key in _DERIVED:
            # Most configurations work these out themselves; those that do not cannot be built as they are.
            _set(config, key, _DERIVED[key](fields))
        elif isinstance(value, dict) and key.startswith("rope"):
            _shrink_rope(value, recipe, _head_width(config))
    fields = dict(vars(config))
    picked = _shrink_layers(config, fields, recipe, by_layer)
    for key, value in fields.items():
        if isinstance(value, bool) or key in ("problem_type",):
            continue
        if isinstance(value, int) or (
            isinstance(value, _LIST_TYPES) and value and all(type(v) is int for v in value)
        ):
            new = _shrink_field(key, value, recipe, taken, patch)
            if new != value:
                _set(config, key, new)
    _widen_heads(config)
    _add_sections(config)
    if by_layer:
        places = {index: place for place, index in enumerate(picked)}
        config.per_layer_config = {
            places[index]: {key: _shrink_field(key, value, recipe, taken) for key, value in own.items()}
            for index, own in by_layer.items()
            if index in places
        }


def _widen_heads(config: Any) -> None:
    """Fewer heads where a rotation in two dimensions would not fit their width: it takes multiples of four."""
    own = vars(config)
    if "rope_parameters" not in own or "vocab_size" in own or own.get("head_dim") is not None:
        return
    width = own.get("embed_dim", own.get("hidden_size"))
    for name in ("num_heads", "num_attention_heads"):
        heads = own.get(name)
        if isinstance(heads, int) and isinstance(width, int) and heads > 0 and width % (4 * heads):
            _set(config, name, next((n for n in range(heads, 0, -1) if width % (4 * n) == 0), heads))


def _add_sections(config: Any) -> None:
    """How a rotation of several positions shares a head, where only the model's code says so, for full heads."""
    rope = vars(config).get("rope_parameters")
    if "mrope_section" not in getattr(type(config), "ignore_keys_at_rope_validation", ()) or not isinstance(
        rope, dict
    ):
        return
    head = _head_width(config)
    if head is not None and rope.get("rope_type") and "mrope_section" not in rope:
        pairs = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]


def _take_layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Fields that some layers have otherwise than the rest, by layer; the configuration is without them then."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    found = config.to_dict().get("per_layer_config") or {}
    config.per_layer_config = None
    return {int(index): own for index, own in found.items()}


def _per_head(fields: dict[str, Any]) -> int | None:
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


_DERIVED = {"head_dim": _per_head, "num_key_value_heads": lambda fields: fields.get("num_attention_heads")}


# Backbones of other libraries.
_FOREIGN_BACKBONES = ("timm_backbone",)


def _small_backbone(config: Any) -> Any:
    """A convolutional backbone of transformers with the same outputs as one of another library."""
    from transformers import ResNetConfig

    asked = getattr(config, "out_indices", None) or [4]
    stages = [max(index if index >= 0 else 5 + index, 1) for index in asked]
    kind: Any = ResNetConfig
    return kind(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{stage}" for stage in dict.fromkeys(min(stage, 4) for stage in stages)],
    )


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_dict")


def _set(config: Any, key: str, value: Any) -> None:
    """Set one field without the checks that hold only for the whole."""
    if isinstance(config, dict):
        config[key] = value
        return
    try:
        setattr(config, key, value)
    except Exception:
        vars(config)[key] = value


def _shrink_field(key: str, value: Any, recipe: Recipe, taken: dict[int, int], patch: int = 16) -> Any:
    if type(value) is not int and not isinstance(value, _LIST_TYPES):
        return value
    if isinstance(value, _LIST_TYPES):
        if _TOKEN.search(key):
            return type(value)(_token(one, taken) for one in value)
        if _LAYERS.search(key) and not _NO_LAYERS.search(key):
            return type(value)(min(one, recipe.layers) for one in value)
        if _IMAGE.search(key):
            return type(value)(_image(one, recipe, patch) for one in value)
        if _WIDTH.search(key) and not _NO_WIDTH.search(key):
            return type(value)(_width(one, recipe) for one in value)
        return value
    if _VOCABULARY.search(key):
        return min(value, VOCABULARY)
    if _TOKEN.search(key):
        return _token(value, taken)
    if key == "max_source_positions":
        return min(value, _MAX_FRAMES)
    if _POSITIONS.search(key):
        return min(value, _MAX_POSITIONS)
    if _IMAGE.search(key):
        return _image(value, recipe, patch)
    if _EXPERTS.search(key) and not _NO_EXPERTS.search(key):
        return min(value, 8)
    if _TOP_K.search(key):
        return min(value, 2)
    if key in ("mamba_chunk_size", "chunk_size"):
        return min(value, 16)
    if key in ("n_group", "topk_group", "num_expert_group"):
        return 1
    if _WIDTH.search(key) and not _NO_WIDTH.search(key):
        return _width(value, recipe)
    return value


def _width(value: int, recipe: Recipe) -> int:
    if value < 32 or value % recipe.divisor or value // recipe.divisor < 2:
        return value
    return value // recipe.divisor


def _image(value: int, recipe: Recipe, patch: int) -> int:
    # Multiples of a patch stay multiples of it.
    while value > recipe.image and value % (2 * patch) == 0:
        value //= 2
    return value if value <= recipe.image else max(recipe.image // patch, 2) * patch


def _patch(config: Any) -> int:
    found = vars(config).get("patch_size")
    found = found[-1] if isinstance(found, _LIST_TYPES) and found else found
    return found if type(found) is int and found > 0 else 16


def _token(value: int, taken: dict[int, int]) -> int:
    """A place in the small vocabulary: the same for the same token, different ones for different tokens."""
    if value < VOCABULARY - 60:
        return value
    if value not in taken:
        taken[value] = VOCABULARY - 1 - len(taken) % 59
    return taken[value]


def _head_width(config: Any) -> int | None:
    own = vars(config)
    for name in ("head_dim", "qk_rope_head_dim"):
        value = own.get(name)
        if isinstance(value, int):
            return value
    return _per_head(own)


def _shrink_rope(parameters: dict[str, Any], recipe: Recipe, head: int | None) -> None:
    for key, value in parameters.items():
        if isinstance(value, dict):
            _shrink_rope(value, recipe, head)
        elif isinstance(value, _LIST_TYPES) and value and "section" in key:
            if all(one % recipe.divisor == 0 for one in value):
                parameters[key] = type(value)(one // recipe.divisor for one in value)
            elif head is not None and sum(value) % recipe.divisor == 0:
                total = sum(value) // recipe.divisor
                parts = [max(one // recipe.divisor, 1) for one in value]
                parts[0] += total - sum(parts)
                parameters[key] = type(value)(parts)
        elif isinstance(value, _LIST_TYPES) and len(value) >= 8 and "factor" in key:
            parameters[key] = type(value)(value[:: recipe.divisor])


def _shrink_layers(
    config: Any, fields: dict[str, Any], recipe: Recipe, by_layer: dict[int, dict[str, Any]]
) -> list[int]:
    """Few layers, and of each kind one; lists with one entry a layer follow. Gives the chosen layers."""
    counts = {
        key: value
        for key, value in fields.items()
        if type(value) is int and value > recipe.layers and _LAYERS.search(key) and not _NO_LAYERS.search(key)
    }
    chosen: dict[int, list[int]] = {}
    for count in sorted(set(counts.values())):
        kinds = [
            value
            for value in fields.values()
            if isinstance(value, _LIST_TYPES)
            and len(value) == count
            and all(isinstance(v, str) for v in value)
        ]
        seen: dict[Any, int] = {}
        for index in range(count):
            own = tuple(sorted((key, str(value)) for key, value in by_layer.get(index, {}).items()))
            seen.setdefault((*(kind[index] for kind in kinds), own), index)
        picked = sorted(seen.values())
        spare = (index for index in range(count) if index not in picked)
        while len(picked) < min(recipe.layers, count):
            picked.append(next(spare))
        chosen[count] = sorted(picked)
    for key, value in fields.items():
        if key in counts:
            _set(config, key, len(chosen[value]))
        elif (
            isinstance(value, _LIST_TYPES)
            and len(value) in chosen
            and len(value) > 4
            and not _WIDTH_LIST.search(key)
        ):
            _set(config, key, type(value)(value[index] for index in chosen[len(value)]))
    total = fields.get("num_hidden_layers")
    return chosen.get(total, []) if isinstance(total, int) else []


_WIDTH_LIST = re.compile(r"conv|hidden_sizes|depths|kernel|stride|strides")


def build(model_class: type, config: Any) -> nn.Module:
    """A model in evaluation mode with random weights, in float32; the global generator is unchanged.

    Biases are not zero and gains not one, as freshly built models have them: that would hide errors.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (
            model_class(config)
            if not hasattr(model_class, "from_config")
            else model_class.from_config(config)
        )
    model = model.float().eval()
    if hasattr(model, "set_experts_implementation"):
        # Grouped products want widths that toys do not have.
        with contextlib.suppress(Exception):
            model.set_experts_implementation("eager")
    redraw(model)
    return model


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter so that hidden states and logits stay moderate."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.numel() or not parameter.is_floating_point() or parameter.device.type == "meta":
            continue
        if not parameter.requires_grad:  # a table of sines, which a rotation relies on
            continue
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            fan = max(parameter.numel() // max(parameter.shape[0], 1), 1)
            scale = min(0.6 / min(fan, parameter.shape[0]) ** 0.5, 0.4)
            parameter.copy_(values * scale)
        else:
            # A gain stays around one, a bias around zero.
            parameter.copy_(parameter.clamp(-1, 1) + 0.1 * values)
