"""The limit form against the logits of all pairs of tokens, and its gradient against autograd."""

import models
import pytest
import torch
import transformers
from torch.autograd import gradcheck, gradgradcheck

from lightning_qk import HeadProjections, head_projections, locater_penalty
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.regularizers.locater import LocaterPenalty
from lightning_qk.regularizers.settings import Settings

LIMIT = 0.8


def head_and_tokens() -> tuple[HeadProjections, torch.Tensor]:
    """Four heads in groups of two, and tokens far from their mean."""
    query, key = (torch.randn(n, 4, 12, dtype=torch.float64).requires_grad_() for n in (4, 2))
    tokens = torch.randn(20, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) / 3
    return HeadProjections(query, key, None, None, 0.1, "separate"), tokens + 0.4


def logit_variances(head: HeadProjections, tokens: torch.Tensor) -> torch.Tensor:
    """Variance over keys of the logits of every pair of tokens, mean over queries, ``(heads,)``."""
    key = head.key.repeat_interleave(2, 0)
    query, keys = (torch.einsum("td,hed->hte", tokens, side) for side in (head.query, key))
    return (head.scaling * query @ keys.mT).var(-1, correction=0).mean(-1)


def test_is_that_of_the_logits_between_all_pairs_of_tokens():
    head, tokens = head_and_tokens()
    variance = logit_variances(head, tokens)
    assert ((variance.sqrt() > LIMIT).sum(), (variance.sqrt() < LIMIT).sum()) > (0, 0)
    want = (variance.sqrt() / LIMIT).log().clamp_min(0).square().sum()
    got = locater_penalty(
        {"a": head},
        form="limit",
        inputs={"a": (tokens, torch.ones(20))},
        limit=LIMIT,
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    leaves = [head.query, head.key]
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_first_and_second_derivatives():
    torch.manual_seed(1)
    leaves = [torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]
    tokens, weight = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)

    def penalty(query, key):
        own = {"a": HeadProjections(query, key, None, None, 0.7, "")}
        return locater_penalty(own, form="limit", inputs={"a": (tokens, weight)}, limit=0.1)

    assert penalty(*leaves) > 0
    assert gradcheck(penalty, leaves)
    assert gradgradcheck(penalty, leaves)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_below_the_limit_there_is_no_gradient(scale):
    model = models.llama()
    with torch.no_grad():
        for head in ProjectionReader(model).values():
            head.query.mul_(scale)
    inputs = {name: (torch.randn(9, 32), torch.ones(9)) for name in ProjectionReader(model)}
    penalty = locater_penalty(model, form="limit", inputs=inputs, limit=1e3)
    penalty.backward()
    assert penalty == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.bert])
def test_both_ways_to_apply_it_have_one_gradient(make):
    model = make()
    reader = ProjectionReader(model)
    inputs = {name: (torch.randn(8 + index, 32), torch.rand(8 + index)) for index, name in enumerate(reader)}
    given = {"form": "limit", "inputs": inputs, "limit": 1e-3}
    (2.5 * locater_penalty(model, **given)).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert want
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter)
    value, reached = LocaterPenalty(reader, by_tokens=True).add_gradient(
        Settings("limit", "model", None, 1.0, None, 1e-3, inputs), 2.5, list(model.parameters())
    )
    assert reached
    torch.testing.assert_close(value, locater_penalty(model, **given).detach())
    for name, gradient in want.items():
        got = dict(model.named_parameters())[name].grad
        assert (got - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name  # biases of keys have none


def test_what_does_not_fit_is_refused():
    model = models.gpt2()
    normed = models.build(
        transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**models._GROUPED, head_dim=8)
    )
    inputs = {name: (torch.randn(6, 32), torch.ones(6)) for name in ProjectionReader(model)}
    moments = {name: tokens for name, (tokens, _) in inputs.items()}
    with pytest.raises(ValueError, match="got neither with form='limit'"):
        locater_penalty(model, form="limit")
    with pytest.raises(ValueError, match="got inputs and moments with form='limit'"):
        locater_penalty(model, form="limit", inputs=inputs, moments=moments)
    with pytest.raises(ValueError, match="got inputs with form='variance'"):
        locater_penalty(model, inputs=inputs)
    with pytest.raises(ValueError, match="expected a limit above 0, got -1"):
        locater_penalty(model, form="limit", inputs=inputs, limit=-1)
    with pytest.raises(ValueError, match="expected no target with form='limit'"):
        locater_penalty(model, form="limit", inputs=inputs, target=1.0)
    with pytest.raises(ValueError, match=r"expected inputs of shape \(tokens, 32\) for layer"):
        locater_penalty(model, form="limit", inputs={})
    with pytest.raises(ValueError, match="divided by what its projections alone do not tell: pass a model"):
        locater_penalty(head_projections(normed), form="limit", inputs=inputs)
