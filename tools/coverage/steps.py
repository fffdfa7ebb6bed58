"""Steps from an operand of attention back to its origin, where each is known exactly.

An operand may be a part of what a layer projected (one sequence of a packed batch), or contain more than it
(further keys behind its own), or be a multiple of it: by one number, by one positive number a token, or by a
norm's gain. What lies before such steps can be compared with a projection as the operand itself can.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.verification.trace import MOVES, PRODUCTS, SCALINGS, Node

_MOST = 200


class Earlier(NamedTuple):
    """A tensor from which an operand was computed.

    Attributes:
        node: the tensor and what it was made by in turn.
        factor: what the operand is a multiple of it by, or None where that differs among tokens.
        gain: ``(d,)``: what multiplied its coordinates afterwards, all gains together, or None.
    """

    node: Node
    factor: float | None
    gain: Tensor | None


def earlier(node: Node | None, width: int, *, with_gain: bool = False) -> Iterator[Earlier]:
    """Tensors from which an operand was computed, nearest first, without views or copies of later ones."""
    todo = [] if node is None else [(Earlier(node, 1.0, None), False)]
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        current, is_new = todo.pop(0)
        if id(current.node) in seen:
            continue
        seen.add(id(current.node))
        if is_new:
            yield current
        todo.extend(_steps(current, is_new, width, with_gain))


def _steps(current: Earlier, is_new: bool, width: int, with_gain: bool) -> Iterator[tuple[Earlier, bool]]:
    node = current.node
    if node.name in MOVES:
        for parent in node.parents:
            changes = parent.tensor.numel() != node.tensor.numel()
            yield Earlier(parent, current.factor, current.gain), changes
        return
    number = node.factor()
    if number is not None:
        for parent in node.parents[:1]:
            factor = None if current.factor is None else current.factor * number
            yield Earlier(parent, factor, current.gain), False
        return
    if node.name not in SCALINGS or len(node.args) < 2:
        return
    divides = node.name.startswith("div")
    for own, other in ((0, 1), (1, 0))[: 1 if divides else 2]:
        values, by = node.args[own], node.args[other]
        made = next((one for one in node.parents if one.tensor is values), None)
        if made is None or not isinstance(by, Tensor) or values.shape[-1:] != (width,):
            continue
        if width > 1 and by.shape[-1:] == (1,) and bool((by > 0).all()):
            yield Earlier(made, None, current.gain), True
        elif with_gain and by.numel() == width == by.shape[-1]:
            gain = (1 / by.double() if divides else by.double()).reshape(width)
            if bool(torch.isfinite(gain).all()) and bool(gain.all()):
                gain = gain if current.gain is None else current.gain * gain
                yield Earlier(made, current.factor, gain), True


def ancestors(
    node: Node | None,
    through: Iterable[str] | None = None,
    limit: int = 300,
    is_through: Callable[[Node], bool] | None = None,
) -> Iterator[Node]:
    """What a result was made from, nearest first, itself included, up to the matrix products that made it.

    Args:
        node: where to start.
        through: the operations to go through; None for all but products and the like.
        limit: the most to give.
        is_through: whether to go through one of the other operations.
    """
    todo, seen = [] if node is None else [node], set[int]()
    while todo and len(seen) < limit:
        current = todo.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if through is None:
            if current.name in PRODUCTS or current.name in ("convolution", "embedding", "_softmax"):
                continue
        elif current.name not in through and not (is_through is not None and is_through(current)):
            continue
        todo.extend(current.parents)
