"""Norms between the projections and the dot product."""

import inspect
import re
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.errors import UnreadLayer
from lightning_qk.heads.norms import NormPlan, plan_norm
from lightning_qk.heads.probing import Stop, run_copy
from lightning_qk.heads.sizes import Sizes

_NORM_OF = {
    "query": re.compile(
        r"^(q(?!k)|query)_?\w*(norm|ln)$|^(layer_?)?(norm|ln)_(q|query)$|^qk_?\w*norm$", re.IGNORECASE
    ),
    "key": re.compile(r"^(k|key)_?\w*(norm|ln)$|^(layer_?)?(norm|ln)_(k|key)$|^qk_?\w*norm$", re.IGNORECASE),
}


class Rows(NamedTuple):
    """Weight ``(heads, d_head, d_in)`` and bias ``(heads, d_head)`` or None of one side of a layer."""

    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "Rows":
        """In another type."""
        return Rows(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def qk_norm(module: nn.Module, side: str, inner: Collection[nn.Module] = ()) -> nn.Module | None:
    """The norm that a layer applies to its queries or keys.

    Args:
        module: the attention layer.
        side: ``"query"`` or ``"key"``.
        inner: norms that are part of the projections.
    """
    found = None
    for name, child in module.named_children():
        if _NORM_OF[side].match(name) and not isinstance(child, nn.Identity) and child not in inner:
            found = child
    return found


def plan_qk_norm(
    module: nn.Module, side: str, sizes: Sizes, inner: Collection[nn.Module] = ()
) -> NormPlan | None:
    """Find out what the norm of a layer's queries or keys does; None where it has none.

    Raises:
        UnreadLayer: it is neither an RMSNorm nor a LayerNorm over heads or over the whole width.
    """
    norm = qk_norm(module, side, inner)
    if norm is None:
        return None
    return plan_norm_of(norm, sizes.heads if side == "query" else sizes.kv_heads, sizes.d_head, side)


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


class _First(nn.Module):
    """Stands for a child: the first of them to be called keeps its input and ends the run."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Any = None

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> None:
        self.given = x
        raise Stop


def is_before_projections(module: nn.Module, plan: NormPlan, width: int) -> bool:
    """Whether a layer's norm that is named for queries or keys acts on the layer's input instead.

    Told by which child the layer's forward calls first, where the norm's width alone does not tell: it is part of
    no projection then.

    Args:
        module: the attention layer.
        plan: the norm of its queries.
        width: of the layer's input.
    """
    if plan.shape != (width,):
        return False
    children = {name: _First() for name, _ in module.named_children()}
    given = torch.zeros(1, 2, width)
    with suppress(Exception):  # `Stop`, or whatever a forward may raise that is given nothing else
        run_copy(module, children, given)
    return any(
        children[name].given is given for name, child in module.named_children() if child is plan.module
    )


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


def fold_qk_norm(plan: NormPlan, rows: Rows) -> Rows:
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

    return Rows(fold(rows.weight), None if rows.bias is None else fold(rows.bias))
