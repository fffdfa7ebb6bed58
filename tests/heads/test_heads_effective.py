"""Maps that are found by running a module: against the module itself, and against products made by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_qk.heads.module_projection import projection_of
from lightning_qk.heads.projections import InaccessibleWeights, UnreadLayer


class LowRank(nn.Linear):
    """A linear layer with an adapter of its own, which starts at zero, and dropout."""

    def __init__(self, width, out):
        super().__init__(width, out)
        self.down, self.up = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.zeros(out, 2))

    def forward(self, x):
        added = F.linear(F.linear(F.dropout(x, 0.5, self.training), self.down), self.up)
        return super().forward(x) + added


class Gate(nn.Linear):
    """Affine as long as its gate is zero."""

    def __init__(self, width, out):
        super().__init__(width, out)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return super().forward(x) + self.gate * super().forward(x).square()


class Shift(nn.Module):
    """Mixes neighbouring tokens."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x) + self.inner(x.roll(1, dims=1))


class Noise(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn_like(x[..., :1])


def _chain(dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5), nn.Linear(3, 8, bias=False)).to(dtype)


@pytest.mark.parametrize(
    "make",
    [
        _chain,
        lambda: _chain(torch.float64),
        lambda: LowRank(6, 8),
        lambda: nn.Sequential(nn.Conv1d(6, 8, 1)),
        lambda: nn.Sequential(nn.Conv2d(6, 8, 1, bias=False)),
        lambda: nn.Sequential(nn.Identity(), nn.Linear(6, 6)),
    ],
)
def test_the_map_is_what_the_module_does(make):
    module = make()
    plan = projection_of(module, "q")
    assert plan.as_matrix
    assert not plan.is_view()
    weight, bias = plan.read()
    assert weight.shape == (plan.rows, plan.columns)
    x = torch.randn(1, 5, 6, dtype=weight.dtype)
    module.eval()
    convolutions = [child for child in module.modules() if isinstance(child, nn.Conv1d | nn.Conv2d)]
    if not convolutions:
        want = module(x)
    elif isinstance(convolutions[0], nn.Conv1d):
        want = module(x.mT).mT
    else:
        want = module(x.mT.unflatten(-1, (5, 1)))[..., 0].mT
    torch.testing.assert_close(F.linear(x, weight, bias), want, rtol=1e-5, atol=1e-5)


def test_values_and_gradients_are_live():
    module = _chain(torch.float64)
    plan = projection_of(module, "q")
    with torch.no_grad():
        module[0].weight.mul_(3)
    weight, bias = plan.read()
    torch.testing.assert_close(weight, module[2].weight @ module[0].weight)
    torch.testing.assert_close(bias, module[2].weight @ module[0].bias)
    probe = torch.randn_like(weight)
    (weight * probe).sum().backward()
    torch.testing.assert_close(module[0].weight.grad, module[2].weight.T @ probe)
    torch.testing.assert_close(module[2].weight.grad, probe @ module[0].weight.T)
    assert {id(p) for p in plan.weight_parameters()} == {id(module[0].weight), id(module[2].weight)}


def test_an_adapter_that_starts_at_zero_is_seen():
    module = LowRank(6, 8).double()
    plan = projection_of(module, "q")
    with torch.no_grad():
        module.up.normal_()
    weight, _ = plan.read()
    torch.testing.assert_close(weight, module.weight + module.up @ module.down)


def test_nothing_of_the_module_takes_part_but_its_weights():
    module = _chain()
    calls = []
    for child in module.modules():
        child.register_forward_hook(lambda *args: calls.append(args))
    module.train()
    state = torch.get_rng_state()
    projection_of(module, "q").read()
    assert not calls
    assert all(child.training for child in module.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(parameter.grad is not None for parameter in module.parameters())


def test_wide_inputs_are_run_in_blocks_and_half_precision_is_raised():
    module = nn.Sequential(nn.Linear(2500, 4), nn.Linear(4, 3)).to(torch.bfloat16)
    weight, bias = projection_of(module, "q").read()
    assert weight.dtype == torch.float32
    first, second = (child.weight.float() for child in module)
    torch.testing.assert_close(weight, second @ first)
    torch.testing.assert_close(bias, second @ module[0].bias.float() + module[1].bias.float())


def test_autocast_does_not_round():
    module = _chain()
    plan = projection_of(module, "q")
    want = plan.read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = plan.read()
    assert torch.equal(got.weight, want.weight)
    assert got.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Gate(6, 8), "more than multiply"),
        (Noise(6, 8), "more than multiply"),
        (Shift(6), "not W x .* token by token"),
        (nn.Sequential(nn.Linear(6, 8), nn.GELU()), "not W x"),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), "not W x"),
        (nn.Sequential(nn.Conv1d(6, 8, 3, padding=1)), "not W x"),
        (nn.Sequential(nn.Conv1d(6, 8, 3)), "maps no vector"),
        (nn.Embedding(6, 8), "more than multiply"),
    ],
)
def test_what_is_not_affine_token_by_token_is_refused(module, reason):
    state = torch.get_rng_state()
    with pytest.raises(UnreadLayer, match=f"its projection 'q' is a {type(module).__name__}.*{reason}"):
        projection_of(module, "q")
    assert torch.equal(state, torch.get_rng_state())


def test_weights_without_values_are_named():
    with pytest.raises(InaccessibleWeights, match="meta device"):
        projection_of(nn.Sequential(nn.Linear(6, 8, device="meta"), nn.Linear(8, 8)), "q")


@pytest.mark.parametrize("convolution", [nn.Conv1d(6, 8, 1), nn.Conv2d(6, 8, 1)])
def test_convolutions_over_single_tokens_are_views(convolution):
    plan = projection_of(convolution, "q")
    assert plan.stored is not None
    weight, bias = plan.read()
    assert weight.shape == (8, 6)
    assert weight.data_ptr() == convolution.weight.data_ptr()
    assert bias is convolution.bias
    assert plan.as_rows(convolution.weight).shape == (8, 6)


def test_compiled_projections_are_looked_into():
    module = nn.Linear(6, 8)
    assert projection_of(torch.compile(module, backend="eager"), "q").module is module


def _weight_norm_hook(module):
    return torch.nn.utils.weight_norm(module)


def _spectral_norm_hook(module):
    return torch.nn.utils.spectral_norm(module)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        _weight_norm_hook,
        _spectral_norm_hook,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda module: prune.random_unstructured(module, "weight", 0.5),
    ],
)
def test_weights_made_from_others_are_those_of_evaluation(wrap):
    """Reading in training mode would be a step of spectral norm's power iteration, and hooks leave old weights."""
    module = wrap(nn.Linear(6, 8).double())
    plan = projection_of(module, "q")
    module.train()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    weight, bias = plan.read()
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    weight.square().sum().backward()
    x = torch.randn(3, 6, dtype=torch.float64)
    module.eval()
    torch.testing.assert_close(F.linear(x, weight, bias), module(x))
    assert plan.plain_weight() is None
    wanted = {id(parameter) for parameter in plan.weight_parameters()}
    assert {id(p) for p in module.parameters() if p.grad is not None} <= wanted
    assert any(parameter.grad is not None for parameter in module.parameters())


def test_tied_weights_through_a_parametrization():
    class Symmetric(nn.Module):
        def forward(self, x):
            return (x + x.T) / 2

    module = nn.Linear(6, 6)
    parametrize.register_parametrization(module, "weight", Symmetric())
    weight, _ = projection_of(module, "q").read()
    assert torch.equal(weight, weight.T)


def test_buffers_that_a_forward_counts_in_stay():
    class Counting(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 3), nn.Linear(3, 8))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    module = Counting()
    projection_of(module, "q").read()
    assert module.count == 0


def test_small_weights_are_not_mistaken_for_their_multiples():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = Doubled(6, 8, bias=False)
    with torch.no_grad():
        module.weight.mul_(1e-4)
    weight, bias = projection_of(module, "q").read()
    assert bias is None
    torch.testing.assert_close(weight, 2 * module.weight, rtol=1e-4, atol=1e-9)
