"""What attention really received: an oracle that knows nothing of weight layouts."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface


class Call(NamedTuple):
    """One attention call. q (batch, heads, n, d_head), k (batch, kv_heads, m, d_head), the layer's inputs."""

    query: Tensor
    key: Tensor
    scaling: float
    query_input: Tensor
    key_input: Tensor


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[dict[str, Call]]:
    """Record the first attention call of every layer, by qualified module name."""
    names = {module: name for name, module in model.named_modules()}
    inputs: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    calls: dict[str, Call] = {}
    files = [vars(sys.modules[type(module).__module__]) for module in model.modules()]
    if not any("ALL_ATTENTION_FUNCTIONS" in file for file in files):
        pytest.skip(f"{type(model).__name__} of this transformers computes attention itself")
    # Models ask for the function, which may be their own, or subscript the mapping.
    originals = {name: getattr(AttentionInterface, name) for name in ("get_interface", "__getitem__")}

    def keep_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        others = [kwargs.get("key_value_states"), kwargs.get("encoder_hidden_states")]
        if isinstance(hidden, Tensor):
            inputs[module] = hidden, next((other for other in others if other is not None), hidden)

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            calls.setdefault(names[module], Call(query, key, scaling, *inputs[module]))
            return function(module, query, key, *args, **kwargs)

        return recorded

    def looked_up(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *asked: recording(original(self, *asked))

    hooks = [module.register_forward_pre_hook(keep_inputs, with_kwargs=True) for module in model.modules()]
    for name, original in originals.items():
        setattr(AttentionInterface, name, looked_up(original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(AttentionInterface, name, original)
        for hook in hooks:
            hook.remove()


def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Call]:
    """Record one forward."""
    with recorded_calls(model) as calls, torch.no_grad():
        model(**inputs)
    return calls


def project(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """W x + b of every head: x (batch, n, d_in) to (batch, heads, n, d_head)."""
    out = torch.einsum("bnd,hed->bhne", x.to(weight), weight)
    return out if bias is None else out + bias[None, :, None]


def parts(vectors: Tensor, apart: int) -> list[Tensor]:
    """The coordinates (..., d_head) of each part that is normalized on its own: the last ``apart``, the others."""
    return [vectors] if not apart else [vectors[..., :-apart], vectors[..., -apart:]]


def reorder(vectors: Tensor, apart: int) -> Tensor:
    """Coordinates in pairs (2i, 2i + 1) put in two halves, of the last ``apart`` ones."""
    last = vectors[..., -apart:]
    return torch.cat([vectors[..., :-apart], last[..., 0::2], last[..., 1::2]], -1)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew: freshly built models have zero biases and unit gains, which hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() > 1 else 0.5
            values = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(values if parameter.dim() > 1 else values + 0.7)
    return model
