"""Full-precision arithmetic whatever the caller's autocast and matmul settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precisions are raised to float32; float32 and float64 stay as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


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
