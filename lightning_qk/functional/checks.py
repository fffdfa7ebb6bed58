"""Checks of arguments; errors are one sentence: what was expected, what was given, how to correct it."""

import math
import operator
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class KindError(TypeError, ValueError):
    """An argument of the wrong kind: a TypeError that code which expects ValueError catches too."""


def dense(value: Any, name: str) -> Tensor:
    """Raises unless a tensor is dense and holds values; returns it.

    Raises:
        KindError: no tensor, or one that is sparse, nested or on the meta device.
    """
    if not isinstance(value, Tensor):
        raise KindError(
            f"expected {name} to be a tensor, got {_kind(value)}: convert it with torch.as_tensor"
        )
    if value.is_nested:
        raise KindError(
            f"expected {name} to be one dense tensor, got a nested one: pad it with torch.nested.to_padded_tensor"
        )
    if value.layout != torch.strided:
        raise KindError(
            f"expected {name} to be a dense tensor, got layout {value.layout}: call .to_dense() on it"
        )
    if value.device.type == "meta":
        raise KindError(
            f"expected {name} to hold values, got a tensor on the meta device: load it to a device first"
        )
    return value


def floating(value: Any, name: str) -> Tensor:
    """Raises unless a tensor is dense, of float16, bfloat16, float32 or float64; returns it.

    Eight-bit floats are refused: their values have to be multiplied by a scale that is stored elsewhere.

    Raises:
        KindError: as :func:`dense`, or another dtype.
    """
    tensor = dense(value, name)
    if tensor.dtype not in _FLOATS:
        how = "multiply it by its scale and convert it" if tensor.is_floating_point() else "convert it"
        raise KindError(
            f"expected floating {name} (float16, bfloat16, float32 or float64), got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}: {how} with .float()"
        )
    return tensor


def flags(value: Any, name: str) -> Tensor:
    """Raises unless a tensor is dense, boolean or of 0 and 1 (checked on the CPU); returns it.

    Raises:
        KindError: as :func:`dense`, or a complex or eight-bit floating dtype.
        ValueError: other numbers, such as those of an additive mask, which means the opposite.
    """
    tensor = dense(value, name)
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
        raise KindError(
            f"expected {name} to be boolean or 0 and 1, got {tensor.dtype}: convert it with .bool()"
        )
    known = tensor.dtype == torch.bool or tensor.device.type != "cpu"
    if not known and not bool(((tensor == 0) | (tensor == 1)).all()):
        raise ValueError(
            f"expected {name} to be boolean or 0 and 1, got other numbers of {tensor.dtype}: of an additive "
            "mask pass mask == 0"
        )
    return tensor


def one_device(**tensors: Tensor | None) -> None:
    """Raises unless all tensors are on one device.

    Raises:
        ValueError: there are several.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if len(set(devices.values())) > 1:
        said = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected tensors on one device, got {said}: move them with .to(device)")


def integer(value: Any, name: str) -> int:
    """Converts to a Python integer; raises for bool and anything else.

    Raises:
        KindError: something else.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise KindError(f"expected {name} to be an integer, got {_kind(value)}: pass a whole number such as 1")


def number(value: Any, name: str) -> float:
    """Converts a number, or a tensor of one element without gradient, to a finite float.

    Raises:
        KindError: something else, a bool among it.
        ValueError: NaN or infinite.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool or value.requires_grad:
            raise KindError(
                f"expected {name} to be a number, got a tensor of {value.dtype} and shape {tuple(value.shape)}"
                f"{' that requires a gradient' if value.requires_grad else ''}: pass a float"
            )
        value = dense(value, name).item()
    if isinstance(value, (bool, str, bytes)):
        raise KindError(f"expected {name} to be a number, got {_kind(value)}: pass a float")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise KindError(f"expected {name} to be a number, got {_kind(value)}: pass a float") from None
    except OverflowError:
        raise ValueError(
            f"expected {name} to be in a float's range, got a larger integer: pass a float"
        ) from None
    if not math.isfinite(found):
        raise ValueError(f"expected {name} to be finite, got {found}: pass a finite number")
    return found


def boolean(value: Any, name: str, *, none: bool = False) -> None:
    """Raises unless the value is True or False, or None where ``none`` allows it.

    Raises:
        KindError: something else.
    """
    if not isinstance(value, bool) and not (none and value is None):
        raise KindError(
            f"expected {name} to be True or False{' or None' if none else ''}, got {_kind(value)}: pass one"
        )


def generator_of(value: Any) -> None:
    """Raises unless the value is a generator of random numbers or None.

    Raises:
        KindError: something else.
    """
    if value is not None and not isinstance(value, torch.Generator):
        raise KindError(
            f"expected generator to be a torch.Generator or None, got {_kind(value)}: pass "
            "torch.Generator().manual_seed(0), say"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return repr(value)[:60]
    return type(value).__name__
