"""Layers of one shape, stacked, so that a whole model costs one batched product."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import ProjectionReader

# Layers are copied when they are stacked, and some when they are read: of large models no more than this many
# numbers at a time.
_LARGEST_BATCH = 2**26


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


def layer_batches(
    projections: Mapping[str, HeadProjections], names: Iterable[str] | None = None
) -> Iterator[LayerBatch]:
    """Layers grouped by shape, dtype and device, each group stacked; differentiable.

    Of a :class:`~lightning_qk.heads.reader.ProjectionReader`, layers are read in the parts of
    :func:`read_together`, so that memory is bounded if the caller keeps none (a loop's variable is deleted at
    its end); on every process in the same order.

    Args:
        projections: the layers by name.
        names: which of them; None for all.
    """
    names = list(projections if names is None else names)
    parts: Iterable[list[str]] = [names]
    if isinstance(projections, ProjectionReader):
        parts = read_together(projections, names)
    for part in parts:
        yield from _stacked({name: projections[name] for name in part})


def read_together(reader: ProjectionReader, names: Iterable[str]) -> Iterator[list[str]]:
    """Layers in parts that are read at once, each of its own kind.

    First all whose weights are views, then those whose weights are made by reading (adapters, quantized
    weights), in parts of bounded size, then each sharded layer alone: no more than one is whole at a time.
    """
    views: list[str] = []
    made: list[list[str]] = [[]]
    alone: list[str] = []
    size = 0
    for name in names:
        layer = reader.layers[name]
        if layer.is_sharded():
            alone.append(name)
        elif layer.is_view():
            views.append(name)
        else:
            if made[-1] and size + layer.numel > _LARGEST_BATCH:
                made.append([])
                size = 0
            made[-1].append(name)
            size += layer.numel
    for part in (views, *made, *([name] for name in alone)):
        if part:
            yield part


def _stacked(heads: Mapping[str, HeadProjections]) -> Iterator[LayerBatch]:
    for names in group_layers(heads, lambda head: (head.query, head.key)):
        yield LayerBatch(
            names=tuple(names),
            query=stack([heads[name].query for name in names]),
            key=stack([heads[name].key for name in names]),
            scaling=torch.tensor(
                [heads[name].scaling for name in names], device=heads[names[0]].query.device
            ),
        )


def group_layers(
    layers: Mapping[str, HeadProjections], tensors: Callable[[HeadProjections], Sequence[Tensor]]
) -> list[list[str]]:
    """Names of layers whose tensors agree in shape, dtype and device, in batches of bounded size."""
    groups: dict[tuple[object, ...], list[list[str]]] = {}
    for name, head in layers.items():
        own = tensors(head)
        batches = groups.setdefault(tuple((t.shape, t.dtype, t.device) for t in own), [[]])
        if batches[-1] and (len(batches[-1]) + 1) * sum(t.numel() for t in own) > _LARGEST_BATCH:
            batches.append([])
        batches[-1].append(name)
    return [names for batches in groups.values() for names in batches]


def stack(matrices: Sequence[Tensor]) -> Tensor:
    """As torch.stack, but matrices that are stored by columns stay so, which is several times faster."""
    if len(matrices) == 1:
        return matrices[0].unsqueeze(0)
    if all(matrix.stride(-2) == 1 and matrix.stride(-1) != 1 for matrix in matrices):
        return torch.stack([matrix.mT for matrix in matrices]).mT
    return torch.stack(list(matrices))
