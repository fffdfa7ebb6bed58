"""What is read wrong is found, and what is read right is not called wrong, on models of every kind."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "heads"))
import heads_zoo as zoo

from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.verification import Status, verify

Wrong = Callable[[HeadProjections], HeadProjections | None]
KINDS = sorted(zoo.ZOO)
# One of each kind of layout, position and norm.
FEW = (
    "gpt2",
    "bert-cross",
    "llama",
    "qwen3",
    "olmo2",
    "stablelm",
    "deepseek-v3",
    "t5",
    "whisper",
    "gpt-bigcode",
)


def next_head(read: HeadProjections) -> HeadProjections | None:
    """Each head's queries with the weights of the next one."""
    if read.heads == read.kv_heads == 1:
        return None
    bias = None if read.query_bias is None else read.query_bias.roll(1, 0)
    return dataclasses.replace(read, query=read.query.roll(1, 0), query_bias=bias)


def exchanged(read: HeadProjections) -> HeadProjections | None:
    """Keys for queries."""
    if read.query.shape != read.key.shape or not read.self_attention or read.shared:
        return None
    return dataclasses.replace(
        read, query=read.key, key=read.query, query_bias=read.key_bias, key_bias=read.query_bias
    )


def one_row(read: HeadProjections) -> HeadProjections:
    """One row of one head is another's."""
    query = read.query.clone()
    query[0, 0] = query[-1, 1]
    return dataclasses.replace(read, query=query)


def interleaved(read: HeadProjections) -> HeadProjections | None:
    """Rows counted the other way round, as for (d_head, heads) in place of (heads, d_head)."""
    if read.heads == 1:
        return None
    query = read.query.flatten(0, 1).unflatten(0, (read.d_head, read.heads)).transpose(0, 1)
    return dataclasses.replace(read, query=query)


def moved_keys(read: HeadProjections) -> HeadProjections:
    """The coordinates of keys in another order than those of queries."""
    return dataclasses.replace(read, key=read.key.roll(1, 1))


WRONG: tuple[Wrong, ...] = (next_head, exchanged, one_row, interleaved, moved_keys)


def checked(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Status]:
    model = zoo.build(name, dtype)
    found = verify(model, zoo.feed(name, dtype, positions=True))
    return {layer: verdict.status for layer, verdict in found.items()}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_right_is_verified(name: str) -> None:
    assert set(checked(name).values()) == {Status.VERIFIED}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "t5"])
def test_half_precision_is_no_difference(name: str) -> None:
    assert set(checked(name, torch.bfloat16).values()) == {Status.VERIFIED}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("name", FEW)
def test_what_is_read_wrong_differs(name: str, wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LayerReader.read
    spoilt = []

    def read(self: LayerReader) -> HeadProjections:
        own = right(self)
        other = wrong(own)
        if other is not None and self.key_layer is None:
            spoilt.append(self.name)
        return own if other is None else other

    monkeypatch.setattr(LayerReader, "read", read)
    found = checked(name)
    assert {found[layer] for layer in spoilt} <= {Status.DIFFERS}
    assert {status for layer, status in found.items() if layer not in spoilt} <= {Status.VERIFIED}


def test_a_wrong_softmax_scale_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LayerReader.read
    monkeypatch.setattr(
        LayerReader, "read", lambda self: dataclasses.replace(right(self), scaling=2 * right(self).scaling)
    )
    model = zoo.build("llama")
    found = verify(model, zoo.feed("llama"))
    assert all("scaled by" in verdict.reason for verdict in found.values())


class Fused(nn.Module):
    """An attention of a user's own."""

    def __init__(self, width: int, heads: int, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.before = inner or nn.Identity()
        self.fused = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.fused(self.before(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Attention(Fused):
    pass


def test_a_norm_or_a_position_inside_the_layer_is_part_of_its_input() -> None:
    layer = Attention(16, 4, nn.LayerNorm(16))
    found = verify(layer, torch.randn(2, 5, 16))
    assert [(verdict.status, verdict.self_attention) for verdict in found.values()] == [
        (Status.VERIFIED, True)
    ]


def test_queries_and_keys_of_different_tensors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    assert [one.self_attention for one in verify(layer, (x, x, x)).values()] == [True]
    assert [one.self_attention for one in verify(layer, (x, y, y)).values()] == [False]


class Raising(dict):
    """What an argument may be that nobody can look into."""

    def values(self) -> object:
        raise RuntimeError("not to be looked at")


class Picky(Attention):
    def forward(self, x: torch.Tensor, extra: Raising) -> torch.Tensor:
        return super().forward(x)


def test_arguments_that_cannot_be_looked_into_do_not_disturb_the_forward() -> None:
    layer = Picky(16, 4)
    found = verify(layer, (torch.randn(2, 5, 16), Raising()))
    assert {verdict.status for verdict in found.values()} <= {Status.UNCHECKED, Status.VERIFIED}


class LearntAttention(nn.Module):
    """Queries behind a factor that is 1 until it is learnt, under names that are plain projections elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            own(x).unflatten(-1, (4, 4)).transpose(1, 2) for own in (self.q_proj, self.k_proj, self.v_proj)
        )
        return nn.functional.scaled_dot_product_attention(q * self.gain, k, v)


def test_one_call_does_not_take_back_what_a_run_has_refused() -> None:
    found = verify(nn.Sequential(LearntAttention()), torch.randn(2, 5, 16))
    assert found["0"].status is Status.UNCHECKED
    assert "its learnt parameter 'gain'" in found["0"].reason


class LowRank(nn.Module):
    """A projection with an adapter by hand, whose second matrix is zero until it is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.num_heads = 4
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x) + self.up(self.down(x))
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, self.k_proj(x), self.v_proj(x))
        )
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_an_adapter_that_does_nothing_yet_is_not_overlooked() -> None:
    layer = LowRank(16)
    (found,) = verify(layer, torch.randn(2, 5, 16)).values()
    if found.ok:
        nn.init.normal_(layer.up.weight)
        (found,) = verify(layer, torch.randn(2, 5, 16)).values()
    assert found.status in (Status.VERIFIED, Status.UNCHECKED)


class Shifted(LowRank):
    """As well, with something learnt that is added to the queries."""

    def __init__(self, width: int, *, adapter: bool) -> None:
        super().__init__(width)
        self.adapter = adapter
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x) + self.shift
        if self.adapter:
            q = q + self.up(self.down(x))
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, self.k_proj(x), self.v_proj(x))
        )
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_what_is_added_to_queries_is_found_and_what_hides_behind_it_too() -> None:
    (found,) = verify(Shifted(16, adapter=False), torch.randn(2, 5, 16)).values()
    assert found.status is Status.REREAD
    (found,) = verify(Shifted(16, adapter=True), torch.randn(2, 5, 16)).values()
    assert found.status is Status.UNCHECKED
