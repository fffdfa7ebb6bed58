import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lightning_qk.heads.norms import plan_norm

NORMS = {
    "layer": lambda d: nn.LayerNorm(d),
    "layer-no-bias": lambda d: nn.LayerNorm(d, bias=False),
    "layer-plain": lambda d: nn.LayerNorm(d, elementwise_affine=False),
    "rms": lambda d: nn.RMSNorm(d),
    "gemma": lambda d: GemmaRMSNorm(d),
    "llama": lambda d: LlamaRMSNorm(d),
    "t5": lambda d: T5LayerNorm(d),
}


class OwnLayerNorm(nn.Module):
    """LayerNorm under another name and without the library's class."""

    def __init__(self, d):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        return self.shift + self.scale * centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


NORMS["own"] = OwnLayerNorm


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(sorted(NORMS)), width=st.integers(3, 40), seed=st.integers(0, 1000))
def test_gain_offset_and_centering_reproduce_the_norm(kind, width, seed):
    generator = torch.Generator().manual_seed(seed)
    norm = NORMS[kind](width)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(width, generator=generator))
    found = plan_norm(norm, (width,)).read()
    assert found is not None
    x = 20 * torch.randn(5, width, generator=generator)
    y = x - x.mean(-1, keepdim=True) if found.centered else x
    y = found.gain * y / y.square().mean(-1, keepdim=True).sqrt()
    y = y if found.offset is None else y + found.offset
    torch.testing.assert_close(y, norm(x), rtol=2e-4, atol=2e-4)


def test_the_gain_is_differentiable_and_the_module_unharmed():
    norm = GemmaRMSNorm(6)
    norm.register_forward_hook(lambda *_: pytest.fail("the probe ran the hooks"))
    plan_norm(norm, (6,)).read().gain.sum().backward()
    torch.testing.assert_close(norm.weight.grad, torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gains_are_read_exactly(dtype):
    for norm in (LlamaRMSNorm(8), nn.LayerNorm(8)):
        norm = norm.to(dtype)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-2, 3, 8))
        found = plan_norm(norm, (8,)).read()
        assert found.gain.dtype == torch.float32
        torch.testing.assert_close(found.gain, norm.weight.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "module", [nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(7), nn.Softmax(-1), nn.Identity()]
)
def test_what_is_no_such_norm_is_refused(module):
    assert plan_norm(module.eval(), (6,)) is None


class Squared(nn.Module):
    """A gain that is no parameter plus a number, and looks like one while all are 1."""

    def __init__(self, width: int, power: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight**self.power * x / x.square().mean(-1, keepdim=True).sqrt()


def counted(plan) -> int:
    """Runs of the norm in one reading."""
    calls = []
    kind = type(plan.module)
    forward = kind.forward
    kind.forward = lambda self, x: calls.append(1) or forward(self, x)
    try:
        plan.read()
    finally:
        kind.forward = forward
    return len(calls)


@pytest.mark.parametrize(
    ("norm", "runs"),
    [(LlamaRMSNorm(6), 0), (GemmaRMSNorm(6), 0), (T5LayerNorm(6), 0), (Squared(6, 1), 0), (Squared(6, 2), 2)],
    ids=lambda one: type(one).__name__,
)
def test_a_gain_is_taken_as_stored_where_it_is_the_parameter(norm, runs):
    plan = plan_norm(norm, (6,))
    assert counted(plan) == runs
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(5, 6, dtype=torch.float64)
    want = norm.double()(x)
    gain = plan.read().gain
    torch.testing.assert_close(
        (gain * x / x.square().mean(-1, keepdim=True).sqrt()).to(want), want, rtol=1e-4, atol=1e-4
    )
