"""Whether the largest product of queries and keys of a layer can be told, found out before it runs."""

import sys
from typing import Any

import torch
from torch import nn

from lightning_qk.architecture.source_code import calls_sdpa, uses_interface
from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.captured import PRODUCTS
from lightning_qk.capture.registry import without_interceptors
from lightning_qk.capture.verify import verified_convention
from lightning_qk.heads.layer import LayerReader

_TRIED = "could not be tried"
# transformers' own, which are read as their sources say or tried at the first call.
_LIBRARY = "transformers."


def untellable(plan: LayerReader, config: Any = None) -> str | None:
    """Why ``q · k`` of a layer's calls will not be told, as a clause about the layer.

    Only what is certain: a layer that takes its softmax itself with positions added to the logits, and one whose
    attention function, registered by the user, is no softmax attention of random tensors. Whatever else goes
    wrong shows at the first call.

    Args:
        plan: of the layer.
        config: the layer's configuration, which names its attention function; None: the layer's own.

    Returns:
        None where nothing speaks against it.
    """
    module = plan.module
    if uses_interface(module):
        return _of_function(plan, module, getattr(module, "config", None) if config is None else config)
    if calls_sdpa(module) or isinstance(module, nn.MultiheadAttention) or plan.position in PRODUCTS:
        return None
    return (
        f"it takes its softmax itself, of logits from which q · k cannot be told ({plan.position}); with "
        'attn_implementation="sdpa" it may be, where the model has it'
    )


def _of_function(plan: LayerReader, module: nn.Module, config: Any) -> str | None:
    name = getattr(config, "_attn_implementation", None)
    registry = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    if not isinstance(name, str) or registry is None or name not in registry.valid_keys():
        return None
    function = without_interceptors(registry[name])
    if getattr(function, "__module__", _LIBRARY).startswith(_LIBRARY):
        return None
    like = next((own for own in module.parameters() if own.is_floating_point()), torch.empty(0))
    sizes = plan.sizes
    query, key = (
        torch.zeros(2, heads, 8, sizes.d_head, dtype=like.dtype, device=like.device)
        for heads in (sizes.heads, sizes.kv_heads)
    )
    options = {"scaling": plan.scaling, "dropout": 0.0}
    call = AttentionCall(module, query, key, torch.zeros_like(key), None, name, options, function)
    try:
        verified_convention(call)
    except UnsupportedCallError as error:
        return None if _TRIED in str(error) else str(error)
    except Exception:
        return None  # a trial that fails tells nothing
    return None
