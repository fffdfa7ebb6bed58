"""Attention as it stands in the jobs of others, of our own writing, each with its query and key map beside it.

Every layer says in ``reference_qk`` by hand, in float64, which matrices its queries and keys are of its input, and
keeps its own probabilities where a list is put into ``kept``. Nothing here asks the package.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Kept(nn.Module):
    """Base of the layers: what the tests ask of them. ``kept`` is None in a job that is watched."""

    kept: list | None = None
    heads: int

    def keep(self, probabilities: Tensor, visible: Tensor | None = None) -> None:
        """One softmax of shape (batch, heads, n, m), and which keys a row sees."""
        if self.kept is not None:
            self.kept.append((probabilities.detach().double(), visible))

    def keep_fused(self, query: Tensor, key: Tensor, visible: Tensor | None = None) -> None:
        """The softmax that a fused call computes, once more."""
        if self.kept is None:
            return
        logits = query.detach().double() @ key.detach().double().mT * query.shape[-1] ** -0.5
        if visible is not None:
            logits = logits.masked_fill(~visible, -torch.inf)
        self.keep(logits.softmax(-1), visible)

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        """Query and key weights (heads, d_head, width), (kv_heads, d_head, width)."""
        raise NotImplementedError


def split_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads · d_head, width), head by head."""
    return weight.detach().double().reshape(heads, -1, weight.shape[-1])


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


class MaskedSoftmax(Kept):
    """Three projections, a mask filled with −inf, a softmax of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, width = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(logits, dim=-1)
        self.keep(weights, mask)
        return self.out((self.drop(weights) @ v).transpose(1, 2).reshape(b, n, width))

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        return split_rows(self.q.weight, self.heads), split_rows(self.k.weight, self.heads)


class MaskedAttention(MaskedSoftmax):
    """The same under a name that says what it is."""


class EinsumAttention(Kept):
    """One projection without bias, three einsums."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.project(x).chunk(3, dim=-1)
        q, k, v = (part.reshape(b, n, self.heads, -1) for part in (q, k, v))
        dots = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
        weights = dots.softmax(dim=-1)
        self.keep(weights)
        return self.merge(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, width))

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        q, k, _ = self.project.weight.chunk(3)
        return split_rows(q, self.heads), split_rows(k, self.heads)


class InterleavedAttention(Kept):
    """A fused projection reshaped to (heads, 3 · d_head) and chunked, as tutorials have it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        qkv = self.qkv_proj(x).reshape(b, n, self.heads, 3 * width // self.heads).permute(0, 2, 1, 3)
        q, k, v = qkv.chunk(3, dim=-1)
        weights = F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1]), dim=-1)
        self.keep(weights)
        return self.o_proj((weights @ v).permute(0, 2, 1, 3).reshape(b, n, width))

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        q, k, _ = split_rows(self.qkv_proj.weight, self.heads).chunk(3, dim=1)
        return q, k


class FullAttention(nn.Module):
    """The product alone, without weights: a child of :class:`ForecastAttention`."""

    def __init__(self, owner: "ForecastAttention") -> None:
        super().__init__()
        self.owner = [owner]  # in a list, so that it is no child
        self.dropout = nn.Dropout(0.0)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Any) -> tuple[Tensor, None]:
        scale = 1.0 / math.sqrt(queries.shape[-1])
        scores = torch.einsum("blhe,bshe->bhls", queries, keys)
        weights = self.dropout(torch.softmax(scale * scores, dim=-1))
        self.owner[0].keep(weights)
        return torch.einsum("bhls,bshd->blhd", weights, values).contiguous(), None


class ForecastAttention(Kept):
    """``forward(queries, keys, values)`` of one tensor, with the product in a child, as forecasting models do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_heads = self.heads = heads
        self.inner_attention = FullAttention(self)
        self.query_projection = nn.Linear(width, width)
        self.key_projection = nn.Linear(width, width)
        self.value_projection = nn.Linear(width, width)
        self.out_projection = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Any = None) -> tuple:
        b, length, _ = queries.shape
        s = keys.shape[1]
        queries = self.query_projection(queries).view(b, length, self.n_heads, -1)
        keys = self.key_projection(keys).view(b, s, self.n_heads, -1)
        values = self.value_projection(values).view(b, s, self.n_heads, -1)
        out, weights = self.inner_attention(queries, keys, values, attn_mask)
        return self.out_projection(out.view(b, length, -1)), weights

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        return (
            split_rows(self.query_projection.weight, self.heads),
            split_rows(self.key_projection.weight, self.heads),
        )


class RelativeAttention(Kept):
    """Conformer: (q + u) kᵀ + shift((q + v) pᵀ); the spectrum is that of the content part, q · k."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.d_head = heads, width // heads
        self.query_proj = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, width)
        self.value_proj = nn.Linear(width, width)
        self.pos_proj = nn.Linear(width, width, bias=False)
        self.u_bias = nn.Parameter(torch.zeros(heads, self.d_head))
        self.v_bias = nn.Parameter(torch.zeros(heads, self.d_head))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        b, n, width = x.shape
        q = self.query_proj(x).view(b, n, self.heads, self.d_head)
        k = self.key_proj(x).view(b, n, self.heads, self.d_head).permute(0, 2, 1, 3)
        v = self.value_proj(x).view(b, n, self.heads, self.d_head).permute(0, 2, 1, 3)
        p = self.pos_proj(positions).view(1, -1, self.heads, self.d_head)
        content = torch.matmul((q + self.u_bias).transpose(1, 2), k.transpose(2, 3))
        position = torch.matmul((q + self.v_bias).transpose(1, 2), p.permute(0, 2, 3, 1))
        score = (content + self.shift(position)) / math.sqrt(self.d_head)
        weights = F.softmax(score, -1)
        self.keep(weights)
        return self.out_proj((weights @ v).transpose(1, 2).reshape(b, n, width))

    def shift(self, score: Tensor) -> Tensor:
        """Column n − 1 + j − i of row i to column j: positions are 2 n − 1."""
        b, heads, n, m = score.shape
        padded = torch.cat([score.new_zeros(b, heads, n, 1), score], dim=-1)
        return padded.view(b, heads, m + 1, n)[:, :, 1:].view_as(score)[..., : m // 2 + 1]

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        return split_rows(self.query_proj.weight, self.heads), split_rows(self.key_proj.weight, self.heads)


class LowRank(nn.Module):
    """A frozen map and what is learnt beside it: W x + s B A x."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.B = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.A.T @ self.B.T) * self.scale

    def whole(self) -> Tensor:
        return self.base.weight.double() + self.scale * self.B.double() @ self.A.double()


class AdaptedAttention(MaskedSoftmax):
    """Adapters of one's own on q and v."""

    def adapt(self) -> None:
        self.requires_grad_(False)
        self.q, self.v = LowRank(self.q), LowRank(self.v)

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        return split_rows(self.q.whole(), self.heads), split_rows(self.k.weight, self.heads)


class MultiHeadedAttention(Kept):
    """Four maps in one list, as the most copied annotated implementation has them."""

    def __init__(self, h: int, d_model: int) -> None:
        super().__init__()
        self.d_k, self.h = d_model // h, h
        self.linears = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(4)])
        self.attn = None
        self.dropout = nn.Dropout(p=0.0)
        self.heads = h

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = mask.unsqueeze(1)
        b = query.size(0)
        query, key, value = (
            layer(x).view(b, -1, self.h, self.d_k).transpose(1, 2)
            for layer, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        self.attn = self.dropout(scores.softmax(dim=-1))
        self.keep(self.attn, None if mask is None else mask != 0)
        x = torch.matmul(self.attn, value).transpose(1, 2).contiguous().view(b, -1, self.h * self.d_k)
        return self.linears[-1](x)

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        return split_rows(self.linears[0].weight, self.h), split_rows(self.linears[1].weight, self.h)


class GroupedAttention(Kept):
    """Fewer heads of keys than of queries; counts on the module, no biases."""

    def __init__(self, dim: int, heads: int, kv_heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, kv_heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.to_q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = (
            layer(x)
            .view(b, n, self.kv_heads, -1)
            .transpose(1, 2)
            .repeat_interleave(self.heads // self.kv_heads, dim=1)
            for layer in (self.to_k, self.to_v)
        )
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * self.dim_head**-0.5
        shown = causal(n)
        sim = sim.masked_fill(~shown, -torch.finfo(sim.dtype).max)
        weights = sim.softmax(dim=-1)
        self.keep(weights, shown)
        return self.to_out(torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).reshape(b, n, -1))

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        return split_rows(self.to_q.weight, self.heads), split_rows(self.to_k.weight, self.kv_heads)


class WindowedAttention(Kept):
    """Windows of a picture in the batch, a bias of relative positions, masks of −100 between shifted windows."""

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        at = torch.stack([y.flatten(), x.flatten()])
        away = at[:, :, None] - at[:, None] + window - 1
        self.register_buffer("index", away[0] * (2 * window - 1) + away[1])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self.bias_table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            attn = attn.view(b // count, count, self.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.heads, n, n)
        attn = attn.softmax(dim=-1)
        # What −100 is added to is hidden.
        self.keep(attn, None if mask is None else (mask == 0).repeat(b // len(mask), 1, 1)[:, None])
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        q, k, _ = self.qkv.weight.chunk(3)
        return split_rows(q, self.heads), split_rows(k, self.heads)


class PatchMixer(Kept):
    """Fused q, k, v, (3, heads, d_head), and torch's own product; nothing in its name says what it is."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = self.heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        self.keep_fused(q, k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        q, k, _ = self.qkv.weight.chunk(3)
        return split_rows(q, self.heads), split_rows(k, self.heads)


class CausalSelfAttention(Kept):
    """One projection for all, split by columns, and torch's causal product; a mask of documents where given."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd, self.heads = n_head, n_embd, n_head

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for part in (q, k, v))
        if allowed is None:
            self.keep_fused(q, k, causal(t))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            self.keep_fused(q, k, allowed)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        q, k, _ = self.c_attn.weight.chunk(3)
        return split_rows(q, self.heads), split_rows(k, self.heads)


class LatentAttention(Kept):
    """Queries of latents, keys and values of a context of any width, or of the latents themselves."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 2, dim_head: int = 8
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        inner, context_dim = heads * dim_head, query_dim if context_dim is None else context_dim
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, query_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.to_q(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.mT * self.scale).softmax(dim=-1)
        self.keep(weights)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))

    def reference_qk(self) -> tuple[Tensor, Tensor]:
        return (
            split_rows(self.to_q.weight, self.heads),
            split_rows(self.to_kv.weight.chunk(2)[0], self.heads),
        )


# Layers of torch and transformers: found from outside.


def of_multihead(module: nn.MultiheadAttention) -> tuple[Tensor, Tensor]:
    q, k, _ = module.in_proj_weight.chunk(3)
    return split_rows(q, module.num_heads), split_rows(k, module.num_heads)


def of_whisper(module: nn.Module) -> tuple[Tensor, Tensor]:
    return (
        split_rows(module.q_proj.weight, module.num_heads),
        split_rows(module.k_proj.weight, module.num_heads),
    )


def dense_softmax(
    query: Tensor, key: Tensor, heads: int, visible: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (batch, heads, n, m) of projected queries and keys, (batch, n, width), in float64."""
    q, k = (part.detach().double().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return logits.softmax(-1), visible


def multihead_keeps(module: nn.MultiheadAttention, kept: list) -> Any:
    """Behind the module, its softmax once more."""

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        query, key = (
            args[index] if len(args) > index else kwargs[("query", "key")[index]] for index in (0, 1)
        )
        wq, wk, _ = module.in_proj_weight.detach().chunk(3)
        bq, bk, _ = module.in_proj_bias.detach().chunk(3)
        kept.append(dense_softmax(F.linear(query, wq, bq), F.linear(key, wk, bk), module.num_heads, None))

    return module.register_forward_hook(keep, with_kwargs=True)


def whisper_keeps(module: nn.Module, kept: list) -> Any:
    """Behind the module, its softmax once more; calls with a cache, of generation, are none of training's."""

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        others = kwargs.get("key_value_states")
        others = states if others is None else others
        with torch.no_grad():
            query, key = module.q_proj(states), module.k_proj(others)
        visible = causal(states.shape[1]) if module.is_causal else None
        kept.append(dense_softmax(query, key, module.num_heads, visible))

    return module.register_forward_hook(keep, with_kwargs=True)
