"""The penalty of the token-aware spectrum against the dense covariance, and its gradient against autograd."""

import models
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lightning_qk import HeadProjections, TokenMoments, locater_penalty
from lightning_qk.functional.layer_inputs import covariance_root, sample_tokens, token_mean
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.regularizers.locater import LocaterPenalty
from lightning_qk.regularizers.settings import Settings

FORMS = [("variance", None), ("target", 0.2)]


def heads_and_tokens() -> tuple[dict[str, HeadProjections], dict[str, torch.Tensor]]:
    """Layers of two shapes, grouped queries, tokens far from their mean and of several scales."""
    heads, tokens = {}, {}
    for index in range(3):
        count = 4 if index % 2 == 0 else 2
        query, key = (
            (torch.randn(n, 4, 12, dtype=torch.float64) / 3 + 0.2).requires_grad_() for n in (count, 2)
        )
        name = f"layers.{index}.attention"
        heads[name] = HeadProjections(query, key, None, None, 0.5, "separate")
        mixing = torch.randn(12, 12, dtype=torch.float64)
        tokens[name] = torch.randn(9 + index, 12, dtype=torch.float64) @ mixing + 30
    return heads, tokens


def dense_penalty(heads, covariances, form, support, target, nu) -> torch.Tensor:
    """From eigenvalues' power sums of the dense ``s Σ^½ W_QK Σ^½``, float64, by autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for name, head in heads.items():
        values, vectors = torch.linalg.eigh(covariances[name])
        half = vectors * values.clamp_min(0).sqrt() @ vectors.T
        for index in range(head.heads):
            key = head.key[index // (head.heads // head.kv_heads)]
            matrix = head.scaling * half @ head.query[index].T @ key @ half
            symmetric = (matrix + matrix.T) / 2
            n = len(matrix) if support == "model" else head.d_head
            eigenvalues = torch.linalg.eigvalsh(symmetric)
            scale, mean = eigenvalues.square().sum() / n, eigenvalues.sum() / n
            total = total + (scale - mean**2 if form == "variance" else scale + nu * (mean - target) ** 2)
    return total


@pytest.mark.parametrize("support", ["model", "head"])
@pytest.mark.parametrize(("form", "target"), FORMS)
def test_value_and_gradient_are_those_of_the_dense_covariance(form, target, support):
    heads, tokens = heads_and_tokens()
    leaves = [leaf for head in heads.values() for leaf in (head.query, head.key)]
    moments = {name: covariance_root(own) for name, own in tokens.items()}
    got = locater_penalty(heads, form=form, support=support, target=target, nu=2.0, moments=moments)
    covariances = {name: torch.cov(own.T, correction=0) for name, own in tokens.items()}
    want = dense_penalty(heads, covariances, form, support, target, 2.0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * float(other.abs().max()))


def test_is_the_spectrum_that_token_moments_have():
    heads, _ = heads_and_tokens()
    ((name, head), *_) = heads.items()
    hidden = torch.randn(3, 7, 12, dtype=torch.float64) + 1
    query = torch.einsum("bnd,hed->bhne", hidden, head.query) + 3  # a bias changes nothing
    key = torch.einsum("bnd,hed->bhne", hidden, head.key) - 2
    want = TokenMoments.of(query, key).spectrum(head.scaling, n=12)["sym_var"].sum()
    root = covariance_root(hidden[:, 1:].flatten(0, 1))
    torch.testing.assert_close(locater_penalty({name: head}, moments={name: root}), want)


def test_first_and_second_derivatives():
    torch.manual_seed(1)
    leaves = [torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]
    root = torch.randn(5, 3, dtype=torch.float64)

    def penalty(query, key):
        own = {"a": HeadProjections(query, key, None, None, 0.7, "")}
        return locater_penalty(own, moments={"a": root})

    assert gradcheck(penalty, leaves)
    assert gradgradcheck(penalty, leaves)


@pytest.mark.parametrize(("form", "target"), FORMS)
@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.bert])
def test_both_ways_to_apply_it_have_one_gradient(make, form, target):
    model = make()
    reader = ProjectionReader(model)
    # Not as many tokens for each layer.
    moments = {name: torch.randn(8 + index, 32) for index, name in enumerate(reader)}
    (2.5 * locater_penalty(model, form=form, target=target, moments=moments)).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert want
    model.zero_grad()
    value, reached = LocaterPenalty(reader, by_tokens=True).add_gradient(
        Settings(form, "model", target, 1.0, moments), 2.5, list(model.parameters())
    )
    assert reached
    torch.testing.assert_close(
        value, locater_penalty(model, form=form, target=target, moments=moments).detach()
    )
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_autocast_and_half_precision_change_nothing_but_the_weights_own_digits():
    model = models.gpt2()
    moments = {name: torch.randn(6, 32) for name in ProjectionReader(model)}
    want = locater_penalty(model, moments=moments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(locater_penalty(model, moments=moments), want)
    half = locater_penalty(model.bfloat16(), moments=moments)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, want, rtol=0.05, atol=0)


def test_layers_that_have_no_token_aware_spectrum():
    model = models.t5()
    moments = {name: torch.randn(6, 32) for name in ProjectionReader(model)}
    cross = [name for name, head in ProjectionReader(model).items() if not head.self_attention]
    torch.testing.assert_close(
        locater_penalty(model, moments=moments, cross_attention=True), locater_penalty(model, moments=moments)
    )
    with pytest.raises(ValueError, match=r"no token-aware spectrum then: leave moments"):
        locater_penalty(model, modules=cross, moments=moments)


@pytest.mark.parametrize("wrong", [None, torch.ones(4, 31), torch.ones(32)])
def test_moments_that_do_not_fit_are_refused(wrong):
    model = models.gpt2()
    moments = {} if wrong is None else dict.fromkeys(ProjectionReader(model), wrong)
    with pytest.raises(ValueError, match=r"expected moments of shape \(tokens, 32\) for layer 'transformer"):
        locater_penalty(model, moments=moments)


def test_a_root_keeps_its_digits_beside_a_large_mean_and_leaves_out_what_does_not_count():
    torch.manual_seed(0)
    tokens = torch.randn(50, 6) + 1e4
    weight = torch.rand(50)
    weight[:10] = 0
    tokens[:10] = torch.nan
    root = covariance_root(tokens, weight)
    want = torch.cov(tokens[10:].double().T, aweights=weight[10:].double(), correction=0)
    torch.testing.assert_close((root.mT @ root).double(), want, rtol=1e-3, atol=1e-4)
    assert not covariance_root(tokens, torch.zeros(50)).any()
    shares = weight[10:].double() / weight[10:].double().sum()
    torch.testing.assert_close(
        token_mean(tokens, weight).double(), shares @ tokens[10:].double(), rtol=1e-6, atol=0
    )
    assert not token_mean(tokens, torch.zeros(50)).any()


def test_as_many_tokens_as_there_are_take_each_once_and_no_first_one():
    hidden = torch.arange(3 * 5, dtype=torch.float32).reshape(3, 5, 1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    for seed in range(5):
        taken, weight = sample_tokens(hidden, mask, 6, generator=torch.Generator().manual_seed(seed))
        assert taken.flatten().tolist() == [1, 2, 3, 4, 8, 9]
        assert weight.tolist() == [1.0] * 6
    taken, weight = sample_tokens(hidden, mask, 2)
    assert weight.tolist() == [3.0] * 2
    assert taken[0] in (1, 2, 3)
    assert taken[1] in (4, 8, 9)
    assert not sample_tokens(hidden, torch.zeros_like(mask), 4)[1].any()


def test_few_tokens_stand_for_all():
    torch.manual_seed(0)
    hidden = torch.randn(16, 64, 4) @ torch.randn(4, 4)
    want = torch.cov(hidden[:, 1:].flatten(0, 1).T)
    mean = torch.stack(
        [(root.mT @ root) for root in (covariance_root(*sample_tokens(hidden, None, 128)) for _ in range(60))]
    ).mean(0)
    assert (mean - want).norm() < 0.05 * want.norm()
