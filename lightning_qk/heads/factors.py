"""Learnt factors on queries and keys between their projections and the dot product."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Factor(NamedTuple):
    """A factor on the coordinates of one side.

    Attributes:
        side: ``"query"`` or ``"key"``.
        parameter: attribute of the layer; it has the factor if this is a parameter of more than one number.
        values: the layer to the factor, which broadcasts to (heads, d_head).
        normalizes: the layer divides each side by its length besides: cosine attention. The softmax scale of
            the normalized form, whose vectors have length ``d_head ** 0.5``, is then ``1 / d_head``, and 1 else.
    """

    side: str
    parameter: str
    values: Callable[[nn.Module], Tensor]
    normalizes: bool = False


def _per_dim(module: nn.Module) -> Tensor:
    scale = getattr(module, "q_scale", getattr(module, "scaling", 1.0))
    return F.softplus(module.per_dim_scale) * scale  # type: ignore[arg-type]


def _per_dim_key(module: nn.Module) -> Tensor:
    return torch.as_tensor(getattr(module, "k_scale", 1.0))


def _base_two(module: nn.Module) -> Tensor:
    scaling: Tensor = module.scaling  # type: ignore[assignment]
    return F.softplus(scaling) * (math.log2(math.e) / math.sqrt(scaling.numel()))


def _temperature(module: nn.Module) -> Tensor:
    scale: Tensor = module.logit_scale  # type: ignore[assignment]
    return scale.clamp(max=math.log(100.0)).exp().flatten()[:, None]


_FACTORS = (
    # Gemma's audio towers and VideoPrism's pooling head.
    Factor("query", "per_dim_scale", _per_dim),
    Factor("key", "per_dim_scale", _per_dim_key),
    # TimesFM.
    Factor("query", "scaling", _base_two),
    # Swin v2: cosine attention with a temperature for each head.
    Factor("query", "logit_scale", _temperature, normalizes=True),
)


def learnt_factors(module: nn.Module) -> dict[str, Factor]:
    """The factors that a layer has, by side."""
    found = {}
    for factor in _FACTORS:
        parameter = module._parameters.get(factor.parameter)
        if parameter is not None and parameter.numel() > 1:
            found[factor.side] = factor
    return found
