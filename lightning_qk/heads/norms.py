"""What a normalization layer does, found by running it: gain, offset, and whether it removes the mean."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.errors import alive
from lightning_qk.heads.sharding import is_dtensor, whole, whole_module

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
    """Whether a module looks like a normalization; `plan_norm` tells for certain."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or "norm" in type(module).__name__.lower()


class NormPlan:
    """How one norm is read; made once, since telling what a norm does takes runs of it and compares numbers.

    The module is referred to weakly, and its parameters are taken anew by every :meth:`read`, which neither
    compares nor waits for the device.

    Attributes:
        shape: of one input, normalized over its last dimension.
        centered: it removes the mean.
        shifted: it adds an offset.
    """

    def __init__(self, norm: nn.Module, shape: tuple[int, ...], *, centered: bool, shifted: bool) -> None:
        self._norm = weakref.ref(norm)
        self.shape = shape
        self.centered = centered
        self.shifted = shifted

    @property
    def module(self) -> nn.Module:
        """The norm."""
        return alive(self._norm)

    def read(self) -> Norm:
        """Gain and offset as they are now, differentiable; collective where they are sharded."""
        norm = self.module
        if _is_stored(norm, self.shape):
            # Read as stored: in bfloat16 the probe would round gain and offset together.
            weight, bias = (None if value is None else whole(value) for value in (norm.weight, norm.bias))  # type: ignore[arg-type]
            gain = torch.ones(self.shape, device=_home(norm)[0]) if weight is None else _wide(weight)
            return Norm(
                gain.expand(self.shape),
                None if bias is None else _wide(bias).expand(self.shape),
                centered=True,
            )
        up, down, _ = _probe(whole_module(norm), self.shape, check=False)
        odd, offset = (_wide(up) - _wide(down)) / 2, (_wide(up) + _wide(down)) / 2
        return Norm(
            odd / _normalize(_alternating(norm, self.shape), self.centered),
            offset if self.shifted else None,
            self.centered,
        )

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return any(is_dtensor(parameter) for parameter in self.module.parameters())


def plan_norm(norm: nn.Module, shape: tuple[int, ...]) -> NormPlan | None:
    """Find out what a norm does by running it, whatever its class and however it stores its gain.

    Its forward is called directly, so that hooks on the module do not see the probe.

    Args:
        norm: the module.
        shape: of one input, normalized over its last dimension.

    Returns:
        The plan, or None where the module does not take such an input or is no RMSNorm or LayerNorm.
    """
    if _is_stored(norm, shape):
        return NormPlan(norm, shape, centered=True, shifted=norm.bias is not None)
    with torch.no_grad():
        module = whole_module(norm)
        try:
            up, down, seen = _probe(module, shape, check=True)
        except Exception:
            return None
        if not all(isinstance(out, Tensor) and out.shape == shape for out in (up, down, seen)):
            return None
        odd, offset = (_wide(up) - _wide(down)) / 2, (_wide(up) + _wide(down)) / 2
        tolerance = 1e-4 if _home(norm)[1] in (torch.float32, torch.float64) else 3e-2
        for centered in (False, True):
            gain = odd / _normalize(_alternating(norm, shape), centered)
            want = gain * _normalize(_wide(_uneven(norm, shape)), centered) + offset
            scale = float(want.abs().max())
            if scale > 0 and float((_wide(seen) - want).abs().max()) <= tolerance * scale:
                return NormPlan(norm, shape, centered=centered, shifted=bool(offset.abs().max() > 0))
    return None


def _is_stored(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether its gain and offset can be taken as they are stored."""
    return type(norm).forward is nn.LayerNorm.forward and tuple(norm.normalized_shape) == shape[-1:]  # type: ignore[arg-type]


def _probe(norm: nn.Module, shape: tuple[int, ...], *, check: bool) -> tuple[Any, Any, Any]:
    """What a norm makes of alternating signs, of their opposite and, to check, of something uneven."""
    run = type(norm).forward
    alternating = _alternating(norm, shape).to(_home(norm)[1])
    return run(norm, alternating), run(norm, -alternating), run(norm, _uneven(norm, shape)) if check else None


def _alternating(norm: nn.Module, shape: tuple[int, ...]) -> Tensor:
    device, dtype = _home(norm)
    index = torch.arange(shape[-1], device=device)
    return _wide((_AMPLITUDE * (1 - 2 * (index % 2))).to(dtype).expand(shape))


def _uneven(norm: nn.Module, shape: tuple[int, ...]) -> Tensor:
    device, dtype = _home(norm)
    index = torch.arange(shape[-1], device=device)
    return (_AMPLITUDE * (1.5 + torch.cos(index.double()))).to(dtype).expand(shape)


def _home(norm: nn.Module) -> tuple[torch.device, torch.dtype]:
    for tensor in norm.parameters():
        device: torch.device | str = tensor.device_mesh.device_type if is_dtensor(tensor) else tensor.device  # type: ignore[attr-defined]
        return torch.device(device), tensor.dtype
    return torch.device("cpu"), torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _normalize(x: Tensor, centered: bool) -> Tensor:
    if centered:
        x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()
