"""Which attention layers of a model an intervention acts on, and the calls that it changes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_qk.architecture.labels import matches, no_match
from lightning_qk.architecture.source_code import calls_sdpa, uses_interface
from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.captured import PRODUCTS
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.capture.registry import without_interceptors
from lightning_qk.capture.verify import verified_convention
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.reader import ProjectionReader

if TYPE_CHECKING:
    from typing_extensions import Self

_TRIED = "could not be tried"
# transformers' own functions are known from their sources, or tried at the first call.
_LIBRARY = "transformers."


class Steered:
    """A context manager within which attention calls are intercepted."""

    steering: AttentionInterceptor

    def __enter__(self) -> Self:
        self.steering.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.steering.remove()


def matching_layers(reader: ProjectionReader, modules: str | Sequence[str] | None) -> list[str]:
    """Names of the layers that patterns match, in the model's order.

    Args:
        reader: of the model.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.

    Raises:
        ValueError: the patterns match none, or none that can be read.
    """
    names = [name for name in reader if matches(name, modules)]
    if not names:
        raise no_match(reader, matching_unread(reader, modules), modules)
    return names


def matching_unread(reader: ProjectionReader, modules: str | Sequence[str] | None) -> dict[str, str]:
    """The layers that patterns match and that cannot be read, each with the reason."""
    return {name: reason for name, reason in reader.unread.items() if matches(name, modules)}


def no_products(plan: LayerReader, config: Any = None) -> str | None:
    """Why ``q · k`` of a layer's calls cannot be measured, as a clause about the layer; None if it may be.

    Found before any call, so that only what is certain is named: a layer that computes its softmax itself with
    positions added to the logits, and an attention function registered by the user that is no softmax attention of
    random tensors. Everything else shows at the first call.

    Args:
        plan: of the layer.
        config: the configuration that names the layer's attention function; None: the layer's own.
    """
    module = plan.module
    if uses_interface(module):
        return _of_function(plan, module, getattr(module, "config", None) if config is None else config)
    if calls_sdpa(module) or isinstance(module, nn.MultiheadAttention) or plan.position in PRODUCTS:
        return None
    return (
        f"it takes its softmax itself, of logits from which q · k cannot be separated ({plan.position}); with "
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
        return None  # a trial that fails says nothing about the function
    return None
