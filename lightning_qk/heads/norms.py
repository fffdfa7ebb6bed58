"""What acts on queries, keys and their input beside projections: norms, found by running them, and factors."""

import inspect
import math
import re
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qk.architecture.dry_run import (
    Stop,
    Through,
    device_of,
    quietly,
    run_alone,
    shadow,
    weight_hooks,
)
from lightning_qk.heads.live_weights import alive, is_dtensor, whole
from lightning_qk.heads.projections import Affine, Sizes, UnreadLayer

# The probe's size: large enough that no norm's epsilon matters, small enough for float16.
_AMPLITUDE = 64.0


class Norm(NamedTuple):
    """``x -> gain * (x - mean?) / rms(x - mean?) + offset`` over the last dimension.

    Attributes:
        gain: in float32 at least, in the shape that the norm was asked about.
        offset: the same shape, or None where the norm has none.
        centered: it removes the mean, as LayerNorm does and RMSNorm does not.
    """

    gain: Tensor
    offset: Tensor | None
    centered: bool


def is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a normalization; `plan_norm` decides."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or "norm" in type(module).__name__.lower()


class NormPlan(NamedTuple):
    """How one norm is read; made once by :func:`plan_norm`, which runs it.

    Attributes:
        norm: the module.
        shape: of one input, normalized over its last dimension.
        centered: it removes the mean.
        shifted: it adds an offset.
        added: the gain is the norm's only parameter plus this number; None where that takes a run.
    """

    norm: "weakref.ref[nn.Module]"
    shape: tuple[int, ...]
    centered: bool
    shifted: bool
    added: float | None = None

    @property
    def module(self) -> nn.Module:
        """The norm."""
        return alive(self.norm)

    def read(self) -> Norm:
        """Gain and offset as they are now, differentiable; collective where they are sharded."""
        norm: Any = self.module
        if _is_stored(norm, self.shape):
            # Read as stored: in bfloat16 a run would round gain and offset together.
            weight, bias = (
                None if value is None else _wide(whole(value)) for value in (norm.weight, norm.bias)
            )
            gain = torch.ones(self.shape, device=device_of(norm)) if weight is None else weight
            offset = None if bias is None else bias.expand(self.shape)
            return Norm(gain.expand(self.shape), offset, centered=True)
        if self.added is not None and (stored := _only_parameter(norm, self.shape)) is not None:
            gain = _wide(whole(stored))
            return Norm((gain + self.added if self.added else gain).expand(self.shape), None, self.centered)
        signs = _signs(norm, self.shape)
        odd, offset = _odd_and_even(shadow(norm, convert=whole), signs)
        gain = odd / _normalize(_wide(signs), self.centered)
        return Norm(gain, offset if self.shifted else None, self.centered)

    def stored_gain(self) -> tuple[nn.Parameter, float] | None:
        """The parameter that the gain is, plus a number, where nothing else is folded in; None elsewhere."""
        if self.added is None or self.centered or self.shifted:
            return None
        own = _only_parameter(self.module, self.shape)
        return None if own is None or is_dtensor(own) else (own, self.added)

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return any(is_dtensor(parameter) for parameter in self.module.parameters())


def plan_norm(norm: nn.Module, shape: tuple[int, ...]) -> NormPlan | None:
    """Find out what a norm does by running it, whatever its class and however it stores its gain.

    Args:
        norm: the module.
        shape: of one input, normalized over its last dimension.

    Returns:
        The plan, or None where the module does not take such an input or is no RMSNorm or LayerNorm.
    """
    if _is_stored(norm, shape):
        return NormPlan(weakref.ref(norm), shape, centered=True, shifted=norm.bias is not None)
    signs = _signs(norm, shape)
    with quietly(norm):
        run = shadow(norm, convert=whole)
        uneven = _AMPLITUDE * (1.5 + torch.cos(torch.arange(shape[-1], device=signs.device).double()))
        uneven = uneven.to(signs.dtype).expand(shape)
        try:
            seen = run(uneven)
            odd, offset = _odd_and_even(run, signs)
        except Exception:
            return None
        if not all(isinstance(out, Tensor) and out.shape == shape for out in (odd, seen)):
            return None
        tolerance = 1e-4 if signs.dtype in (torch.float32, torch.float64) else 3e-2
        for centered in (False, True):
            gain = odd / _normalize(_wide(signs), centered)
            want = gain * _normalize(_wide(uneven), centered) + offset
            scale = float(want.abs().max())
            if scale > 0 and float((_wide(seen) - want).abs().max()) <= tolerance * scale:
                is_shifted = bool(offset.abs().max() > 0)
                added = None if is_shifted else _added_to_stored(norm, shape, centered)
                return NormPlan(weakref.ref(norm), shape, centered=centered, shifted=is_shifted, added=added)
    return None


def _only_parameter(norm: nn.Module, shape: tuple[int, ...]) -> nn.Parameter | None:
    """The one tensor that a norm has, in the shape of a gain; None where it has others, or makes it of others."""
    own = [parameter for parameter in norm._parameters.values() if parameter is not None]
    if len(own) != 1 or norm._buffers or norm._modules or weight_hooks(norm):
        return None
    return own[0] if tuple(own[0].shape) in (shape, shape[-1:]) else None


def _added_to_stored(norm: nn.Module, shape: tuple[int, ...], centered: bool) -> float | None:
    """0 where a norm's gain is its parameter, 1 where it is one more, by a run on other numbers; else None."""
    stored = _only_parameter(norm, shape)
    if stored is None:
        return None
    size = math.prod(stored.shape)
    numbers = (0.25 + torch.arange(size, device=device_of(norm)) / max(size, 1)).view(stored.shape)
    # As stored in half precision, a run would round it and hide what it is.
    run = shadow(norm, convert=lambda own: numbers if own is stored else own)
    signs = _signs(norm, shape).float()
    try:
        gain = _odd_and_even(run, signs)[0] / _normalize(signs, centered)
    except Exception:
        return None
    if gain.shape != shape:
        return None
    return next((added for added in (0.0, 1.0) if torch.allclose(gain, numbers + added, rtol=1e-4)), None)


def _is_stored(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether its gain and offset can be taken as they are stored."""
    return type(norm).forward is nn.LayerNorm.forward and tuple(norm.normalized_shape) == shape[-1:]  # type: ignore[arg-type]


def _signs(norm: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """An input of alternating signs, on the device and in the type of the norm's parameters."""
    dtype = next((own.dtype for own in norm.parameters()), torch.float32)
    index = torch.arange(shape[-1], device=device_of(norm))
    return (_AMPLITUDE * (1 - 2 * (index % 2))).to(dtype).expand(shape)


def _odd_and_even(run: nn.Module, signs: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm makes of signs: the part that changes with them, and the part that does not."""
    up, down = _wide(run(signs)), _wide(run(-signs))
    return (up - down) / 2, (up + down) / 2


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _normalize(x: Tensor, centered: bool) -> Tensor:
    if centered:
        x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()


_NORM_OF = {
    "query": re.compile(
        r"^(q(?!k)|query)_?\w*(norm|ln)$|^(layer_?)?(norm|ln)_(q|query)$|^qk_?\w*norm$", re.IGNORECASE
    ),
    "key": re.compile(r"^(k|key)_?\w*(norm|ln)$|^(layer_?)?(norm|ln)_(k|key)$|^qk_?\w*norm$", re.IGNORECASE),
}


def plan_qk_norm(
    module: nn.Module, side: str, sizes: Sizes, inner: Collection[nn.Module] = ()
) -> NormPlan | None:
    """Find out what the norm of a layer's queries or keys does; None where it has none.

    Args:
        module: the attention layer.
        side: ``"query"`` or ``"key"``.
        sizes: of the layer.
        inner: norms that are part of the projections.

    Raises:
        UnreadLayer: it is neither an RMSNorm nor a LayerNorm over heads or over the whole width.
    """
    named = [child for name, child in module.named_children() if _NORM_OF[side].match(name)]
    norms = [child for child in named if not isinstance(child, nn.Identity) and child not in inner]
    if not norms:
        return None
    return plan_norm_of(norms[-1], sizes.heads if side == "query" else sizes.kv_heads, sizes.d_head, side)


def plan_norm_of(norm: nn.Module, heads: int, d_head: int, side: str) -> NormPlan:
    """Find out what a norm of queries or keys does: over each head, or over the whole width.

    Raises:
        UnreadLayer: it is neither an RMSNorm nor a LayerNorm.
    """
    # Per head; over all heads at once; one gain for each head, heads before or behind the tokens.
    for shape in ((d_head,), (heads * d_head,), (1, heads, 1, d_head), (1, 1, heads, d_head)):
        found = plan_norm(norm, shape)
        if found is not None:
            return found
    what = "queries" if side == "query" else "keys"
    raise UnreadLayer(f"the norm of its {what} is a {type(norm).__name__}, which is no RMSNorm or LayerNorm")


class _Target(nn.Module):
    """Keeps the first tensor that it is given and ends the run."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.reached = next(tensors, None)
        raise Stop


def is_before_projections(module: nn.Module, plan: NormPlan, width: int) -> bool:
    """Whether a layer's norm that is named for queries or keys acts on the layer's input instead.

    It is part of no projection then. Decided by the child that the layer's forward calls first, where the norm's
    width leaves it open.

    Args:
        module: the attention layer.
        plan: the norm of its queries.
        width: of the layer's input.
    """
    if plan.shape != (width,):
        return False
    children = {child: _Target() for child in module.children()}
    given = torch.zeros(1, 2, width)
    with suppress(Exception):  # `Stop`, or whatever a forward may raise that is given nothing else
        run_alone(module, children, given)
    return children[plan.module].reached is given


def is_behind_rotation(module: nn.Module, plan: NormPlan) -> bool:
    """Whether a norm with a gain acts on what the layer has rotated: the gain does not pass through a rotation.

    Seen from the forward's code, in which the rotary function and the norm are named in the order of their first
    use: queries come first.

    Args:
        module: the attention layer.
        plan: the norm of its queries, or of its keys where those have none.
    """
    norm = plan.module
    if not any(True for _ in norm.parameters()):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = () if code is None else code.co_names
    rotations = [place for place, name in enumerate(names) if "rotary" in name]
    own = [place for place, name in enumerate(names) if module._modules.get(name) is norm]
    return bool(rotations and own) and min(own) > min(rotations)


def fold_qk_norm(plan: NormPlan, rows: Affine) -> Affine:
    """Fold the gain of a layer's query or key norm into the weights of that side.

    The normalization itself, one positive number a token (and head), stays out, and so does a LayerNorm's
    offset: the dot product of the true q and k is not bilinear.
    """
    norm = plan.read()
    heads, d_head = rows.weight.shape[:2]
    full_width = plan.shape == (heads * d_head,)
    gain = norm.gain.reshape(-1, d_head)

    def fold(values: Tensor) -> Tensor:
        values = values.to(gain.dtype)
        if norm.centered:
            values = values - values.mean((0, 1) if full_width else 1, keepdim=True)
        return values * gain.view(*gain.shape, *(1,) * (values.dim() - 2))

    return Affine(fold(rows.weight), None if rows.bias is None else fold(rows.bias))


class Factor(NamedTuple):
    """A factor on the coordinates of one side.

    Attributes:
        side: ``"query"`` or ``"key"``.
        parameter: attribute of the layer; it has the factor if this is a parameter of more than one number.
        values: the layer to the factor, which broadcasts to (heads, d_head).
        normalizes: the layer divides each side by its length besides: cosine attention. The softmax scale of
            the normalized form, whose vectors have length ``d_head ** 0.5``, is then ``1 / d_head``, and 1 else.
    """

    side: str
    parameter: str
    values: Callable[[nn.Module], Tensor]
    normalizes: bool = False


def _per_dim(module: nn.Module) -> Tensor:
    scale = getattr(module, "q_scale", getattr(module, "scaling", 1.0))
    return F.softplus(module.per_dim_scale) * scale  # type: ignore[arg-type]


def _per_dim_key(module: nn.Module) -> Tensor:
    return torch.as_tensor(getattr(module, "k_scale", 1.0))


def _base_two(module: nn.Module) -> Tensor:
    scaling: Tensor = module.scaling  # type: ignore[assignment]
    return F.softplus(scaling) * (math.log2(math.e) / math.sqrt(scaling.numel()))


def _temperature(module: nn.Module) -> Tensor:
    scale: Tensor = module.logit_scale  # type: ignore[assignment]
    return scale.clamp(max=math.log(100.0)).exp().flatten()[:, None]


_FACTORS = (
    # Gemma's audio towers and VideoPrism's pooling head.
    Factor("query", "per_dim_scale", _per_dim),
    Factor("key", "per_dim_scale", _per_dim_key),
    # TimesFM.
    Factor("query", "scaling", _base_two),
    # Swin v2: cosine attention with a temperature for each head.
    Factor("query", "logit_scale", _temperature, normalizes=True),
)


def learnt_factors(module: nn.Module) -> dict[str, Factor]:
    """The factors that a layer has, by side."""
    found = {}
    for factor in _FACTORS:
        parameter = module._parameters.get(factor.parameter)
        if parameter is not None and parameter.numel() > 1:
            found[factor.side] = factor
    return found


# Parameters, as many numbers as there are query rows, that are added to the queries of the content's product.
_ADDED = ("q_bias", "r_w_bias", "pos_bias_u", "bias_u")


def added_to_queries(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a layer that are added to its queries."""
    return tuple(name for name in _ADDED if module._parameters.get(name) is not None)


_OF_VALUES = re.compile(r"^(v|value)_?\w*(norm|ln)$", re.IGNORECASE)


class _Marker(nn.Module):
    """Replaces a norm, or what is of no interest: gives new tensors by which it is recognized."""

    def __init__(self) -> None:
        super().__init__()
        self.gave: list[Tensor] = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.gave.append(torch.zeros_like(x))
        return self.gave[-1]


def feeding_norm(
    module: nn.Module,
    ancestors: Sequence[nn.Module],
    width: int,
    known: Collection[nn.Module] = (),
) -> NormPlan | None:
    """Find the norm whose output is exactly what the attention layer is given.

    The module around the layer is run alone, with norms that return marked tensors and an attention that records
    what reaches it. Pre-norm layers are found whatever their names; post-norm layers, where the norm of the
    previous layer feeds this one, are not.

    Args:
        module: the attention layer.
        ancestors: the modules that contain it, nearest first.
        width: d_model.
        known: norms of the layer that come behind its projections or are part of them.

    Returns:
        How to read the norm, or None where it could not be proved.
    """
    inner = (
        child
        for name, child in module.named_children()
        if is_norm(child) and not _OF_VALUES.match(name) and child not in known
    )
    if any(True for _ in inner):
        # A norm of the layer's own may come between its input and the projections.
        return None
    like = next(own for own in module.parameters() if own.is_floating_point())
    child = module
    # A layer nests its attention at most this deep; what is beyond is the whole network.
    for parent in ancestors[:3]:
        if isinstance(parent, nn.ModuleList | nn.ModuleDict):
            return None
        given = torch.zeros(1, 2, width, device=like.device, dtype=like.dtype)
        target = _Target()
        stand_ins = {own: _stand_in(own) for own in parent.children()} | {child: target}
        # A module that cannot be run alone proves nothing; what reached the target before that counts.
        with suppress(Exception):
            run_alone(parent, stand_ins, given)
        if target.reached is None:
            return None
        for norm, own in stand_ins.items():
            if isinstance(own, _Marker) and any(target.reached is out for out in own.gave):
                return plan_norm(norm, (width,)) if is_norm(norm) else None
        if target.reached is not given:
            return None
        child = parent
    return None


def _stand_in(module: nn.Module) -> nn.Module:
    return Through() if isinstance(module, nn.Identity | nn.Dropout) else _Marker()


def fold_layer_norm(norm: Norm, rows: Affine) -> Affine:
    """Fold the gain, centering and offset of a norm into the map that it feeds.

    Args:
        norm: over the map's input, shape (d_in,).
        rows: weight (heads, d_head, d_in) and bias (heads, d_head) or None.

    Returns:
        The map of the normalized, unscaled input, in float32 at least.
    """
    weight = rows.weight.to(norm.gain.dtype)
    bias = None if rows.bias is None else rows.bias.to(norm.gain.dtype)
    if norm.offset is not None:
        shift = weight @ norm.offset
        bias = shift if bias is None else bias + shift
    weight = weight * norm.gain
    if norm.centered:
        weight = weight - weight.mean(-1, keepdim=True)
    return Affine(weight, bias)
