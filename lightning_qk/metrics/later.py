"""Small measurements that wait for others of their shape, so that one run of the arithmetic serves all of them.

Of a small layer a measurement costs the calls of its operations, some hundred, and not their arithmetic. Layers of
one shape are one more axis of sequences: measured together they cost the calls of one. Inputs are copied, since a
model may write into its tensors later; of what is large the copy would cost more than the calls.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.hidden import HiddenSums, draw_sequences, hidden_sums
from lightning_qk.functional.logits import AttentionLogits, ProductLogits
from lightning_qk.metrics.hidden import with_heads

_ROOM, _ROOM_ELSEWHERE = 1 << 21, 1 << 24
"""Numbers that may wait on the CPU, some caches' worth, and on an accelerator, 64 MiB in float32."""
_PARTS = 4
"""A measurement of more than one of so many parts of that room does not wait."""

Sums = Any
"""See :data:`~lightning_qk.metrics.collector.Sums`."""


class Later(NamedTuple):
    """A measurement that can be made together with others of the same key.

    Attributes:
        key: what has to be equal for that.
        tensors: the inputs, sequences first; copies.
        measure: gets the inputs of several, one after the other along the first axis; gives their sums, parts
            ``(statistics, sequences, heads)``, or None where there are none.
        heads: number of heads of the sums.
    """

    key: Hashable
    tensors: tuple[Tensor, ...]
    measure: Callable[..., Sums | None]
    heads: int


class Waiting:
    """Measurements that wait, each of something that has a name. Memory has a bound."""

    def __init__(self) -> None:
        self._groups: defaultdict[Hashable, list[tuple[Any, Later]]] = defaultdict(list)
        self._elements = 0

    def add(self, name: Any, later: Later) -> bool:
        """Have one wait; whether there is no room for more, so that all are to be made."""
        self._groups[later.key].append((name, later))
        self._elements += sum(tensor.numel() for tensor in later.tensors)
        return self._elements >= _room(later.tensors[0])

    @property
    def names(self) -> list[Any]:
        """Of what measurements wait."""
        return [name for group in self._groups.values() for name, _ in group]

    def leave_out(self, is_unwanted: Callable[[Any], bool]) -> None:
        """Forget some."""
        for key, group in self._groups.items():
            self._groups[key] = [one for one in group if not is_unwanted(one[0])]

    def reset(self) -> None:
        """Forget all."""
        self._groups.clear()
        self._elements = 0

    def make(self) -> Iterator[tuple[Any, Sums | Exception]]:
        """Make all of them: name → sums, parts ``(statistics, 1, heads)``, or why there are none."""
        groups, self._groups = self._groups, defaultdict(list)
        self._elements = 0
        for group in groups.values():
            yield from _together(group)


@torch.no_grad()
def _together(group: list[tuple[Any, Later]]) -> Iterable[tuple[Any, Sums | Exception]]:
    if not group:
        return []
    names, laters = zip(*group, strict=True)
    try:
        columns = zip(*(later.tensors for later in laters), strict=True)
        sums = laters[0].measure(*(torch.cat(column) for column in columns))
    except Exception as error:
        if len(group) == 1:
            return [(names[0], error)]
        # One alone may fail, or there was no memory for all of them.
        return [found for one in group for found in _together([one])]
    if sums is None:
        return []
    parts = []
    for part, value in sums._asdict().items():
        by_one = value.unflatten(1, (len(group), -1))
        reduced = by_one.amax(2) if part == "maximum" else by_one.sum(2)
        parts.append(reduced.split(1, 1))
    return [(name, type(sums)(*own)) for name, *own in zip(names, *parts, strict=True)]


def _room(tensor: Tensor) -> int:
    return _ROOM if tensor.device.type == "cpu" else _ROOM_ELSEWHERE


def _can_wait(*tensors: Tensor) -> bool:
    """Whether they are small, and of one sequence at least: of none there is no maximum."""
    return len(tensors[0]) > 0 and sum(one.numel() for one in tensors) * _PARTS <= _room(tensors[0])


@torch.no_grad()
def attention_later(
    logits: AttentionLogits, name: str, measure: Callable[[ProductLogits], Sums | None]
) -> Later | None:
    """The measurement of an attention call, where it can wait: a small one, of queries, keys and masks.

    Args:
        logits: the call.
        name: of what is measured: calls with another one are not measured together.
        measure: gets the calls of several layers as sequences of one call.
    """
    if not isinstance(logits, ProductLogits) or logits.bias is not None or logits.sinks is not None:
        return None
    batch, _, n, m = logits.shape
    given = {"query": logits.query, "key": logits.key}
    if isinstance(logits.mask, Tensor):
        # What is expanded is copied once. Sequences that share a mask have one each: layers become sequences.
        once = (slice(1 if step == 0 else None) for step in logits.mask.stride()[2:])
        given["mask"] = logits.mask[(slice(None), slice(None), *once)].expand(batch, -1, -1, -1)
    elif logits.mask is not None:
        return None
    if logits.query_mask is not None:
        given["query_mask"] = logits.query_mask
    if not _can_wait(*given.values()):
        return None
    facts = tuple(
        getattr(logits, field)
        for field in ("is_causal", "sliding_window", "query_offset", "scaling", "softcap", "self_attention")
    )

    def together(*stacked: Tensor) -> Sums | None:
        found = dict(zip(given, stacked, strict=True))
        if "mask" in found:
            found["mask"] = found["mask"].expand(-1, -1, n, m)
        return measure(logits.replace(**found))

    return Later(
        ("attention", name, facts, m, *((part, *_kind(tensor)) for part, tensor in given.items())),
        tuple(tensor.clone() for tensor in given.values()),
        together,
        logits.shape[1],
    )


@torch.no_grad()
def hidden_later(
    states: Tensor,
    mask: Tensor | None,
    *,
    tokens: int | None,
    sequences: int | None,
    generator: torch.Generator | None,
) -> Later | None:
    """The measurement of hidden states, where it can wait; arguments of :func:`hidden_sums`."""
    few, mask, stands_for = draw_sequences(states, mask, sequences, generator)
    given = (few,) if mask is None else (few, mask)
    if not _can_wait(*given):
        return None

    def together(states: Tensor, mask: Tensor | None = None) -> HiddenSums:
        sums = hidden_sums(states, mask=mask, tokens=tokens, generator=generator)
        return with_heads(sums._replace(total=sums.total * stands_for, weight=sums.weight * stands_for))

    key = ("hidden", tokens, stands_for, *(_kind(tensor) for tensor in given))
    return Later(key, tuple(tensor.clone() for tensor in given), together, 1)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device
