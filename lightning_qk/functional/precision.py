"""Full-precision arithmetic whatever the caller's autocast and matmul settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Fourth powers of these, and sums of them, keep all their digits in float32.
_SAFE = 1e-8, 1e8
_READABLE = ("cpu",)


def is_readable(tensor: Tensor) -> bool:
    """Whether a look at values costs nothing: those of an accelerator are waited for."""
    return tensor.device.type in _READABLE


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precisions are raised to float32; float32 and float64 stay as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def norms(vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Euclidean norms along the last axis, none of whose squares leaves the range of the type.

    Args:
        vectors: shape ``(..., d)``, floating.
        dtype: of the result; None for float32, or float64 for float64 vectors.

    Returns:
        Shape ``(...)``.
    """
    if dtype is None:
        dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    if vectors.dtype != torch.float64 and is_readable(vectors):
        plain = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32)
        if are_safe(plain):
            return plain.to(dtype)
    if vectors.dtype != torch.float64 and vectors.device.type != "mps":
        return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64).to(dtype)
    if vectors.shape[-1] == 0:
        return torch.zeros(vectors.shape[:-1], dtype=dtype, device=vectors.device)
    unit, size = scaled(vectors, -1)
    return (torch.linalg.vector_norm(unit, dim=-1, dtype=dtype) * size[..., 0]).to(dtype)


def are_safe(lengths: Tensor) -> bool:
    """Whether no square of vectors of these norms leaves the range of float32; False where looking would wait."""
    return is_readable(lengths) and bool(((lengths >= _SAFE[0]) & (lengths <= _SAFE[1])).all())


def scaled(tensor: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A tensor over a power of two near its largest modulus along some axes, which keeps its digits, and it.


    The power has the reduced axes with size 1. It is 1 where all is zero, and where something is not finite, which
    stays so.
    """
    largest = tensor.detach().abs().amax(dim, keepdim=True)
    has_size = (largest > 0) & largest.isfinite()
    least = -1022 if tensor.dtype == torch.float64 else -126
    exponent = (torch.frexp(torch.where(has_size, largest, 1.0)).exponent - 1).clamp_min(least)
    size = torch.ldexp(torch.ones_like(largest), exponent)
    return tensor / size, size


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast off, and reduced-precision float32 matmuls (TF32, bf16), until the block ends.

    Under ``bf16-mixed`` a penalty in the loss would otherwise be computed in bfloat16, and with
    ``torch.set_float32_matmul_precision("high")``, which Lightning recommends on recent GPUs, products
    would carry ten bits.
    """
    with torch.autocast(device.type, enabled=False), _ieee_matmul(device):
        yield


@contextmanager
def _ieee_matmul(device: torch.device) -> Iterator[None]:
    matmul: Any = getattr(
        torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn, "matmul", None
    )
    if not hasattr(matmul, "fp32_precision"):  # torch < 2.9 has only the switch for everything
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    # The switch of one backend can be read and restored also where a user mixes torch's old and new
    # settings, which makes torch.get_float32_matmul_precision raise.
    precision = matmul.fp32_precision
    reduced = precision not in ("none", "ieee")
    if reduced:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if reduced:
            matmul.fp32_precision = precision
