"""The affine map that a projection module really applies."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_qk.heads.classes import is_named
from lightning_qk.heads.errors import UnreadLayer, alive
from lightning_qk.heads.sharding import check_access, is_dtensor, whole, whole_module


class Affine(NamedTuple):
    """``x -> weight @ x + bias``.

    Attributes:
        weight: shape ``(out, in)``, a view of the live parameter.
        bias: shape ``(out,)``, or None.
    """

    weight: Tensor
    bias: Tensor | None


class AffinePlan:
    """How one projection is read; made once, since telling how a weight is stored can take a run of the module.

    The module is referred to weakly, and its weight and bias are taken anew by every :meth:`read`.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self._module = weakref.ref(module)
        self.transposed = False
        weight, bias = self._live(module)
        self.transposed = _transposed(module, weight, bias, name)
        rows, columns = weight.shape[::-1] if self.transposed else weight.shape
        self.rows: int = rows
        self.columns: int = columns

    @property
    def module(self) -> nn.Module:
        """The projection."""
        return alive(self._module)

    def read(self) -> Affine:
        """The map as it is now, whole and differentiable; collective where the weight is sharded."""
        weight, bias = self._live(self.module)
        weight = whole(weight)
        return Affine(weight.T if self.transposed else weight, None if bias is None else whole(bias))

    def plain_weight(self) -> nn.Parameter | None:
        """The parameter itself, where it is stored whole and :meth:`read` gives it as it is."""
        weight = self.module._parameters.get("weight")
        return None if weight is None or is_dtensor(weight) else weight

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight depends on: itself, or what a parametrization makes it from."""
        return [
            parameter
            for name, parameter in self.module.named_parameters()
            if name != "bias" and not name.startswith("parametrizations.bias.")
        ]

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return any(is_dtensor(parameter) for parameter in self.module.parameters())

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, seen as (out, in)."""
        return weight.T if self.transposed else weight

    def _live(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        name, kind = self.name, type(module).__name__
        held = [child for child, _ in module.named_children() if child != "parametrizations"]
        if held:
            raise UnreadLayer(
                f"its projection {name!r} is a {kind} that wraps {', '.join(held)}, not a plain linear map"
            )
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            check_access(weight, f"its projection {name!r}")
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() == 0:
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
            raise UnreadLayer(
                f"its projection {name!r} is a {kind} whose weight has shape {shape}, not (out, in)"
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UnreadLayer(f"its projection {name!r} is a {kind} with a quantized weight ({weight.dtype})")
        if type(weight) not in (Tensor, nn.Parameter) and not is_dtensor(weight):
            raise UnreadLayer(
                f"the weight of its projection {name!r} is a {type(weight).__name__}, not a plain tensor"
            )
        return weight, getattr(module, "bias", None)


def read_affine(module: nn.Module, name: str) -> Affine:
    """Read the weight and bias of a projection.

    Accepts ``nn.Linear``, transformers' ``Conv1D`` (whose weight is stored as (in, out)) and any other single
    module that multiplies by its own 2-D ``weight``. Parametrizations of ``torch.nn.utils.parametrize`` are
    applied and DTensors gathered. Wrappers such as adapters, and quantized weights, are refused: their
    ``weight`` is not the map that they apply.

    Args:
        module: the projection.
        name: its name, for the message.

    Raises:
        UnreadLayer: the module does not apply a plain floating point weight.
    """
    return AffinePlan(module, name).read()


def _transposed(module: nn.Module, weight: Tensor, bias: Tensor | None, name: str) -> bool:
    """Whether the weight is stored as (in, out)."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return False
    if is_named(module, "Conv1D") and not parametrize.is_parametrized(module):
        return True
    # A class of the model's own: see what it does to one vector. Both directions are tried, since a square
    # weight does not tell.
    with torch.no_grad():
        module, weight, bias = whole_module(module), whole(weight), None if bias is None else whole(bias)
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
