"""The penalty against dense symmetric parts, its laws and its errors."""

import models
import pytest
import torch
import transformers
from oracles import dense_forms
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qk import HeadProjections, head_projections, locater_penalty
from lightning_qk.functional import qk_moments
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.regularizers.locater import LocaterPenalty
from lightning_qk.regularizers.settings import Settings


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to be waited for: a value that is read, or a shape that depends on one."""

    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.waiting, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def qk_normed() -> nn.Module:
    """Norms of queries and keys that are read by running them."""
    config = transformers.Qwen3Config(**models._GROUPED, head_dim=8)
    return models.build(transformers.Qwen3ForCausalLM, config)


def projections(layers: int = 2, **kwargs) -> dict[str, HeadProjections]:
    def one(index: int) -> HeadProjections:
        heads = 4 if index % 2 == 0 else 2  # two shapes, two batches
        query, key = torch.randn(heads, 4, 12, **kwargs) / 3, torch.randn(2, 4, 12, **kwargs) / 3
        return HeadProjections(query + 0.3, key + 0.3, None, None, 0.5, "separate")

    return {f"layers.{index}.attention": one(index) for index in range(layers)}


def dense_penalty(heads: dict, form: str, support: str, target=None, nu: float = 1.0) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for head in heads.values():
        for matrix in dense_forms(head.query, head.key):
            symmetric = (matrix + matrix.T) / 2
            n = matrix.shape[0] if support == "model" else head.d_head
            scale, mean = (symmetric @ symmetric).trace() / n, symmetric.trace() / n
            total += scale - mean**2 if form == "variance" else scale + nu * (mean - target) ** 2
    return total


@pytest.mark.parametrize("support", ["model", "head"])
@pytest.mark.parametrize(("form", "target"), [("variance", None), ("target", 0.2)])
def test_value(form, target, support):
    heads = projections(3)
    got = locater_penalty(heads, form=form, support=support, target=target, nu=2.0)
    want = dense_penalty(heads, form, support, target, nu=2.0)
    assert got.shape == ()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_target_of_each_head():
    heads = projections(2)
    targets = {name: torch.rand(head.heads) for name, head in heads.items()}
    separate = sum(
        locater_penalty(
            {
                name: HeadProjections(
                    head.query[h : h + 1], head.key[[h * 2 // head.heads]], None, None, 1.0, ""
                )
            },
            form="target",
            target=float(targets[name][h]),
        )
        for name, head in heads.items()
        for h in range(head.heads)
    )
    torch.testing.assert_close(locater_penalty(heads, form="target", target=targets), separate)


@pytest.mark.parametrize("form", ["variance", "target"])
def test_gradient(form):
    heads = projections(1, dtype=torch.float64)
    (name, head), *_ = heads.items()

    def penalty(query, key):
        moved = HeadProjections(query, key, None, None, 1.0, "")
        return locater_penalty({name: moved}, form=form, target=0.1 if form == "target" else None)

    leaves = head.query[:2].clone().requires_grad_(), head.key[:1].clone().requires_grad_()
    assert gradcheck(penalty, leaves)


def test_gradient_reaches_the_models_parameters():
    model = models.gpt2()
    locater_penalty(model).backward()
    for block in model.transformer.h:
        gradient = block.attn.c_attn.weight.grad
        assert (gradient[:, :64] != 0).any()
        assert (gradient[:, 64:] == 0).all()  # values are not in it
        assert block.mlp.c_fc.weight.grad is None


@pytest.mark.parametrize("form", ["variance", "target"])
def test_descent_shrinks_the_scale_and_the_target_form_holds_the_mean(form):
    heads = projections(1, dtype=torch.float64)
    (head,) = heads.values()
    query, key = head.query.clone().requires_grad_(), head.key.clone().requires_grad_()
    moved = {"a": HeadProjections(query, key, None, None, 1.0, "")}
    first = qk_moments(query, key, support="head")
    means = {"a": first["eig_mean"].detach()}
    optimizer = torch.optim.SGD([query, key], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        target = {"target": means, "nu": 20.0} if form == "target" else {}
        locater_penalty(moved, form=form, support="head", **target).backward()
        optimizer.step()
    last = qk_moments(query, key, support="head")
    assert (last["sym_var"] < 0.5 * first["sym_var"]).all()
    # Equal eigenvalues and none at all are both without variance: only a target tells them apart.
    kept = (last["eig_mean"] / first["eig_mean"]).mean()
    assert kept > 0.8 if form == "target" else kept < 0.2


def test_modules_are_chosen_by_pattern():
    heads = projections(3)
    first = locater_penalty({name: heads[name] for name in list(heads)[:1]})
    torch.testing.assert_close(locater_penalty(heads, modules="layers.0.*"), first)
    torch.testing.assert_close(
        locater_penalty(heads, modules=["layers.0.*", "layers.1.*"]),
        locater_penalty({name: heads[name] for name in list(heads)[:2]}),
    )
    with pytest.raises(ValueError, match=r"matches none of 3 \(layers\.0\.attention"):
        locater_penalty(heads, modules="decoder.*")


def test_cross_attention_is_left_out_unless_asked():
    model = models.t5()
    cross = [name for name, head in head_projections(model).items() if not head.self_attention]
    assert cross
    without = locater_penalty(model)
    everything = locater_penalty(model, cross_attention=True)
    only = locater_penalty(model, cross_attention=True, modules=cross)
    torch.testing.assert_close(everything, without + only)


def test_bf16_weights_under_autocast():
    model = models.gpt2()
    want = locater_penalty(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(locater_penalty(model), want)
    assert locater_penalty(model.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "spread"}, "'variance', 'target' or 'limit', got 'spread'"),
        ({"form": "target"}, "target mean"),
        ({"target": 1.0}, "no target with form='variance'"),
        ({"support": "all"}, "support to be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        locater_penalty(projections(), **arguments)


def test_no_attention():
    with pytest.raises(ValueError, match="expected a model that contains transformer attention"):
        locater_penalty(torch.nn.Linear(2, 2))


def grouped(dtype=torch.float64) -> dict[str, HeadProjections]:
    """Three layers of one shape, two heads a key."""
    return {
        f"layers.{index}.attention": HeadProjections(
            (torch.randn(4, 3, 8, dtype=dtype) / 2).requires_grad_(),
            (torch.randn(2, 3, 8, dtype=dtype) / 2).requires_grad_(),
            None,
            None,
            1.0,
            "",
        )
        for index in range(3)
    }


@pytest.mark.parametrize("support", ["model", "head"])
@pytest.mark.parametrize(("form", "target"), [("variance", None), ("target", 0.2)])
def test_the_closed_gradient_is_that_of_the_dense_form(form, target, support):
    heads = grouped()
    leaves = [leaf for head in heads.values() for leaf in (head.query, head.key)]
    settings = {"form": form, "support": support, "target": target, "nu": 2.0}
    got = torch.autograd.grad(locater_penalty(heads, **settings), leaves)
    total = torch.zeros((), dtype=torch.float64)
    for head in heads.values():
        for index in range(4):
            matrix = head.query[index].T @ head.key[index // 2]
            symmetric = (matrix + matrix.T) / 2
            n = 8 if support == "model" else 3
            scale, mean = symmetric.square().sum() / n, symmetric.trace() / n
            total = total + scale + (2.0 * (mean - target) ** 2 if form == "target" else -(mean**2))
    want = torch.autograd.grad(total, leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_first_and_second_derivatives():
    torch.manual_seed(1)
    leaves = [leaf for head in grouped().values() for leaf in (head.query[:, :2, :3], head.key[:, :2, :3])]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves[:2]]

    def penalty(query, key):
        return locater_penalty({"a": HeadProjections(query, key, None, None, 1.0, "")})

    assert gradcheck(penalty, leaves)
    assert gradgradcheck(penalty, leaves)


def test_one_product_for_all_layers_of_a_shape():
    """As many products for eight layers as for one, whatever the number of heads."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "mm" in str(func)
            return func(*args, **(kwargs or {}))

    counts = []
    for layers, heads in ((1, 2), (8, 4)):
        config = transformers.GPT2Config(
            n_layer=layers, n_head=heads, n_embd=16, vocab_size=10, n_positions=8
        )
        model = transformers.GPT2Model(config)
        with Products() as products:
            locater_penalty(model).backward()
        counts.append(products.count)
    assert counts[0] == counts[1] == 7


WAYS = ["loss", "callback"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [models.gpt2, models.llama, qk_normed], ids=["gpt2", "llama", "qwen3"])
def test_nothing_in_a_step_waits_for_the_device(make, way):
    model = make()
    names = list(head_projections(model))
    settings = Settings("target", "model", {name: torch.zeros(4) for name in names}, 1.0)
    applied = LocaterPenalty(ProjectionReader(model))
    locater_penalty(model)  # plans

    def step():
        if way == "loss":
            locater_penalty(model, form="target", target=settings.target).backward()
        else:
            applied.refresh()
            applied.add_gradient(settings, 0.1, list(model.parameters()))

    with NoWaiting():
        step()
    # The guard itself works.
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(3).sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [models.gpt2, models.llama, qk_normed], ids=["gpt2", "llama", "qwen3"])
def test_nothing_in_a_step_waits_for_a_gpu(make, way):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = make().cuda()
    applied = LocaterPenalty(ProjectionReader(model))
    locater_penalty(model).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if way == "loss":
            locater_penalty(model).backward()
        else:
            applied.refresh()
            applied.add_gradient(Settings("variance", "model", None, 1.0), 0.1, list(model.parameters()))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.t5, qk_normed])
def test_both_ways_to_apply_it_have_one_gradient(make):
    model = make()
    (2.5 * locater_penalty(model)).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert want
    for start in (None, 0.0):
        for parameter in model.parameters():
            parameter.grad = None if start is None else torch.zeros_like(parameter)
        applied = LocaterPenalty(ProjectionReader(model))
        value, reached = applied.add_gradient(
            Settings("variance", "model", None, 1.0), 2.5, list(model.parameters())
        )
        assert reached
        torch.testing.assert_close(value, locater_penalty(model).detach())
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def _by_loss(model: nn.Module, settings: Settings, weight: float | torch.Tensor) -> dict:
    """Gradients by way of a loss."""
    (weight * locater_penalty(model, form=settings.form, target=settings.target, nu=settings.nu)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=32
    )
    return models.build(transformers.GPTNeoXForCausalLM, config)


MODELS = {
    "gpt2": models.gpt2,
    "grouped": models.llama,
    "double": lambda: models.llama().double(),
    "half": lambda: models.llama().bfloat16(),
    "fused by head": _neox,
}


@pytest.mark.parametrize("weight", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("form", ["variance", "target"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_read_together_have_the_gradients_of_layers_read_alone(name, form, weight):
    model = MODELS[name]()
    reader = ProjectionReader(model)
    targets = {layer: torch.rand(plan.heads) / 10 for layer, plan in reader.layers.items()}
    settings = Settings(form, "model", targets if form == "target" else None, 2.0)
    want = _by_loss(model, settings, weight)
    frozen = next(iter(reader.layers.values())).query.projection.plain_weight()
    wanted = [parameter for parameter in model.parameters() if parameter is not frozen]
    applied = LocaterPenalty(reader)
    stacks, others = applied._stacker.stacks(reader.layers, reader.layers)
    assert [len(stack.names) for stack in stacks] == [len(reader)]
    assert not others
    for parameter in model.parameters():
        parameter.grad = None
    applied.add_gradient(settings, weight, wanted)
    for of, parameter in model.named_parameters():
        if of not in want or parameter is frozen:
            assert parameter.grad is None
            continue
        # In half precision a gradient is rounded once on either way.
        close = 1e-2 if parameter.dtype == torch.bfloat16 else 1e-6
        assert (parameter.grad - want[of]).norm() <= close * want[of].norm()


def test_only_what_may_be_changed_gets_a_gradient():
    model = models.gpt2()
    first, second = (block.attn.c_attn for block in model.transformer.h)
    applied = LocaterPenalty(ProjectionReader(model))
    settings = Settings("variance", "model", None, 1.0)
    # A bias is no part of the spectrum: alone it is not reached, and its weight stays as it is.
    assert not applied.add_gradient(settings, 1.0, [first.bias])[1]
    assert first.weight.grad is None
    assert applied.add_gradient(settings, 1.0, [first.weight])[1]
    assert first.weight.grad is not None
    assert second.weight.grad is None


def test_tied_weights_get_the_gradient_of_both_layers():
    model = models.llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    locater_penalty(model).backward()
    want = first.q_proj.weight.grad.clone()
    model.zero_grad()
    LocaterPenalty(ProjectionReader(model)).add_gradient(
        Settings("variance", "model", None, 1.0), 1.0, list(model.parameters())
    )
    torch.testing.assert_close(first.q_proj.weight.grad, want)


def test_parametrized_weights():
    model = models.llama()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    locater_penalty(model).backward()
    name = "model.layers.0.self_attn.q_proj.parametrizations.weight.original0"
    want = model.get_parameter(name).grad.clone()
    assert want.any()
    model.zero_grad()
    LocaterPenalty(ProjectionReader(model)).add_gradient(
        Settings("variance", "model", None, 1.0), 1.0, list(model.parameters())
    )
    torch.testing.assert_close(model.get_parameter(name).grad, want)


@pytest.mark.parametrize(
    ("given", "arguments", "error", "message"),
    [
        ({}, {}, ValueError, "at least one layer"),
        (3, {}, TypeError, "expected a module or a mapping"),
        (None, {"form": "target", "target": float("nan")}, ValueError, "expected target to be finite"),
        (None, {"form": "target", "target": float("inf")}, ValueError, "expected target to be finite"),
        (None, {"form": "target", "target": "one"}, TypeError, "expected target to be a number"),
        (None, {"form": "target", "target": 1.0, "nu": float("nan")}, ValueError, "expected nu to be finite"),
        (None, {"form": "target", "target": {}}, ValueError, "expected a target of shape .* got none"),
    ],
)
def test_what_would_make_every_gradient_wrong_is_refused(given, arguments, error, message):
    with pytest.raises(error, match=message):
        locater_penalty(projections() if given is None else given, **arguments)


def test_targets_of_another_number_of_heads_are_refused():
    heads = projections()
    target = {name: torch.ones(head.query.shape[0] + 1) for name, head in heads.items()}
    with pytest.raises(ValueError, match="expected a target of shape"):
        locater_penalty(heads, form="target", target=target)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1"])
def test_a_weight_that_is_no_number_leaves_the_gradients_alone(weight):
    model = models.gpt2()
    penalty = LocaterPenalty(ProjectionReader(model))
    with pytest.raises(ValueError, match="expected weight"):
        penalty.add_gradient(Settings("variance", "model", None, 1.0), weight, list(model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_layers_are_penalized_and_get_no_gradient():
    model = models.gpt2().requires_grad_(False)
    penalty = LocaterPenalty(ProjectionReader(model))
    settings = Settings("variance", "model", None, 1.0)
    value, reached = penalty.add_gradient(settings, 0.1, list(model.parameters()))
    assert value > 0
    assert not reached
    assert all(parameter.grad is None for parameter in model.parameters())
