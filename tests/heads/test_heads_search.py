"""Rows that are found by running a layer, against the entries by name and against forwards of odd layers."""

import math

import pytest
import torch
from heads_zoo import ZOO, build
from torch import nn
from torch.nn import functional as F

from lightning_qk import head_projections, locater_penalty
from lightning_qk.functional import qk_moments
from lightning_qk.heads.inferred_layout import find_rows
from lightning_qk.heads.layer import layer_reader
from lightning_qk.heads.projections import InaccessibleWeights, UnreadLayer
from lightning_qk.heads.reader import unread
from lightning_qk.heads.sites import AttentionLayer, attention_sites

WIDTH, HEADS, D_HEAD = 24, 4, 6


def _forms(query, key, scaling):
    """The bilinear form of every head, d_query x d_key, its scale in it."""
    key = key.repeat_interleave(len(query) // len(key), 0)
    return scaling * torch.einsum("hed,hef->hdf", query, key)


@pytest.mark.parametrize("name", ZOO)
def test_the_entries_name_what_a_run_finds(name):
    model = build(name)
    seen = 0
    for site in attention_sites(model):
        plan = layer_reader(site, fold_norm=False)
        if getattr(plan, "key_layer", None) is not None:
            continue  # the keys come with the call
        found = find_rows(site)
        # As stored: norms on q and k are compared by name below.
        by_name = [side.pick(side.projection.read().weight, plan.sizes) for side in (plan.query, plan.key)]
        by_run = [side.pick(side.projection.read().weight, found.sizes) for side in (found.query, found.key)]
        want = _forms(*by_name, plan.scaling)
        got = _forms(*by_run, found.scaling)
        torch.testing.assert_close(got, want.to(got), rtol=1e-5, atol=1e-7)
        for one, other in ((plan.query.qk_norm, found.query.qk_norm), (plan.key.qk_norm, found.key.qk_norm)):
            assert (None if one is None else one.module) is (None if other is None else other.module)
        seen += 1
    assert seen


class _Base(nn.Module):
    """Attention with names that no entry knows; subclasses say how q and k are made."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.leave = nn.Linear(WIDTH, WIDTH)
        self.calls = []

    def attend(self, q, k, v):
        """(batch, heads, tokens, d_head)"""
        self.calls.append((q.detach(), k.detach()))
        weights = torch.softmax(q @ k.mT / math.sqrt(D_HEAD), -1)
        return self.leave((weights @ v).transpose(1, 2).flatten(2))


class InterleavedAttention(_Base):
    """Features by head, then by q, k, v, in the last place: (d_head, 3)."""

    def forward(self, hidden_states, mask=None):
        rows = self.mix(hidden_states).unflatten(-1, (HEADS, D_HEAD, 3))
        return self.attend(*(part.transpose(1, 2) for part in rows.unbind(-1)))


class BackwardAttention(_Base):
    """[V | K | Q], q scaled beforehand and the rest behind, product as an einsum, a mask and a bias."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.randn(1, HEADS, 1, 1))

    def forward(self, x, mask):
        v, k, q = (part.unflatten(-1, (HEADS, D_HEAD)) for part in self.mix(x).chunk(3, -1))
        self.calls.append((q.detach().transpose(1, 2), k.detach().transpose(1, 2)))
        q = q * D_HEAD**-0.25
        logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * D_HEAD**-0.25 + self.bias
        tokens = x.shape[1]
        logits = logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -1e9)
        return self.leave(torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).flatten(2))


class NestedAttention(_Base):
    """A container of projections, shared keys, fused product of batch and heads, and a norm on q."""

    def __init__(self):
        super().__init__()
        self.inside = nn.ModuleDict(
            {"a": nn.Sequential(nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)), "b": nn.Linear(WIDTH, 2 * D_HEAD)}
        )
        self.sharpen = nn.LayerNorm(D_HEAD)

    def forward(self, hidden_states):
        batch, tokens, _ = hidden_states.shape
        q = self.sharpen(self.inside["a"](hidden_states).unflatten(-1, (HEADS, D_HEAD))).transpose(1, 2)
        k = self.inside["b"](hidden_states).unflatten(-1, (2, D_HEAD)).transpose(1, 2)
        k = k.repeat_interleave(2, 1)
        self.calls.append((q.detach(), k.detach()))
        logits = torch.baddbmm(q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.3)
        weights = F.softmax(logits.view(batch, HEADS, tokens, tokens), dim=-1)
        return self.leave((weights @ k).transpose(1, 2).flatten(2))


def _model(kind):
    torch.manual_seed(3)
    return nn.Sequential(nn.LayerNorm(WIDTH), kind()).double()


@pytest.mark.parametrize("kind", [InterleavedAttention, BackwardAttention])
def test_layers_under_any_name_are_read(kind):
    model = _model(kind)
    (head,) = head_projections(model).values()
    assert head.layout == "found by running"
    assert head.self_attention
    assert not head.qk_norm
    assert head.scaling == pytest.approx(D_HEAD**-0.5)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    model[1](x, None)
    for seen, weight, bias in zip(
        model[1].calls[-1], (head.query, head.key), (head.query_bias, head.key_bias), strict=True
    ):
        torch.testing.assert_close(torch.einsum("bnd,hed->bhne", x, weight) + bias[:, None], seen)


def test_chains_shared_keys_and_norms_are_read():
    model = _model(NestedAttention)
    (head,) = head_projections(model).values()
    assert (head.heads, head.kv_heads, head.d_head) == (HEADS, 2, D_HEAD)
    assert head.qk_norm
    inside = model[1].inside
    product = (inside["a"][1].weight @ inside["a"][0].weight).unflatten(0, (HEADS, D_HEAD))
    want = (product - product.mean(1, keepdim=True)) * model[1].sharpen.weight[:, None]
    torch.testing.assert_close(head.query, want)
    torch.testing.assert_close(head.key, inside["b"].weight.unflatten(0, (2, D_HEAD)))


def test_the_factor_behind_a_product_is_found():
    site = next(iter(attention_sites(_model(NestedAttention))))
    site.module.sharpen = nn.Identity()
    assert find_rows(site).scaling == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("kind", [InterleavedAttention, NestedAttention])
def test_gradients_reach_what_was_found(kind):
    model = _model(kind)
    (head,) = head_projections(model).values()
    want = qk_moments(head.query, head.key)["sym_var"].sum()
    inputs = [p for p in model.parameters() if p.dim() == 2]
    shares = torch.autograd.grad(want, inputs, allow_unused=True)
    penalty = locater_penalty(model)
    torch.testing.assert_close(penalty, want)
    penalty.backward()
    for parameter, share in zip(inputs, shares, strict=True):
        assert (parameter.grad is None) == (share is None)
        if share is not None:
            torch.testing.assert_close(parameter.grad, share)


def test_regular_rows_are_views():
    class FusedAttention(_Base):
        def forward(self, hidden_states):
            k, q, v = self.mix(hidden_states).unflatten(-1, (HEADS, 3, D_HEAD)).transpose(1, 2).unbind(3)
            return self.attend(q, k, v)

    model = _model(FusedAttention)
    (head,) = head_projections(model).values()
    stored = model[1].mix.weight.unflatten(0, (HEADS, 3, D_HEAD))
    assert torch.equal(head.query, stored[:, 1])
    assert torch.equal(head.key, stored[:, 0])
    assert head.query.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


class LinearAttention(_Base):
    def forward(self, hidden_states):
        q, k, v = (part.relu() for part in self.mix(hidden_states).chunk(3, -1))
        return self.leave(q @ (k.mT @ v))


class MixedAttention(_Base):
    def forward(self, hidden_states):
        q, k, v = (
            part.unflatten(-1, (HEADS, D_HEAD)).transpose(1, 2)
            for part in self.mix(hidden_states).chunk(3, -1)
        )
        return self.attend(q + q.roll(1, -1), k, v)


class ShiftedAttention(_Base):
    def forward(self, hidden_states):
        q, k, v = (
            part.unflatten(-1, (HEADS, D_HEAD)).transpose(1, 2)
            for part in self.mix(hidden_states).chunk(3, -1)
        )
        return self.attend(q + 1, k, v)


class BentAttention(_Base):
    def forward(self, hidden_states):
        q, k, v = (
            part.unflatten(-1, (HEADS, D_HEAD)).transpose(1, 2)
            for part in self.mix(hidden_states.tanh()).chunk(3, -1)
        )
        return self.attend(q, k, v)


class WantingAttention(_Base):
    def forward(self, hidden_states, plan):
        return self.leave(hidden_states[plan.order])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LinearAttention, "reaches no softmax of a product"),
        (MixedAttention, "its queries"),
        (ShiftedAttention, "its queries have something added to them behind the projections"),
        (BentAttention, "its projection 'mix' maps something else than the layer's input"),
        (WantingAttention, "AttributeError: 'NoneType' object has no attribute 'order'"),
    ],
)
def test_what_cannot_be_found_is_named(kind, reason):
    model = _model(kind)
    with pytest.raises(UnreadLayer, match=reason):
        find_rows(AttentionLayer("", model[1]))
    (told,) = unread(model).values()
    assert told.startswith(
        f"{kind.__name__} has no known layout of q and k (its children: mix, leave), and running"
    )
    assert reason in told


def test_weights_without_values_are_named():
    with pytest.raises(InaccessibleWeights, match="meta device"):
        find_rows(AttentionLayer("", InterleavedAttention().to("meta")))


def test_a_search_leaves_no_trace():
    model = _model(NestedAttention).train()
    heard = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *args: heard.append(args))
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_rows(AttentionLayer("", model[1]))
    assert torch.equal(state, torch.get_rng_state())
    assert not heard
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_half_precision_layers_are_found():
    model = _model(InterleavedAttention).to(torch.bfloat16)
    found = find_rows(AttentionLayer("", model[1]))
    rows = torch.arange(3 * WIDTH)
    query, key = (side.pick(rows, found.sizes).tolist() for side in (found.query, found.key))
    assert query == [[18 * h + 3 * i for i in range(D_HEAD)] for h in range(HEADS)]
    assert key == [[18 * h + 3 * i + 1 for i in range(D_HEAD)] for h in range(HEADS)]
