"""Which heads of a layer a process computes, where their weights are spread over processes."""

from typing import Any

from torch import nn

from lightning_qk.heads.layouts import find_layout
from lightning_qk.heads.sharding import is_dtensor


def local_heads(module: nn.Module, heads: int) -> slice | None:
    """Which of a layer's query heads this process computes under tensor parallelism.

    To be asked while the layer runs, at its attention call: FSDP2 has gathered its own dimension by then, so
    that what is still sharded is sharded over heads.

    Args:
        module: the attention layer.
        heads: how many query heads the layer has in all.

    Returns:
        The slice of ``range(heads)``, or None where the process computes all of them.

    Raises:
        ValueError: the shards are not whole heads.
    """
    layout = find_layout(module)
    if layout is None:
        return None
    weight: Any = layout.query.weight(module)
    if not is_dtensor(weight):
        return None
    rows = weight.shape[0]
    start, length = 0, rows
    for dim, placement in enumerate(weight.placements):
        if not placement.is_shard(0):
            continue
        # As torch.chunk cuts: equal pieces but for the last ones.
        piece = -(-length // weight.device_mesh.size(dim))
        offset = min(weight.device_mesh.get_local_rank(dim) * piece, length)
        start, length = start + offset, min(piece, length - offset)
    if length == rows:
        return None
    if start * heads % rows or length * heads % rows:
        raise ValueError(
            f"expected shards of whole heads, got rows {start} to {start + length} of {rows} for {heads} heads: "
            "choose a tensor parallel size that divides the number of heads"
        )
    return slice(start * heads // rows, (start + length) * heads // rows)
