"""A part of a captured call, for statistics that are too dear for all of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_qk.functional._logits import MaskFunction


def some_sequences(
    given: Mapping[str, Any], count: int | None, generator: torch.Generator | None
) -> dict[str, Any]:
    """The arguments of a call for some of its sequences, drawn without replacement.

    Args:
        given: what :func:`~lightning_qk.capture.call.statistics_arguments` or ``output_arguments`` returned.
        count: how many; None for all.
        generator: where they are drawn from; None is torch's global generator.
    """
    batch = given["query"].shape[0]
    if count is None or count >= batch:
        return dict(given)
    device = "cpu" if generator is None else generator.device
    drawn = torch.randperm(batch, generator=generator, device=device)[:count].sort().values
    drawn = drawn.to(given["query"].device)

    def take(tensor: Tensor) -> Tensor:
        # What is the same for all sequences has one entry.
        return tensor if tensor.dim() < 4 or tensor.shape[0] == 1 else tensor[drawn]

    def mask(function: MaskFunction) -> MaskFunction:
        return lambda sequence, head, query, key: function(drawn[sequence], head, query, key)

    return _apply(given, take, mask, ("query", "key", "value"))


def a_stretch(
    given: Mapping[str, Any], length: int | None, generator: torch.Generator | None
) -> dict[str, Any]:
    """The arguments of a call for consecutive tokens, queries and keys alike, that begin at a random place.

    All of them where a sequence is not longer, or queries and keys are not the same tokens one by one.

    Args:
        given: as for :func:`some_sequences`.
        length: how many tokens; None for all.
        generator: where the place is drawn from; None is torch's global generator.
    """
    n, m = given["query"].shape[2], given["key"].shape[2]
    if length is None or length >= n or n != m or given["query_offset"] or given["self_attention"] is False:
        return dict(given)
    device = "cpu" if generator is None else generator.device
    start = int(torch.randint(n - length + 1, (), generator=generator, device=device))
    tokens = slice(start, start + length)

    def take(tensor: Tensor) -> Tensor:
        rows = tokens if tensor.dim() > 1 and tensor.shape[-2] > 1 else slice(None)
        keys = tokens if tensor.shape[-1] > 1 else slice(None)
        return tensor[..., rows, keys] if tensor.dim() > 1 else tensor[..., keys]

    def mask(function: MaskFunction) -> MaskFunction:
        return lambda sequence, head, query, key: function(sequence, head, query + start, key + start)

    out = _apply(given, take, mask, ())
    return out | {name: out[name][:, :, tokens] for name in ("query", "key", "value") if name in out}


def _apply(given: Mapping[str, Any], take: Any, wrap: Any, vectors: tuple[str, ...]) -> dict[str, Any]:
    """Take from the vectors, the mask and the bias; everything else is the same for any part."""
    out = dict(given)
    for name in (*vectors, "mask", "bias"):
        part = out.get(name)
        if isinstance(part, Tensor):
            out[name] = take(part)
        elif name == "mask" and part is not None:
            out[name] = wrap(part)
    return out
