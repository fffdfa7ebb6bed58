"""What a normalization layer does, found by running it: gain, offset, and whether it removes the mean."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    """Whether a module looks like a normalization; `read_norm` tells for certain."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or "norm" in type(module).__name__.lower()


def read_norm(norm: nn.Module, shape: tuple[int, ...]) -> Norm | None:
    """Read a norm by running it, whatever its class and however it stores its gain.

    Its forward is called directly, so that hooks on the module do not see the probe. The result is
    differentiable in the norm's parameters.

    Args:
        norm: the module.
        shape: of one input, normalized over its last dimension.

    Returns:
        The norm, or None where the module does not take such an input or is no RMSNorm or LayerNorm.
    """
    if type(norm).forward is nn.LayerNorm.forward and tuple(norm.normalized_shape) == shape[-1:]:  # type: ignore[arg-type]
        # Read as stored: in bfloat16 the probe would round gain and offset together.
        ones = torch.ones(shape, device=_home(norm)[0])
        weight, bias = norm.weight, norm.bias
        gain = ones if weight is None else _wide(weight).expand(shape)  # type: ignore[arg-type]
        return Norm(gain, None if bias is None else _wide(bias).expand(shape), centered=True)  # type: ignore[arg-type]

    device, dtype = _home(norm)
    width = shape[-1]
    index = torch.arange(width, device=device)
    probe = (_AMPLITUDE * (1 - 2 * (index % 2))).to(dtype).expand(shape)
    check = (_AMPLITUDE * (1.5 + torch.cos(index.double()))).to(dtype).expand(shape)
    run = type(norm).forward
    try:
        up, down = run(norm, probe), run(norm, -probe)
        with torch.no_grad():
            seen = run(norm, check)
    except Exception:
        return None
    if not all(isinstance(out, Tensor) and out.shape == probe.shape for out in (up, down, seen)):
        return None
    odd, offset = (_wide(up) - _wide(down)) / 2, (_wide(up) + _wide(down)) / 2
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2
    for centered in (False, True):
        gain = odd / _normalize(_wide(probe), centered)
        with torch.no_grad():
            want = gain * _normalize(_wide(check), centered) + offset
            scale = float(want.abs().max())
            if scale > 0 and float((_wide(seen) - want).abs().max()) <= tolerance * scale:
                return Norm(gain, offset if bool(offset.abs().max() > 0) else None, centered)
    return None


def _home(norm: nn.Module) -> tuple[torch.device, torch.dtype]:
    for tensor in norm.parameters():
        return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _normalize(x: Tensor, centered: bool) -> Tensor:
    if centered:
        x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()
