"""What positions do to the logits of an attention layer: how it rotates queries and keys, and what it adds.

No names of models are asked for, but facts: whether the layer calls a rotary function, which tables and
projections of relative positions it has, which arguments its forward takes, and which tables the modules around it
share among their layers. What follows from none of these is None.

A rotation is found by running the model's own rotary function (:mod:`lightning_qk.heads.rotary`) with unit vectors
in the place of queries and keys, at several positions: it is a matrix, and between two positions a rotation, from
which pairs, frequencies and scale are taken.
"""

import inspect
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.functional.rotary import Rotary, rotate_between
from lightning_qk.heads.rotary import Angles, Call, RotaryRun, Source, holds_angles, tokens_for
from lightning_qk.heads.sites import AttentionLayer


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


def remembered_fit(layer: RotaryRun, source: Source, call: Call, d_head: int) -> Fit | None:
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


def _fit(layer: RotaryRun, source: Source, call: Call, d_head: int) -> Fit | None:
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


ROTARY, ROTARY_2D = "rotary", "rotary (2-D)"

_MANY_AXES = re.compile(r"vision|image|pixel|patch|2d|multidim|axial|video|vjepa|vit(?![a-z])", re.IGNORECASE)


class Rotation(NamedTuple):
    """How a layer rotates queries and keys, kept without the frequencies' values where a buffer has them.

    Attributes:
        kind: ``"rotary"``, ``"rotary (2-D)"`` (by coordinates in an image or a video), or None where the
            layer does not rotate.
        fit: what the rotary function does with what it is given.
        start: where that begins in a head.
        is_known: whether that could be found out.
    """

    kind: str | None
    fit: Fit | None = None
    start: int = 0
    is_known: bool = True

    def read(self) -> Rotary | None:
        """The rotation as it is now.

        None where the layer does not rotate, or in no way that one position in a sequence tells: by
        coordinates in an image, say, or the layer's input in the place of its queries and keys.
        """
        fit = self.fit
        if fit is None:
            return None
        holder = None if fit.holder is None else fit.holder()
        buffer = None if holder is None else getattr(holder, fit.buffer, None)
        # Some models exchange the buffer as sequences grow.
        if isinstance(buffer, Tensor) and buffer.shape == fit.inv_freq.shape:
            inv_freq = -buffer if fit.backward else buffer
        else:
            inv_freq = fit.inv_freq
        return Rotary(inv_freq, fit.interleaved, self.start + fit.start, fit.scale)


NO_ROTATION = Rotation(None)


def find_rotation(layer: AttentionLayer, d_head: int, *, heads: int = 1) -> Rotation:
    """Find how a layer rotates its queries and keys with position.

    Args:
        layer: in its model.
        d_head: width of a head.
        heads: where fewer of a token's heads are rotated, no one rotation is that of the layer.
    """
    run = RotaryRun(layer, tokens_for(d_head))
    if not run.functions:
        # A rotary module of its own may turn queries and keys itself.
        holds = any(holds_angles(name, child) for name, child in layer.module.named_children())
        return Rotation(None, is_known=False) if holds else NO_ROTATION
    try:
        return _find(run, d_head, heads)
    except Exception:  # a forward of any kind may raise anything
        return Rotation(None, is_known=False)


def _find(layer: RotaryRun, d_head: int, heads: int) -> Rotation:
    many_axes = unread = None
    for source in layer.angle_sources():
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


def _blind_call(layer: RotaryRun, *, is_given: bool) -> Call | None:
    """Run a layer on unknown angles.

    Where no module around it could make any, it may be given none at all.
    """
    if not is_given:
        with suppress(Exception):  # it may need some
            return layer.call(1, None)
    return layer.call(1, Angles())


def _kind_by_name(layer: RotaryRun, holder: nn.Module | None) -> str:
    names = [*layer.functions, type(layer.module).__name__, type(holder).__name__]
    if holder is not None:
        names += inspect.signature(type(holder).forward).parameters
        # A table of all places in a grid, where one coordinate has one row of frequencies.
        if any(buffer.dim() > 1 for name, buffer in holder.named_buffers() if name.endswith("inv_freq")):
            return ROTARY_2D
    # A text model may be named for the images that it comes with.
    many = any(_MANY_AXES.search(name) and "text" not in name.lower() for name in names)
    return ROTARY_2D if many else ROTARY


ALIBI, RELATIVE_BIAS, RELATIVE_PRODUCT, NONE = "alibi", "relative bias", "relative product", "none"

ADDED_TO_LOGITS = frozenset({ALIBI, RELATIVE_BIAS, RELATIVE_PRODUCT})
"""Positions that are added to ``q · k`` in the logits: of those, query and key weights are the content part."""

# What layers have whose logits contain products with embeddings of relative positions: Transformer-XL's u and v
# or their projections, Shaw's table, decomposed ones of images, DeBERTa's kinds of attention.
_PRODUCT = re.compile(
    r"pos_bias_[uv]|bias_[uv]|r_[rws]_bias|relative_k_proj|rel_pos_(h|w|emb)|emb_rel_k|distance_embedding"
    r"|rel_logits_proj|relative_pos_embeddings|relative_position_embedding|pos_att_type"
)
# What layers have that add a number for each relative position.
_BIAS = re.compile(
    r"(global_)?relative_attention_bias|relative_position_bias(_table)?|attention_biases"
    r"|continuous_position_bias_mlp|rel_attn_embed|gru_rel_pos_\w+|rpb|has_(relative_attention|spatial_attention)_bias"
)
# Switches that turn the former off where they are False.
_SWITCHES = {"relative_attention", "use_rel_pos", "use_relative_position_embeddings"}
# By what children the modules around a layer make one bias for all their layers.
_SHARED_BIAS = re.compile(r"(\w+_)?(relative_attention|position)_bias\w*")
# Arguments that bring something for the logits, a mask apart.
_BRINGS_BIAS = re.compile(r"alibi|bias|^rel(ative)?_|^pair|_dists$|^pos_emb$", re.IGNORECASE)


def find_position(layer: AttentionLayer, rotation: Rotation) -> str | None:
    """What positions do to the logits of a layer; see :class:`~lightning_qk.heads.projections.HeadProjections`.

    Args:
        layer: in its model.
        rotation: what :func:`find_rotation` found.
    """
    module, is_cross = layer.module, layer.is_cross
    arguments = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
    brought = {name for name in arguments if _BRINGS_BIAS.search(name)}
    if not is_cross and _adds_alibi(module, layer.config, brought):
        return ALIBI
    if rotation.kind is not None:
        return rotation.kind
    attributes = {**module._modules, **module._parameters, **vars(module)}
    own = {name for name, value in attributes.items() if _is_set(value)}
    is_off = any(getattr(module, name, None) is False for name in _SWITCHES)
    if not is_off and any(_PRODUCT.fullmatch(name) for name in own):
        return RELATIVE_PRODUCT
    if any(_BIAS.fullmatch(name) for name in own):
        return RELATIVE_BIAS
    if is_cross:
        # Relative positions are those of one sequence.
        return NONE if rotation.is_known else None
    if _is_shared(module, layer.ancestors):
        return RELATIVE_BIAS
    if not rotation.is_known or (brought and not _is_declined(module)):
        return None
    return NONE


def _is_set(value: Any) -> bool:
    if isinstance(value, list | tuple | dict | str | bool | nn.ModuleDict | nn.ModuleList):
        return bool(value)
    return value is not None


def _adds_alibi(module: nn.Module, config: Any, brought: set[str]) -> bool:
    """Whether its forward takes ALiBi, by that name or as a bias that its file builds, and the model gives it."""
    forward = inspect.unwrap(type(module).forward)
    is_built = any("alibi" in name for name in getattr(forward, "__globals__", ()))
    return ("alibi" in brought or (is_built and bool(brought))) and getattr(
        config, "alibi", True
    ) is not False


def _is_shared(module: nn.Module, ancestors: Sequence[nn.Module]) -> bool:
    """Whether a module around the layer has a table for all its layers, or its first layer has."""
    for owner in ancestors:
        if any(_SHARED_BIAS.fullmatch(name) and _is_set(child) for name, child in owner._modules.items()):
            return True
    if not hasattr(module, "has_relative_attention_bias"):
        return False
    for owner in ancestors:
        layers = [other for other in owner.modules() if type(other) is type(module) and other is not module]
        if any(_is_set(getattr(other, "relative_attention_bias", None)) for other in layers):
            return True
    return False


def _is_declined(module: nn.Module) -> bool:
    """Whether the layer says itself that positions add nothing to its logits, whatever its forward may take."""
    space = vars(module)
    flags = [
        value for name, value in space.items() if name in _SWITCHES or re.fullmatch(r"has_\w*bias", name)
    ]
    kinds = [value for name, value in space.items() if re.fullmatch(r"position_embeddings?_type", name)]
    return (bool(flags) and not any(flags)) or (bool(kinds) and not any(kinds))
