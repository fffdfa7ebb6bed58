"""Norms between the projections and the dot product."""

import re
from typing import NamedTuple

from torch import Tensor, nn

from lightning_qk.heads.errors import UnreadLayer
from lightning_qk.heads.norms import NormPlan, plan_norm
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


def qk_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The norms that a layer applies to its queries and keys, by side."""
    return {
        side: child
        for side, pattern in _NORM_OF.items()
        for name, child in module.named_children()
        if pattern.match(name) and not isinstance(child, nn.Identity)
    }


def plan_qk_norms(module: nn.Module, sizes: Sizes) -> dict[str, NormPlan]:
    """Find out what the query and key norms of a layer do, by side.

    Raises:
        UnreadLayer: a norm is neither an RMSNorm nor a LayerNorm over heads or over the whole width.
    """
    heads = {"query": sizes.heads, "key": sizes.kv_heads}
    return {side: _plan(norm, heads[side], sizes.d_head, side) for side, norm in qk_norms(module).items()}


def _plan(norm: nn.Module, heads: int, d_head: int, side: str) -> NormPlan:
    # Per head; over all heads at once; one gain for each head, heads before or behind the tokens.
    for shape in ((d_head,), (heads * d_head,), (1, heads, 1, d_head), (1, 1, heads, d_head)):
        found = plan_norm(norm, shape)
        if found is not None:
            return found
    what = "queries" if side == "query" else "keys"
    raise UnreadLayer(f"the norm of its {what} is a {type(norm).__name__}, which is no RMSNorm or LayerNorm")


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
