"""Attention layers made by a generator: orders of rows, names, ways to store, to project and to attend.

A layer keeps the q and k that its own product took, (batch, heads, tokens, d_head) in float64: the oracle.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, D_HEAD = 24, 4, 6

NAMES = (
    "qkv",
    "qkv_proj",
    "c_attn",
    "Wqkv",
    "query_key_value",
    "to_qkv",
    "in_proj",
    "mixed_layer",
    "blue",
)
# Axes of the fused rows, the first outermost: t is which of the three, h heads, e coordinates.
AXES = tuple("".join(axes) for axes in itertools.permutations("the"))
# What the three are, in their order.
KINDS = tuple("".join(kinds) for kinds in itertools.permutations("qkv"))
WAYS = ("sdpa", "matmul", "einsum", "baddbmm", "ellipsis", "exponential", "transposed", "loop")
STORES = ("linear", "parameter", "conv1d", "functional", "transposed_parameter")


class Conv1D(nn.Module):
    """A projection whose weight is (in, out)."""

    def __init__(self, rows: int, columns: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows) / columns**0.5)
        self.bias = nn.Parameter(torch.randn(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x W + b"""
        out = x @ self.weight
        return out if self.bias is None else out + self.bias


class Case(NamedTuple):
    """One layer."""

    axes: str = "the"
    kinds: str = "qkv"
    name: str = "qkv"
    way: str = "sdpa"
    store: str = "linear"
    bias: bool = True


def attend(way: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, heads, tokens, d_head) each; keys may have fewer heads."""
    if k.shape[1] != q.shape[1]:
        k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], 1) for side in (k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    if way == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if way == "matmul":
        return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    if way == "einsum":
        return torch.einsum(
            "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * scale).softmax(dim=-1), v
        )
    if way == "ellipsis":
        logits = torch.einsum("... j d, ... i d -> ... i j", k, q) * scale
        return torch.softmax(logits, -1) @ v
    if way == "transposed":
        # Queries on the right, the softmax over the axis before the last.
        return (k @ q.mT * scale).softmax(-2).mT @ v
    if way == "exponential":
        logits = q @ k.mT * scale
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True) @ v
    if way == "loop":
        return torch.stack([F.softmax(a @ b.mT * scale, -1) @ c for a, b, c in zip(*(x.unbind(1) for x in (q, k, v)), strict=True)], 1)
    assert way == "baddbmm"
    batch, heads, tokens, _ = q.shape
    logits = torch.baddbmm(
        q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=scale
    )
    return (logits.softmax(-1) @ v.flatten(0, 1)).view(batch, heads, tokens, -1)


class SweptAttention(nn.Module):
    """A fused projection whose rows lie as a case says."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.num_heads, self.head_dim = HEADS, D_HEAD
        rows = 3 * HEADS * D_HEAD
        store = {
            "linear": lambda: nn.Linear(WIDTH, rows, bias=case.bias),
            "functional": lambda: nn.Linear(WIDTH, rows, bias=case.bias),
            "conv1d": lambda: Conv1D(rows, WIDTH, case.bias),
            "parameter": lambda: nn.Parameter(torch.randn(rows, WIDTH) / WIDTH**0.5),
            "transposed_parameter": lambda: nn.Parameter(torch.randn(WIDTH, rows) / WIDTH**0.5),
        }[case.store]()
        setattr(self, case.name, store)
        if "parameter" in case.store and case.bias:
            self.shift = nn.Parameter(torch.randn(rows))
        self.leave = nn.Linear(HEADS * D_HEAD, WIDTH)
        self.seen: dict[str, Tensor] = {}

    def project(self, x: Tensor) -> Tensor:
        """All rows."""
        held = getattr(self, self.case.name)
        if self.case.store == "functional":
            return F.linear(x, held.weight, held.bias)
        if self.case.store == "parameter":
            return F.linear(x, held, self.shift if self.case.bias else None)
        if self.case.store == "transposed_parameter":
            return x @ held + self.shift if self.case.bias else x @ held
        return held(x)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention."""
        sizes = {"t": 3, "h": HEADS, "e": D_HEAD}
        rows = self.project(x).unflatten(-1, [sizes[axis] for axis in self.case.axes])
        rows = rows.permute(2 + self.case.axes.index("t"), 0, 2 + self.case.axes.index("h"), 1, 2 + self.case.axes.index("e"))
        q, k, v = (rows[self.case.kinds.index(kind)] for kind in "qkv")
        self.seen = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
        return self.leave(attend(self.case.way, q, k, v).transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    """Separate projections under some names, cut into heads in one of two ways."""

    def __init__(self, names: tuple[str, str, str], cut: str, way: str, kv_heads: int, bias: bool, kdim: int = WIDTH) -> None:
        super().__init__()
        self.names, self.cut, self.way, self.kv_heads = names, cut, way, kv_heads
        self.num_heads = HEADS
        for name, heads, columns in zip(names, (HEADS, kv_heads, kv_heads), (WIDTH, kdim, kdim), strict=True):
            setattr(self, name, nn.Linear(columns, heads * D_HEAD, bias=bias))
        self.leave = nn.Linear(HEADS * D_HEAD, WIDTH)
        self.seen: dict[str, Tensor] = {}

    def heads(self, rows: Tensor) -> Tensor:
        """(batch, tokens, rows) to (batch, heads, tokens, d_head)."""
        batch, tokens, size = rows.shape
        if self.cut == "heads last":
            return rows.view(batch, tokens, D_HEAD, size // D_HEAD).permute(0, 3, 1, 2)
        return rows.view(batch, tokens, size // D_HEAD, D_HEAD).transpose(1, 2)

    def run(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Attend to what y and z say."""
        q, k, v = (self.heads(getattr(self, name)(own)) for name, own in zip(self.names, (x, y, z), strict=True))
        self.seen = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
        return self.leave(attend(self.way, q, k, v).transpose(1, 2).flatten(2))


class SeparateSelfAttention(SeparateAttention):
    def forward(self, x: Tensor) -> Tensor:
        """Self-attention."""
        return self.run(x, x, x)


class ThreeInputAttention(SeparateAttention):
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention between any inputs."""
        return self.run(queries, keys, values)


class ContextAttention(SeparateAttention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Self-attention, or cross-attention to a context."""
        context = x if context is None else context
        return self.run(x, context, context)
