"""Which rotation a rotary function applies: pairs, frequencies and scale, from what it does with unit vectors."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.functional.rotary import Rotary, rotate_between
from lightning_qk.heads.rotary_angles import Source
from lightning_qk.heads.rotary_layer import Call, Layer


class Fit(NamedTuple):
    """A rotation of the coordinates that a rotary function is given.

    Attributes:
        inv_freq: frequencies as measured, detached.
        interleaved: see :class:`~lightning_qk.functional.rotary.Rotary`.
        start: first rotated coordinate of what the function is given.
        scale: factor on q and on k.
        backward: the live buffer's frequencies are those of the opposite direction.
        holder: the module that has the live buffer, if there is one.
        buffer: its name.
    """

    inv_freq: Tensor
    interleaved: bool
    start: int
    scale: float
    backward: bool = False
    holder: "weakref.ref[nn.Module] | None" = None
    buffer: str = ""


# Layers of a model share their rotary module.
_FITS: "weakref.WeakKeyDictionary[nn.Module, dict[Any, Fit | None]]" = weakref.WeakKeyDictionary()

# Pairs of positions of which the second is where a rotation that was found at the first is checked.
_PROBED = ((0, 1), (2, 5))


def remembered_fit(layer: Layer, source: Source, call: Call, d_head: int) -> Fit | None:
    """The rotation that a call applies, found once for all layers that share a rotary module; None for none.

    Args:
        layer: what is run again, at other positions.
        source: of its angles.
        call: its first call of a rotary function.
        d_head: width of a head.

    Raises:
        Exception: whatever the layer or the function raises.
    """
    known = _FITS.setdefault(source.holder, {})
    key = (call.name, call.turned, tuple(call.query.shape), type(layer.module), source.layer_type, d_head)
    if key not in known:
        known[key] = _fit(layer, source, call, d_head)
    return known[key]


def _fit(layer: Layer, source: Source, call: Call, d_head: int) -> Fit | None:
    if not call.turned:
        return None
    width = min(call.width, d_head)
    steps = []
    for first, second in _PROBED:
        pair = []
        for where, position in ((call.turned[0], first), (call.turned[min(1, len(call.turned) - 1)], second)):
            other = layer.call(position, source.at(position, layer.tokens))
            if other is None or other.name != call.name:
                return None
            pair.append(_matrix(layer.functions[call.name], other, call.turned, where, width))
        steps.append(pair[0].mT @ pair[1])
    buffer = source.buffer
    live = None if buffer is None else getattr(source.holder, buffer).detach().to("cpu", torch.float64)
    return _fit_steps(steps, source, buffer, live)


def _fit_steps(
    steps: Sequence[Tensor], source: Source, buffer: str | None, live: Tensor | None
) -> Fit | None:
    step = steps[0]
    width = step.shape[0]
    turning = (step - step.diag().diag()).abs().sum(0) > 0
    span = int(turning.nonzero().max() - turning.nonzero().min()) + 1 if bool(turning.any()) else 0
    lengths = [2 * live.numel()] if live is not None else []
    for length in (*lengths, width, span, span + 1):
        if length < 2 or length % 2 or length > width:
            continue
        for interleaved in (False, True):
            for start in dict.fromkeys((0, width - length)):
                found = _structure(step, length, interleaved, start)
                if not all(_agrees(found, *known) for known in zip(steps, (1, 3), strict=True)):
                    continue
                fit = Fit(found.inv_freq, interleaved, start, found.scale)
                for backward in (False, True):
                    wanted = None if live is None else (-live if backward else live)
                    if wanted is not None and _is_same(found.inv_freq, wanted):
                        holder = weakref.ref(source.holder)
                        return fit._replace(backward=backward, holder=holder, buffer=buffer or "")
                return fit
    return None


def _is_same(measured: Tensor, kept: Tensor) -> bool:
    return measured.shape == kept.shape and torch.allclose(measured, kept, rtol=1e-4, atol=1e-6)


def _structure(step: Tensor, length: int, interleaved: bool, start: int) -> Rotary:
    """Frequencies and scale of one step by the pairs that a form says."""
    if interleaved:
        first = torch.arange(start, start + length, 2)
        second = first + 1
    else:
        first = torch.arange(start, start + length // 2)
        second = first + length // 2
    cos, sin = step[first, first], step[second, first]
    squared = (cos.square() + sin.square()).sqrt().mean()
    scale = float(squared.clamp(min=0).sqrt())
    # Measured in single precision.
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    return Rotary(torch.atan2(sin, cos), interleaved, start, scale)


def _agrees(found: Rotary, step: Tensor, offset: int) -> bool:
    expected = rotate_between(torch.eye(step.shape[0], dtype=step.dtype), found, torch.tensor(offset))
    return torch.allclose(step, expected, rtol=0, atol=1e-5 * max(1.0, found.scale**2))


def _matrix(
    function: Callable[..., Any], call: Call, turned: Sequence[int | str], where: int | str, width: int
) -> Tensor:
    """What a rotary function does with the first coordinates of one of its arguments, (width, width)."""
    given = call.get(where)
    units = torch.eye(width, given.shape[-1], device=given.device, dtype=given.dtype)
    slots = given.numel() // given.shape[-1]
    # As many tokens and heads as there are, all at one position: which of them gets which vector is the same.
    filled = units.repeat(-(-slots // width), 1)[:slots].view(given.shape)

    def put(key: int | str, value: Any) -> Any:
        if key == where:
            return filled
        return torch.zeros_like(value) if key in turned else value

    args = [put(index, value) for index, value in enumerate(call.args)]
    kwargs = {name: put(name, value) for name, value in call.kwargs.items()}
    with torch.no_grad():
        out = function(*args, **kwargs)
    if isinstance(out, tuple):
        place = list(turned).index(where)
        out = out[place]
    if out.shape != given.shape:
        raise ValueError(f"expected the shape {tuple(given.shape)} back, got {tuple(out.shape)}")
    rows = out.reshape(slots, given.shape[-1])[:width, :width]
    return rows.mT.to("cpu", torch.float64)
