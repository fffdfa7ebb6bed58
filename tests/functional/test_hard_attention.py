"""Hard attention against a dense straight-through form in float64."""

import math

import pytest
import torch
from test_entropy import KV, PADDED, B, D, H, LargestTensor, N, causal

from lightning_qk.functional import hard_attention
from lightning_qk.functional import logits as module

BIAS = torch.randn(1, H, N, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", B * H * N * 2)


def dense(query, key, value, visible, scaling=None, bias=None, softcap=None):
    key, value = (x.repeat_interleave(H // KV, 1) for x in (key, value))
    logits = query @ key.mT * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~visible, -math.inf)
    p = logits.softmax(-1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(p.dtype)
    return (hard + p - p.detach()) @ value


CASES = {
    "all": ({}, torch.ones(N, N, dtype=torch.bool), {}),
    "causal": ({"is_causal": True, "scaling": 2.0}, causal(), {"scaling": 2.0}),
    "padded": ({"mask": PADDED}, PADDED, {}),
    "capped": (
        {"is_causal": True, "bias": BIAS, "softcap": 1.5},
        causal(),
        {"bias": BIAS, "softcap": 1.5},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradient(name):
    given, visible, more = CASES[name]
    generator = torch.Generator().manual_seed(3)
    shapes = ((B, H, N, D), (B, KV, N, D), (B, KV, N, 5))
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]
    if "bias" in given:
        bias = BIAS.clone().requires_grad_()
        given, more = {**given, "bias": bias}, {**more, "bias": bias}
        tensors.append(bias)
    got = hard_attention(*tensors[:3], **given)
    want = dense(*tensors[:3], visible.expand(B, H, N, N), **more)
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), tensors),
        torch.autograd.grad((want * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
        assert other.abs().max() > 1e-3


def test_without_training_there_is_no_graph_and_rows_without_keys_are_zero():
    tensors = [torch.randn(1, 2, 4, 3, requires_grad=True) for _ in range(3)]
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    out = hard_attention(*tensors, mask=mask, training=False)
    assert not out.requires_grad
    assert (out[:, :, 1] == 0).all()
    hard_attention(*tensors, mask=mask).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)
    assert tensors[0].grad[:, :, 1].abs().max() == 0


def test_no_map_in_memory(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1 << 12)
    tensors = [torch.randn(1, 2, 256, 8, requires_grad=True) for _ in range(3)]
    with LargestTensor() as counted:
        hard_attention(*tensors, is_causal=True).sum().backward()
    assert counted.largest <= 1 << 12


def test_values_must_fit():
    query = torch.randn(1, 2, 4, 3)
    with pytest.raises(ValueError, match="value"):
        hard_attention(query, query, query[:, :1])


def test_options_by_place_are_an_old_spelling():
    tensors = [torch.randn(1, 2, 4, 3) for _ in range(3)]
    mask = torch.ones(4, 4).tril().bool()
    with pytest.warns(DeprecationWarning, match="pass mask, scaling of hard_attention by name"):
        old = hard_attention(*tensors, mask, 0.5)
    assert torch.equal(old, hard_attention(*tensors, mask=mask, scaling=0.5))
