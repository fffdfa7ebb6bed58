"""Which norm feeds an attention layer, found by running the layer around it with everything replaced."""

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.heads.norms import Norm, NormPlan, is_norm, plan_norm
from lightning_qk.heads.probing import Stop, Through, run_copy
from lightning_qk.heads.qk_norm import Rows

_OF_VALUES = re.compile(r"^(v|value)_?\w*(norm|ln)$", re.IGNORECASE)


class _Target(nn.Module):
    """Stands for the attention: keeps the first tensor that it is given and ends the run."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.reached = next(tensors, None)
        raise Stop


class _Marker(nn.Module):
    """Stands for a norm, or for what is of no interest: gives new tensors by which it is recognized."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.given.append(torch.zeros_like(x))
        return self.given[-1]


def feeding_norm(
    module: nn.Module,
    ancestors: Sequence[nn.Module],
    width: int,
    like: Tensor,
    known: Collection[nn.Module] = (),
) -> NormPlan | None:
    """Find the norm whose output is exactly what the attention layer is given.

    The forward of the module around the layer is run, on a copy whose norms return marked tensors and whose
    attention records what reaches it. Neither the model nor its hooks take part. Pre-norm layers are found in
    this way whatever their names; post-norm layers, where the norm of the previous layer feeds this one, are
    not.

    Args:
        module: the attention layer.
        ancestors: the modules that contain it, nearest first.
        width: d_model.
        like: tells the device and type of the input.
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
    child = module
    # A layer nests its attention at most this deep; what is beyond is the whole network.
    for parent in ancestors[:3]:
        if isinstance(parent, nn.ModuleList | nn.ModuleDict):
            return None
        given = torch.zeros(1, 2, width, device=like.device, dtype=like.dtype)
        reached, markers = _run(parent, child, given)
        if reached is None:
            return None
        for marker, norm in markers.items():
            if any(reached is out for out in marker.given):
                return plan_norm(norm, (width,))
        if reached is not given:
            return None
        child = parent
    return None


def _run(
    parent: nn.Module, child: nn.Module, given: Tensor
) -> tuple[Tensor | None, dict[_Marker, nn.Module]]:
    """Run the parent up to the child; the tensor that reached it, and the norm of each marker."""
    markers: dict[_Marker, nn.Module] = {}
    target = _Target()
    stand_ins: dict[str, nn.Module | None] = dict(parent._modules)
    for name, module in parent.named_children():
        if module is child:
            stand_ins[name] = target
        elif isinstance(module, nn.Identity | nn.Dropout):
            stand_ins[name] = Through()
        else:
            marker = stand_ins[name] = _Marker()
            if is_norm(module):
                markers[marker] = module
    # A module that cannot be run alone proves nothing; what reached the target before that counts.
    with suppress(Exception):
        run_copy(parent, stand_ins, given)
    return target.reached, markers


def fold_input_norm(norm: Norm, rows: Rows) -> Rows:
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
    return Rows(weight, bias)
