"""Layers whose logits take more than a bilinear form: queries with biases, norms behind projections, bounds.

The limit form is of logits. Of plain projections it follows from weights and covariances; of these layers, from
the queries and keys that they make of the tokens themselves.
"""

import weakref
from collections.abc import Collection, Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_qk.functional.precision import full_precision
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import LARGEST_BATCH
from lightning_qk.heads.token_vectors import kind_of, token_vectors, vectors_of_heads
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


def limit_penalties(
    layers: Mapping[str, LayerReader | HeadProjections], settings: Settings
) -> Iterator[Tensor]:
    """Penalties of layers that are alike, together; differentiable in all that makes their queries and keys."""
    for names in _alike(layers, settings):
        yield _penalty({name: layers[name] for name in names}, settings)


def _alike(layers: Mapping[str, LayerReader | HeadProjections], settings: Settings) -> Iterator[list[str]]:
    """Names of layers of one kind, with as many tokens, in batches of bounded size."""
    batches: dict[Hashable, list[list[str]]] = {}
    for name, layer in layers.items():
        if isinstance(layer, HeadProjections) or layer.is_sharded():
            yield [name]
            continue
        tokens, _ = settings.input_of(name, layer.width[0])
        own = batches.setdefault((kind_of(layer), tokens.shape, abs(float(layer.scaling))), [[]])
        if own[-1] and (len(own[-1]) + 1) * (layer.numel + tokens.numel()) > LARGEST_BATCH:
            own.append([])
        own[-1].append(name)
    for of_kind in batches.values():
        yield from of_kind


def _penalty(layers: Mapping[str, LayerReader | HeadProjections], settings: Settings) -> Tensor:
    first = next(iter(layers.values()))
    with torch.no_grad():
        inputs = [settings.input_of(name, layer.width[0]) for name, layer in layers.items()]
        tokens, weight = (torch.stack([own[part] for own in inputs]) for part in range(2))
        tokens = torch.where((weight > 0)[..., None], tokens, 0.0)
        share = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        root = (share * abs(float(first.scaling))).sqrt()[:, None, None]
    if isinstance(first, HeadProjections):
        query, key = (own[None] for own in vectors_of_heads(first, tokens[0]))
    else:
        query, key = token_vectors([one for one in layers.values() if isinstance(one, LayerReader)], tokens)
    with full_precision(query.device):
        root, share = root.to(query), share.to(query)[:, None, :, None]
        return head_penalties(query * root, (key - (key @ share)) * root, Limit(settings.limit)).sum()


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
    for names in _alike(layers, settings):
        every = dict.fromkeys(one for name in names for one in parameters_of(layers[name]))
        own = [parameter for parameter in every if id(parameter) in wanted]
        with torch.enable_grad():
            total = _penalty({name: layers[name] for name in names}, settings)
            weighted = weight * total  # optimizers step without gradients
        totals.append(total.detach())
        if own and total.requires_grad:
            given = torch.autograd.grad(weighted, own, allow_unused=True)
            shares += [pair for pair in zip(own, given, strict=True) if pair[1] is not None]
    return totals, shares
