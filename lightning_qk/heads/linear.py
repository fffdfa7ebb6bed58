"""The affine map that a projection module really applies."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_qk.heads.errors import UnreadLayer


class Affine(NamedTuple):
    """``x -> weight @ x + bias``.

    Attributes:
        weight: shape ``(out, in)``, a view of the live parameter.
        bias: shape ``(out,)``, or None.
    """

    weight: Tensor
    bias: Tensor | None


def read_affine(module: nn.Module, name: str) -> Affine:
    """Read the weight and bias of a projection.

    Accepts ``nn.Linear``, transformers' ``Conv1D`` (whose weight is stored as (in, out)) and any other single
    module that multiplies by its own 2-D ``weight``. Parametrizations of ``torch.nn.utils.parametrize`` are
    applied. Wrappers such as adapters, and quantized or sharded weights, are refused: their ``weight`` is not
    the map that they apply.

    Args:
        module: the projection.
        name: its name, for the message.

    Raises:
        UnreadLayer: the module does not apply a plain floating point weight.
    """
    kind = type(module).__name__
    held = [child for child, _ in module.named_children() if child != "parametrizations"]
    if held:
        raise UnreadLayer(
            f"its projection {name!r} is a {kind} that wraps {', '.join(held)}, not a plain linear map"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() == 0:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise UnreadLayer(
            f"its projection {name!r} is a {kind} whose weight has shape {shape}, not (out, in)"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise UnreadLayer(f"its projection {name!r} is a {kind} with a quantized weight ({weight.dtype})")
    if type(weight) not in (Tensor, nn.Parameter):
        raise UnreadLayer(
            f"the weight of its projection {name!r} is a {type(weight).__name__}, not a plain tensor"
        )
    if weight.is_meta:
        raise UnreadLayer(
            f"the weight of its projection {name!r} is on the meta device: load the weights first"
        )
    bias = getattr(module, "bias", None)
    if _transposed(module, weight, bias, name):
        weight = weight.T
    return Affine(weight, bias)


def _transposed(module: nn.Module, weight: Tensor, bias: Tensor | None, name: str) -> bool:
    """Whether the weight is stored as (in, out)."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return False
    if type(module).__name__ == "Conv1D" and not parametrize.is_parametrized(module):
        return True
    # A class of the model's own: see what it does to one vector. Both directions are tried, since a square
    # weight does not tell.
    with torch.no_grad():
        for transposed in (False, True):
            matrix = weight.T if transposed else weight
            probe = torch.cos(torch.arange(matrix.shape[1], device=weight.device, dtype=torch.float32)).to(
                weight
            )
            try:
                got = forward(module, probe[None])
            except Exception:
                continue
            want = F.linear(probe[None], matrix, bias)
            if (
                isinstance(got, Tensor)
                and got.shape == want.shape
                and torch.allclose(got, want, rtol=1e-2, atol=1e-3)
            ):
                return transposed
    raise UnreadLayer(
        f"its projection {name!r} is a {type(module).__name__}, which does more than multiply by its weight"
    )
