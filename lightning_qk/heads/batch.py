"""Layers of one shape, stacked, so that a whole model costs one batched product."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.heads.projections import HeadProjections


class LayerBatch(NamedTuple):
    """Projections of layers whose shapes agree.

    Attributes:
        names: qualified names of the layers.
        query: shape ``(layers, heads, d_head, d_query)``.
        key: shape ``(layers, kv_heads, d_head, d_key)``.
        scaling: softmax scales, shape ``(layers,)``.
    """

    names: tuple[str, ...]
    query: Tensor
    key: Tensor
    scaling: Tensor


def stack_layers(projections: Mapping[str, HeadProjections]) -> list[LayerBatch]:
    """Group layers by shape, dtype and device and stack each group; differentiable."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, head in projections.items():
        signature = (head.query.shape, head.key.shape, head.query.dtype, head.key.dtype, head.query.device)
        groups.setdefault(signature, []).append(name)
    return [
        LayerBatch(
            names=tuple(names),
            query=torch.stack([projections[name].query for name in names]),
            key=torch.stack([projections[name].key for name in names]),
            scaling=torch.tensor(
                [projections[name].scaling for name in names], device=projections[names[0]].query.device
            ),
        )
        for names in groups.values()
    ]
