"""Norms between the projections and the dot product."""

import re
from typing import NamedTuple

from torch import Tensor, nn

from lightning_qk.heads.errors import UnreadLayer
from lightning_qk.heads.norms import Norm, read_norm

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


def fold_qk_norms(module: nn.Module, query: Rows, key: Rows) -> tuple[Rows, Rows, bool]:
    """Fold the gains of a layer's query and key norms into its weights.

    The normalization itself, one positive number a token (and head), stays out, and so does a LayerNorm's
    offset: the dot product of the true q and k is not bilinear.

    Returns:
        The two sides, and whether there is such a norm.

    Raises:
        UnreadLayer: a norm is neither an RMSNorm nor a LayerNorm over heads or over the whole width.
    """
    norms = qk_norms(module)
    if "query" in norms:
        query = _fold(norms["query"], query, "queries")
    if "key" in norms:
        key = _fold(norms["key"], key, "keys")
    return query, key, bool(norms)


def _fold(norm: nn.Module, rows: Rows, what: str) -> Rows:
    heads, d_head = rows.weight.shape[:2]
    # Per head; over all heads at once; one gain for each head, heads before or behind the tokens.
    for shape in ((d_head,), (heads * d_head,), (1, heads, 1, d_head), (1, 1, heads, d_head)):
        found = read_norm(norm, shape)
        if found is not None:
            return _apply(found, rows, full_width=shape == (heads * d_head,))
    raise UnreadLayer(f"the norm of its {what} is a {type(norm).__name__}, which is no RMSNorm or LayerNorm")


def _apply(norm: Norm, rows: Rows, full_width: bool) -> Rows:
    d_head = rows.weight.shape[1]
    gain = norm.gain.reshape(-1, d_head)

    def fold(values: Tensor) -> Tensor:
        values = values.to(gain.dtype)
        if norm.centered:
            values = values - values.mean((0, 1) if full_width else 1, keepdim=True)
        return values * gain.view(*gain.shape, *(1,) * (values.dim() - 2))

    return Rows(fold(rows.weight), None if rows.bias is None else fold(rows.bias))
