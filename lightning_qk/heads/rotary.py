"""The rotation that an attention layer applies, found by running the model's own rotary function.

A layer's forward runs on a copy whose projections give zeros, up to its call of a function named for rotary
positions, with the angles that the model's own rotary module gives for one position. That call is repeated
with unit vectors in the place of queries and keys, at several positions: it is a matrix, and between two
positions a rotation, from which pairs, frequencies and scale are taken. Neither models nor kinds of scaling are
asked for by name.
"""

import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lightning_qk.functional.rotary import Rotary
from lightning_qk.heads.rotary_angles import Angles, angle_sources, holds_angles
from lightning_qk.heads.rotary_fit import Fit, remembered_fit
from lightning_qk.heads.rotary_layer import Call, Layer, tokens_for

ROTARY, ROTARY_2D = "rotary", "rotary (2-D)"

_MANY_AXES = re.compile(r"vision|image|pixel|patch|2d|multidim|axial|video|vjepa|vit(?![a-z])", re.IGNORECASE)


class Rotation:
    """How a layer rotates queries and keys, kept without the frequencies' values where a buffer has them.

    Attributes:
        kind: ``"rotary"``, ``"rotary (2-D)"`` (by coordinates in an image or a video), or None where the
            layer does not rotate.
        is_known: whether that could be told.
    """

    def __init__(
        self, kind: str | None, fit: Fit | None = None, start: int = 0, *, is_known: bool = True
    ) -> None:
        self.kind = kind
        self.is_known = is_known
        self._fit = fit
        self._start = start

    def read(self) -> Rotary | None:
        """The rotation as it is now.

        None where the layer does not rotate, or in no way that one position in a sequence tells: by
        coordinates in an image, say, or the layer's input in the place of its queries and keys.
        """
        fit = self._fit
        if fit is None:
            return None
        holder = None if fit.holder is None else fit.holder()
        buffer = None if holder is None else getattr(holder, fit.buffer, None)
        # Some models exchange the buffer as sequences grow.
        if isinstance(buffer, Tensor) and buffer.shape == fit.inv_freq.shape:
            inv_freq = -buffer if fit.backward else buffer
        else:
            inv_freq = fit.inv_freq
        return Rotary(inv_freq, fit.interleaved, self._start + fit.start, fit.scale)


NO_ROTATION = Rotation(None)


def find_rotation(
    module: nn.Module,
    ancestors: Sequence[nn.Module],
    config: Any,
    d_head: int,
    *,
    heads: int = 1,
    is_cross: bool = False,
) -> Rotation:
    """Find how a layer rotates its queries and keys with position.

    Args:
        module: the attention layer.
        ancestors: the modules that contain it, nearest first.
        config: the nearest configuration, or None.
        d_head: width of a head.
        heads: where fewer of a token's heads are rotated, no one rotation is that of the layer.
        is_cross: keys come from other tokens than queries.
    """
    layer = Layer(module, config, tokens_for(d_head), is_cross)
    if not layer.functions:
        # A rotary module of its own may turn queries and keys itself.
        holds = any(holds_angles(name, child) for name, child in module.named_children())
        return Rotation(None, is_known=False) if holds else NO_ROTATION
    try:
        return _find(layer, ancestors, d_head, heads)
    except Exception:  # a forward of any kind may raise anything
        return Rotation(None, is_known=False)


def _find(layer: Layer, ancestors: Sequence[nn.Module], d_head: int, heads: int) -> Rotation:
    many_axes = unread = None
    for source in angle_sources(layer.module, layer.parameters, ancestors, layer.config):
        try:
            angles = source.at(1, layer.tokens)
            if angles is None:
                many_axes = many_axes or source.holder
                continue
            call = layer.call(1, angles)
        except Exception:
            unread = unread or source.holder
            continue
        if call is None or layer.is_left_out():
            return NO_ROTATION
        if call.before_projections or call.query.numel() < layer.tokens * heads * min(call.width, d_head):
            return Rotation(ROTARY)
        try:
            fit = remembered_fit(layer, source, call, d_head)
        except Exception:  # a table of angles may end before the positions that are probed
            fit = None
        if fit is None:
            unread = unread or source.holder
            continue
        width = call.width
        start = call.place % d_head if width < d_head else 0
        return Rotation(ROTARY, fit, start if start + width <= d_head else d_head - width)
    # Nobody's angles fit: whether it rotates at all.
    holder = many_axes or unread
    try:
        # What takes keys from other tokens does without angles wherever it can.
        call = _blind_call(layer, is_given=holder is not None and not layer.is_cross)
    except Exception:
        if holder is None:
            raise
    else:
        if call is None:
            return NO_ROTATION
    if many_axes is not None:
        return Rotation(ROTARY_2D)
    return Rotation(_kind_by_name(layer, unread))


def _blind_call(layer: Layer, *, is_given: bool) -> Call | None:
    """Run a layer whose angles are not known.

    Where no module around it could make any, it may be given none at all.
    """
    if not is_given:
        with suppress(Exception):  # it may need some
            return layer.call(1, None)
    return layer.call(1, Angles())


def _kind_by_name(layer: Layer, holder: nn.Module | None) -> str:
    names = [*layer.functions, type(layer.module).__name__, type(holder).__name__]
    if holder is not None:
        names += inspect.signature(type(holder).forward).parameters
        # A table of all places in a grid, where one coordinate has one row of frequencies.
        if any(buffer.dim() > 1 for name, buffer in holder.named_buffers() if name.endswith("inv_freq")):
            return ROTARY_2D
    # A text model may be named for the images that it comes with.
    many = any(_MANY_AXES.search(name) and "text" not in name.lower() for name in names)
    return ROTARY_2D if many else ROTARY
