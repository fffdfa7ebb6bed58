"""Gradients written into the parameters' own, in every layout, against automatic differentiation."""

import pytest
import torch
from heads_zoo import ZOO, build

from lightning_qk import head_projections
from lightning_qk.functional import qk_moments
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.regularizers.locater import LocaterPenalty, Settings


@pytest.mark.parametrize("name", ZOO)
def test_in_every_layout(name):
    model = build(name)
    heads = {key: head for key, head in head_projections(model).items() if head.self_attention}
    penalty = sum(qk_moments(head.query, head.key)["sym_var"].sum() for head in heads.values())
    penalty.backward()
    want = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert want
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    settings = Settings("variance", "model", None, 1.0)
    value, reached = LocaterPenalty(ProjectionReader(model)).add_gradient(
        settings, 0.5, list(model.parameters())
    )
    assert reached
    torch.testing.assert_close(value, penalty.detach())
    for key, parameter in model.named_parameters():
        added = 2 * (parameter.grad - 1)
        expected = want.get(key, torch.zeros_like(parameter))
        torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-9, msg=key)
