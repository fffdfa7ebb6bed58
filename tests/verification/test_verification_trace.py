"""Attentions are found by what they compute, whatever they are called."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qk.verification.trace import Event, Trace


class Net(nn.Module):
    """Two linear maps and one way to compute with them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.one, self.two))
        if self.kind == "thrown away":
            (q @ k.mT).softmax(-1)
            return q
        probabilities = self.probabilities(x, q, k)
        return probabilities if self.kind == "sdpa" else probabilities + 0

    def probabilities(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """What a model would go on with."""
        if self.kind == "matmul":
            return ((q @ k.transpose(-1, -2)) / 2 + 1).softmax(-1)
        if self.kind == "scaled before":
            return F.softmax((q * 0.25) @ k.mT, dim=-1)
        if self.kind == "einsum":
            return nn.Softmax(-1)(torch.einsum("bhid,bhjd->bhij", q, k) * 0.5)
        if self.kind == "baddbmm":
            flat = torch.zeros(len(x) * 2, x.shape[1], x.shape[1])
            return torch.baddbmm(flat, q.flatten(0, 1), k.flatten(0, 1).mT, beta=1.0, alpha=0.5).softmax(-1)
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, k, is_causal=True)
        if self.kind == "masked in place":
            logits = (q @ k.mT).mul_(0.5)
            logits.masked_fill_(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9)
            return logits.softmax(-1, dtype=torch.float32)
        if self.kind == "linear attention":
            return q @ (k.transpose(-1, -2) @ k)
        if self.kind == "classifier":
            return self.one(x).softmax(-1)
        if self.kind == "router":
            return (self.one(x) @ self.table).softmax(-1)
        raise AssertionError(self.kind)


def events_of(kind: str) -> tuple[list[Event], Net, Tensor]:
    torch.manual_seed(0)
    net, x = Net(kind), torch.randn(3, 6, 8)
    with torch.no_grad(), Trace(net) as trace:
        net(x)
    return trace.events, net, x


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("matmul", 0.5),
        ("scaled before", 1.0),
        ("einsum", 0.5),
        ("baddbmm", 0.5),
        ("sdpa", 0.5),
        ("masked in place", 0.5),
    ],
)
def test_an_attention_is_found_with_its_operands(kind: str, scale: float) -> None:
    (event,), net, x = events_of(kind)
    (product,) = event.products
    assert product.scale == pytest.approx(scale)
    q = net.one(x).unflatten(-1, (2, 4)).transpose(1, 2).detach() * (0.25 if kind == "scaled before" else 1)
    k = net.two(x).unflatten(-1, (2, 4)).transpose(1, 2).detach()
    torch.testing.assert_close(product.query.reshape(q.shape), q)
    torch.testing.assert_close(product.key.reshape(k.shape), k)
    assert event.frames[-1].module is net


@pytest.mark.parametrize("kind", ["linear attention", "classifier", "router", "thrown away"])
def test_what_is_no_softmax_over_keys_is_not_found(kind: str) -> None:
    events, _, _ = events_of(kind)
    assert not events


def test_nothing_is_left_behind_and_a_pause_is_no_part_of_it() -> None:
    net, x = Net("matmul"), torch.randn(1, 4, 8)
    trace = Trace(net)
    with torch.no_grad(), trace:
        with trace.paused():
            net(x)
        assert not trace.events
        net(x)
    assert len(trace.events) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    net(x)
    assert len(trace.events) == 1
