"""Layers that hold their projections in lists or parameters, and those whose class is not named attention."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_qk import head_projections
from lightning_qk.heads.reader import ProjectionReader, find_attention
from lightning_qk.verification.check import SelfCheck

WIDTH, HEADS = 24, 4


def attention(query, key, value, mask=None, dropout=None):
    """The product of the most copied implementation there is."""
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    weights = scores.softmax(dim=-1)
    if dropout is not None:
        weights = dropout(weights)
    return torch.matmul(weights, value), weights


class Copied(nn.Module):
    """Four projections in a list, attention a free function."""

    def __init__(self, held):
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
        self.linears = (
            nn.ModuleList(layers) if held == "list" else nn.ModuleDict(dict(zip("abcd", layers, strict=True)))
        )
        self.held = held
        self.dropout = nn.Dropout(0.1)
        self.seen = None

    def forward(self, query, key, value, mask=None):
        batch = query.size(0)
        layers = list(self.linears) if self.held == "list" else list(self.linears.values())
        query, key, value = (
            layer(x).view(batch, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer, x in zip(layers, (query, key, value), strict=False)
        )
        self.seen = query.detach(), key.detach()
        x, self.attn = attention(query, key, value, mask=mask, dropout=self.dropout)
        return layers[-1](x.transpose(1, 2).contiguous().view(batch, -1, WIDTH))


class MultiHeadedAttention(Copied):
    pass


class Mixer(Copied):
    """No name says that it is attention."""


class Router(nn.Module):
    """A softmax, and no product of projections."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x):
        weights = F.softmax(self.gate(x), -1)
        return torch.einsum("...e,...ed->...d", weights, self.experts(x).unflatten(-1, (4, WIDTH)))


class Block(nn.Module):
    def __init__(self, kind, held):
        super().__init__()
        self.mix, self.route = kind(held), Router()

    def forward(self, x):
        return self.route(x + self.mix(x, x, x))


@pytest.mark.parametrize("held", ["list", "dict"])
@pytest.mark.parametrize("kind", [MultiHeadedAttention, Mixer])
def test_layers_with_lists_are_found_and_read(kind, held):
    torch.manual_seed(0)
    model = nn.Sequential(Block(kind, held), Block(kind, held)).double()
    assert list(find_attention(model)) == ["0.mix", "1.mix"]
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    model(x)
    for name, heads in head_projections(model).items():
        layer = model.get_submodule(name)
        assert heads.self_attention
        assert heads.scaling == pytest.approx((WIDTH // HEADS) ** -0.5)
    given = {}
    for name, block in enumerate(model):
        block.mix.register_forward_pre_hook(lambda own, args, name=name: given.update({name: args[0]}))
    model(x)
    for name, block in enumerate(model):
        heads = head_projections(model)[f"{name}.mix"]
        for weight, bias, seen in zip(
            (heads.query, heads.key), (heads.query_bias, heads.key_bias), block.mix.seen, strict=True
        ):
            got = torch.einsum("bnd,hed->bhne", given[name], weight) + bias[:, None]
            torch.testing.assert_close(got, seen)
    assert layer is model[1].mix


def seen(model, call):
    """Let a self-check see a call and all readers of the model know what it found."""
    check = SelfCheck(model, ProjectionReader(model, allow_empty=True))
    with torch.no_grad(), check.looking():
        call()
    verdicts = check.conclude()
    check.settle(verdicts)
    return verdicts


def test_a_call_tells_self_from_cross_attention():
    torch.manual_seed(0)
    x, y, z = (torch.randn(9, n, WIDTH, dtype=torch.float64) for n in (5, 7, 5))
    for args, kwargs, is_self in (
        ((x, x, x), {}, True),
        ((x, y, y), {"mask": torch.ones(9, 1, 5, 7)}, False),
        ((x,), {"key": x, "value": x, "mask": torch.ones(9, 1, 5, 5)}, True),
        ((x, z, z), {}, False),
    ):
        model = nn.Sequential(Copied("list")).double()
        model[0].__class__ = MultiHeadedAttention
        plan = ProjectionReader(model).layers["0"]
        assert not plan.is_decided
        assert plan.self_attention
        seen(model, lambda args=args, kwargs=kwargs, model=model: model[0](*args, **kwargs))
        assert head_projections(model)["0"].self_attention is is_self


def test_what_a_call_told_is_kept_when_modules_are_replaced():
    model = nn.ModuleDict({"a": MultiHeadedAttention("list"), "b": nn.Linear(2, 2)})
    reader = ProjectionReader(model)
    assert reader["a"].self_attention
    x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    seen(model, lambda: model["a"](x, y, y))
    model["b"] = nn.Linear(3, 3)
    assert reader.refresh()
    assert not reader["a"].self_attention


class PlannedAttention(nn.Module):
    """Cannot be called without an object that only its model makes."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, plan):
        q, k, v = self.qkv(x[plan["order"]]).unflatten(-1, (HEADS, 3, -1)).transpose(1, 2).unbind(3)
        return (q @ k.mT / 6**0.5).softmax(-1) @ v


def test_a_layer_that_cannot_be_run_alone_is_learnt_from_its_call():
    model = nn.Sequential(PlannedAttention())
    reader = ProjectionReader(model, allow_empty=True)
    assert list(reader.unread) == list(reader.refusals) == ["0"]
    verdicts = seen(model, lambda: model[0](torch.randn(4, 6, WIDTH), {"order": torch.tensor([0, 1])}))
    assert verdicts["0"].ok
    assert reader.refresh()
    assert not reader.unread
    assert torch.equal(reader["0"].query, model[0].qkv.weight.unflatten(0, (HEADS, 3, 6))[:, 0])
