"""Layers whose logits take more than a bilinear form: queries with biases, norms behind projections, bounds.

The limit form is of logits. Of plain projections it follows from weights and covariances; of these layers, from
the queries and keys that they make of the tokens themselves.
"""

import weakref
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_qk.functional.precision import full_precision
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.token_vectors import token_vectors
from lightning_qk.regularizers.closed_form import Limit, head_penalties
from lightning_qk.regularizers.settings import Settings

_BILINEAR: "weakref.WeakKeyDictionary[LayerReader, bool]" = weakref.WeakKeyDictionary()


def takes_vectors(layer: LayerReader | HeadProjections) -> bool:
    """Whether a layer's logits between tokens do not follow from its weights and their covariance and mean."""
    if isinstance(layer, HeadProjections):
        return layer.query_bias is not None or layer.qk_norm or layer.clip is not None
    if layer.qk_norm or layer.clip is not None or layer.is_sharded():
        return True
    known = _BILINEAR.get(layer)
    if known is None:
        with torch.no_grad():
            known = _BILINEAR[layer] = layer.read().query_bias is None
    return not known


def limit_penalty(name: str, layer: LayerReader | HeadProjections, settings: Settings) -> Tensor:
    """The penalty of one layer, differentiable in all that makes its queries and keys."""
    tokens, weight = settings.input_of(name, layer.width[0])
    with torch.no_grad():
        counts = weight > 0
        tokens = torch.where(counts[:, None], tokens, 0.0)
        share = weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
        root = (share * abs(float(layer.scaling))).sqrt()
    query, key = token_vectors(layer, tokens)
    with full_precision(query.device):
        root, share = root.to(query), share.to(query)
        key = key - (key @ share)[..., None]
        return head_penalties((query * root)[None], (key * root)[None], Limit(settings.limit)).sum()


def parameters_of(layer: LayerReader) -> list[nn.Parameter]:
    """All parameters that queries and keys of tokens may depend on, biases and norms too."""
    found = list(dict.fromkeys([*layer.parameters(), *layer.module.parameters()]))
    # FSDP has no gradient for a parameter that has none on any process.
    return [parameter for parameter in found if parameter.grad is not None] if layer.is_flat else found


def limit_gradients(
    layers: Mapping[str, LayerReader], settings: Settings, weight: float | Tensor, wanted: Collection[int]
) -> tuple[list[Tensor], list[tuple[nn.Parameter, Tensor]]]:
    """Penalties of layers, and the gradients of ``weight`` times these by the wanted parameters."""
    totals, shares = [], []
    for name, layer in layers.items():
        own = [parameter for parameter in parameters_of(layer) if id(parameter) in wanted]
        with torch.enable_grad():
            total = limit_penalty(name, layer, settings)
        totals.append(total.detach())
        if own and total.requires_grad:
            given = torch.autograd.grad(weight * total, own, allow_unused=True)
            shares += [pair for pair in zip(own, given, strict=True) if pair[1] is not None]
    return totals, shares
