"""Probes leave the model, its modes and every random generator as they were."""

import copy
import inspect

import models
import pytest
import torch
from transformers import AttentionInterface

from lightning_qk.probes import (
    HeadReport,
    attention_as_explanation,
    exchangeability,
    irrelevant_mass,
    parallel_context_entropy,
)

IDS = torch.randint(3, models.VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
MARKED = (torch.arange(10) % 3 == 0).repeat(2, 1)

PROBES = {
    "explanation": lambda model, given: attention_as_explanation(model, given),
    "exchangeability": lambda model, given: exchangeability(model, given),
    "parallel": lambda model, given: parallel_context_entropy(model, given).ratio,
    "irrelevant": lambda model, given: irrelevant_mass(model, given, MARKED),
    "heads": lambda model, given: {"": HeadReport.from_model(model, [given])},
}


def state(model) -> dict:
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "generator": torch.get_rng_state().tolist(),
        "enabled": torch.is_grad_enabled(),
        "interface": inspect.getsource(AttentionInterface.get_interface),
    }


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(probe, fails):
    model = models.gpt2().train()
    model.transformer.h[1].eval()  # frozen by its owner
    weights = copy.deepcopy(model.state_dict())
    given = {"input_ids": IDS.clone(), "labels": IDS}
    before = state(model)
    broken = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0) if fails else None
    if fails:
        with pytest.raises(ZeroDivisionError):
            PROBES[probe](model, given)
        broken.remove()
    else:
        first = PROBES[probe](model, given)
        again = PROBES[probe](model, given)
        if probe != "heads":
            assert all(torch.equal(value, again[name]) for name, value in first.items())
            assert all(torch.isfinite(value).all() and not value.requires_grad for value in first.values())
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(given["input_ids"], IDS)
    loss = model(**given).loss
    loss.backward()
    assert model.transformer.wte.weight.grad is not None


@pytest.mark.parametrize("probe", [name for name in PROBES if name != "heads"])
def test_half_precision_is_near(probe):
    torch.manual_seed(0)
    model = models.llama()
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    want = PROBES[probe](model, {"input_ids": IDS})
    with torch.autocast("cpu", torch.bfloat16):
        mixed = PROBES[probe](model, {"input_ids": IDS})
    low = PROBES[probe](copy.deepcopy(model).bfloat16(), {"input_ids": IDS})
    for name, value in want.items():
        for other in (mixed[name], low[name]):
            assert other.isfinite().all()
            if probe != "explanation":  # ranks of near ties
                torch.testing.assert_close(other.float(), value, atol=0.05, rtol=0.1)


def test_a_cache_is_refused_and_none_is_filled():
    model = models.gpt2().eval()
    given = {"input_ids": IDS}
    cache = model(**given, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without past_key_values"):
        exchangeability(model, {**given, "past_key_values": cache})
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True
    )
    irrelevant_mass(model, given, MARKED)
    assert seen == [False]
