"""The penalty against dense symmetric parts, its laws and its errors."""

import models
import pytest
import torch
from oracles import dense_forms
from torch.autograd import gradcheck

from lightning_qk import HeadProjections, head_projections, locater_penalty
from lightning_qk.functional import qk_moments


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
        ({"form": "spread"}, "'variance' or 'target', got 'spread'"),
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
