"""What is read of an attention layer: its query and key weights, split into heads, or why there are none."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.rotary import Rotary


class Affine(NamedTuple):
    """``x -> weight @ x + bias``, of all rows or with the rows cut into heads.

    Attributes:
        weight: shape ``(out, in)`` or ``(heads, d_head, in)``: a view of the live parameter where it is stored so.
        bias: shape ``(out,)`` or ``(heads, d_head)``, or None.
    """

    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "Affine":
        """In another type."""
        return Affine(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


@dataclass(frozen=True, eq=False)
class HeadProjections:
    """Query and key projections of every head of one attention layer.

    A head computes ``q = query[h] @ x + query_bias[h]`` and ``k = key[g] @ x + key_bias[g]`` with
    ``g = h // (heads // kv_heads)``, and its logits are ``scaling * q · k``. The tensors are differentiable
    views of the live parameters wherever the layout allows.

    Attributes:
        query: shape ``(heads, d_head, d_query)``.
        key: shape ``(kv_heads, d_head, d_key)``; fewer key heads than heads under grouped-query attention.
        query_bias: shape ``(heads, d_head)``, or None.
        key_bias: shape ``(kv_heads, d_head)``, or None.
        scaling: the factor on ``q · k`` before the softmax.
        layout: the name of the weight layout that was read.
        route: how the weights were found: ``"table"``, by a known layout, or ``"inferred"``, by running the layer
            alone; ``", as a matrix"`` is added where a projection (quantized, or with an adapter) stores no
            weight to read and is run as a linear map.
        rotary: how the layer rotates q and k with position, or None where it does not, or not by a position
            in a sequence (images), or some heads only, or where a norm's gain comes behind the rotation.
        position: what positions do to the logits: ``"rotary"``; ``"rotary (2-D)"``, by coordinates in an image
            or a video; ``"alibi"``, ``"relative bias"`` (a number for each relative position, as in T5 and Swin)
            or ``"relative product"`` (products with embeddings of relative positions, as in DeBERTa and
            Transformer-XL), which are added to ``q · k``, so that a spectrum is that of the content part;
            ``"none"``: the logits are ``q · k`` alone. None where it is not known.
        qk_norm: a norm stands between projection and dot product. Its gain is folded into the weights (for
            LayerNorm, the removal of the mean too; its offset is left out); the head is then not bilinear and
            the spectrum is that of the form before normalization. It may stand within the projection too:
            on the latent of low-rank latent attention. The weights are then those of the composition without
            the normalization, and the coordinates that bypass the latent keep their own scale.
        self_attention: queries and keys come from the same tokens. False for cross-attention, where
            eigenvalues mean nothing.
        key_layer: qualified name of the layer whose keys are used instead of own ones, or None. The bilinear form
            then relates the hidden states of two layers of one residual stream: ``key`` acts on those that
            reach that layer.
        shared: how many coordinates, the last ones of each key, all heads have in common: the rotary part of
            latent attention. It bypasses the latent, so that what norms leave out is one factor a token for
            these coordinates and another one for the others.
        norm_folded: the gain of the norm that feeds the layer is part of the weights: asked for with
            ``fold_norm=True``, and found.
        clip: the bound that the layer clamps q and k to between projection and product (``clip_qkv`` of OLMo,
            MPT and DBRX), or None. The spectrum is that of the form without it, which is exact for tokens
            whose q and k stay within the bound.
    """

    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    query_bias: Tensor | None = field(repr=False)
    key_bias: Tensor | None = field(repr=False)
    scaling: float
    layout: str
    route: str = "table"
    rotary: Rotary | None = None
    position: str | None = None
    qk_norm: bool = False
    self_attention: bool = True
    norm_folded: bool = False
    key_layer: str | None = None
    shared: int = 0
    clip: float | None = None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[0]

    @property
    def kv_heads(self) -> int:
        """Number of key heads."""
        return self.key.shape[0]

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.query.shape[1]

    @property
    def width(self) -> tuple[int, int]:
        """d_query and d_key."""
        return self.query.shape[2], self.key.shape[2]


class UnreadLayer(Exception):
    """One attention layer cannot be read; the message is the reason, as a clause that ends a sentence."""


class InaccessibleWeights(UnreadLayer):
    """The layout is known, but this process cannot reach the values; the message says how to mend it."""


class NotTokenAttention(UnreadLayer):
    """Its products run over the tokens: it attends over channels, and its softmax is not taken over tokens."""


class Sizes(NamedTuple):
    """Head counts and width of one layer.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key heads.
        d_head: width of a head.
        shared: how many coordinates, the last ones of a key, all heads have in common.
    """

    heads: int
    kv_heads: int
    d_head: int
    shared: int = 0
