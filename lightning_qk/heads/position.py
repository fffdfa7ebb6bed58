"""What positions do to the logits of an attention layer, told from the layer and the modules around it.

Facts are asked for, and no names of models: whether the layer calls a rotary function
(:mod:`lightning_qk.heads.rotary`), which tables and projections of relative positions it has, which arguments its
forward takes, and which tables the modules around it share among their layers. What these do not tell is None.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lightning_qk.heads.rotary import Rotation

ALIBI, RELATIVE_BIAS, RELATIVE_PRODUCT, NONE = "alibi", "relative bias", "relative product", "none"

ADDED_TO_LOGITS = frozenset({ALIBI, RELATIVE_BIAS, RELATIVE_PRODUCT})
"""Positions that stand beside ``q · k`` in the logits: of those, query and key weights are the content part."""

# What layers have whose logits contain products with embeddings of relative positions: Transformer-XL's u and v
# or their projections, Shaw's table, decomposed ones of images, DeBERTa's kinds of attention.
_PRODUCT = re.compile(
    r"pos_bias_[uv]|bias_[uv]|r_[rws]_bias|relative_k_proj|rel_pos_(h|w|emb)|emb_rel_k|distance_embedding"
    r"|rel_logits_proj|relative_pos_embeddings|relative_position_embedding|pos_att_type"
)
# What layers have that add a number for each relative position.
_BIAS = re.compile(
    r"(global_)?relative_attention_bias|relative_position_bias(_table)?|attention_biases"
    r"|continuous_position_bias_mlp|rel_attn_embed|gru_rel_pos_\w+|rpb|has_(relative_attention|spatial_attention)_bias"
)
# Switches that turn the former off where they are False.
_SWITCHES = {"relative_attention", "use_rel_pos", "use_relative_position_embeddings"}
# By what children the modules around a layer make one bias for all their layers.
_SHARED_BIAS = re.compile(r"(\w+_)?(relative_attention|position)_bias\w*")
# Arguments that bring something for the logits, a mask apart.
_BRINGS_BIAS = re.compile(r"alibi|bias|^rel(ative)?_|^pair|_dists$|^pos_emb$", re.IGNORECASE)


def find_position(
    module: nn.Module,
    ancestors: Sequence[nn.Module],
    config: Any,
    rotation: Rotation,
    *,
    is_cross: bool = False,
) -> str | None:
    """What positions do to the logits of a layer; see :class:`~lightning_qk.heads.projections.HeadProjections`.

    Args:
        module: the attention layer.
        ancestors: the modules that contain it, nearest first.
        config: the nearest configuration, or None.
        rotation: what :func:`~lightning_qk.heads.rotary.find_rotation` found.
        is_cross: keys come from other tokens than queries.
    """
    brought = {name for name in _arguments(module) if _BRINGS_BIAS.search(name)}
    if not is_cross and _adds_alibi(module, config, brought):
        return ALIBI
    if rotation.kind is not None:
        return rotation.kind
    own = {name for name, value in _attributes(module) if _is_set(value)}
    is_off = any(getattr(module, name, None) is False for name in _SWITCHES)
    if not is_off and any(_PRODUCT.fullmatch(name) for name in own):
        return RELATIVE_PRODUCT
    if any(_BIAS.fullmatch(name) for name in own):
        return RELATIVE_BIAS
    if is_cross:
        # Relative positions are those of one sequence.
        return NONE if rotation.is_known else None
    if _is_shared(module, ancestors):
        return RELATIVE_BIAS
    if not rotation.is_known or (brought and not _is_declined(module)):
        return None
    return NONE


def _arguments(module: nn.Module) -> Iterator[str]:
    yield from list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._modules.items()
    yield from module._parameters.items()
    yield from vars(module).items()


def _is_set(value: Any) -> bool:
    if isinstance(value, list | tuple | dict | str | bool | nn.ModuleDict | nn.ModuleList):
        return bool(value)
    return value is not None


def _adds_alibi(module: nn.Module, config: Any, brought: set[str]) -> bool:
    """Whether its forward takes ALiBi, by that name or as a bias that its file builds, and the model gives it."""
    forward = inspect.unwrap(type(module).forward)
    is_built = any("alibi" in name for name in getattr(forward, "__globals__", ()))
    return ("alibi" in brought or (is_built and bool(brought))) and getattr(
        config, "alibi", True
    ) is not False


def _is_shared(module: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
    """Whether a module around the layer has a table for all its layers, or its first layer has."""
    for owner in ancestors:
        if any(_SHARED_BIAS.fullmatch(name) and _is_set(child) for name, child in owner._modules.items()):
            return True
    if not hasattr(module, "has_relative_attention_bias"):
        return False
    for owner in ancestors:
        layers = [other for other in owner.modules() if type(other) is type(module) and other is not module]
        if any(_is_set(getattr(other, "relative_attention_bias", None)) for other in layers):
            return True
    return False


def _is_declined(module: nn.Module) -> bool:
    """Whether the layer says itself that positions add nothing to its logits, whatever its forward may take."""
    space = vars(module)
    flags = [
        value for name, value in space.items() if name in _SWITCHES or re.fullmatch(r"has_\w*bias", name)
    ]
    kinds = [value for name, value in space.items() if re.fullmatch(r"position_embeddings?_type", name)]
    return (bool(flags) and not any(flags)) or (bool(kinds) and not any(kinds))
