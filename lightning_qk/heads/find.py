"""Find the attention layers of a model and what surrounds each of them."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_qk.architecture.origin import is_known
from lightning_qk.architecture.source_code import calls_sdpa, names_softmax, uses_interface
from lightning_qk.heads.layouts import find_layout
from lightning_qk.heads.search import reaches_product

_ATTENTION = re.compile(r"att(ention|n)|mhs?a|multi_?head", re.IGNORECASE)
# What surrounds attention carries its name too: outputs, biases, projections.
_NAMED_ATTENTION = re.compile(r"(attention|attn)(block|layer|subsample|poolinghead|module)?$", re.IGNORECASE)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
_CROSS = re.compile(r"cross|enc_?dec|encoder_(attn|attention|decoder)", re.IGNORECASE)


class Site(NamedTuple):
    """One attention layer where it stands.

    Attributes:
        name: qualified name in the model.
        module: the layer.
        ancestors: the modules that contain it, nearest first.
        config: the nearest configuration, or None.
        is_cross: its names or flags say that keys come from other tokens than queries.
    """

    name: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...]
    config: Any
    is_cross: bool


def attention_sites(model: nn.Module) -> Iterator[Site]:
    """Yield every attention layer in module order, shared ones once.

    A layer is a module that fits a layout and has an attention-like class name or calls transformers' attention
    functions, or one that calls torch's scaled_dot_product_attention itself and is no part of such a layer. Any
    other counts if it contains no attention, and its class is named attention and has weights of its own, in lists
    too, or names a softmax and, run alone, takes it of a product that its projections make both sides of.
    """
    modules = dict(model.named_modules())
    fitting = {name for name, module in modules.items() if _fits(module)}
    calling = {
        name for name, module in modules.items() if calls_sdpa(module) and fitting.isdisjoint(_parents(name))
    }
    named = {name for name, module in modules.items() if _is_named_attention(module)}
    holders = {parent for name in fitting | calling | named for parent in _parents(name)}
    found = fitting | calling | {name for name in named if name not in holders}
    # The innermost first: what contains a layer is none.
    for name, module in reversed(modules.items()):
        is_free = name not in holders and found.isdisjoint((name, *_parents(name)))
        if is_free and _takes_softmax(module) and reaches_product(module):
            found.add(name)
            holders.update(_parents(name))
    for name, module in modules.items():
        if name in found:
            ancestors = tuple(modules[parent] for parent in _parents(name))
            yield Site(
                name, module, ancestors, _config(module, ancestors), _is_cross(name, module, ancestors)
            )


def _parents(name: str) -> list[str]:
    """Qualified names of the modules that contain one, nearest first, the model itself ("") last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _fits(module: nn.Module) -> bool:
    if find_layout(module) is None:
        return False
    return _ATTENTION.search(type(module).__name__) is not None or uses_interface(module)


def _is_named_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    if _NAMED_ATTENTION.search(type(module).__name__) is None:
        return False
    return _has_weights(module)


def _has_weights(module: nn.Module) -> bool:
    """Whether a module, a child, or a child of a list has a matrix."""
    held = list(module.children())
    own = [module, *held]
    own += [part for child in held if isinstance(child, _LISTS) for part in child.children()]
    return any(parameter.dim() >= 2 for owner in own for parameter in owner.parameters(recurse=False))


def _takes_softmax(module: nn.Module) -> bool:
    """Whether a class of a model's own, or children without weights, name a softmax in what they call."""
    if is_known(module) or isinstance(module, _LISTS) or not _has_weights(module):
        return False
    # What trains is no layer.
    if type(module).forward is nn.Module.forward or hasattr(module, "training_step"):
        return False
    free = [child for child in module.modules() if not any(True for _ in child.parameters())]
    return any(names_softmax(own) for own in (module, *free))


def _config(module: nn.Module, ancestors: tuple[nn.Module, ...]) -> Any:
    for owner in (module, *ancestors):
        config = getattr(owner, "config", None)
        if config is not None and not isinstance(config, nn.Module | Tensor):
            return config
    return None


def _is_cross(name: str, module: nn.Module, ancestors: tuple[nn.Module, ...]) -> bool:
    for flag in ("is_cross_attention", "is_cross_attn"):
        value = getattr(module, flag, None)
        if isinstance(value, bool):
            return value
    # Only what lies below the layer's index counts: a whole model may be called a cross-encoder.
    parts = name.split(".")
    indices = [place for place, part in enumerate(parts) if part.isdigit()]
    near = parts[indices[-1] + 1 :] if indices else parts[-2:]
    owners = (module, *ancestors[: max(len(near) - 1, 0)])
    return any(_CROSS.search(text) for text in (*near, *(type(owner).__name__ for owner in owners)))
