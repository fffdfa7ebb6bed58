"""LocAteR on models with adapters, in training: the callback and the penalty as a term of the loss."""

import warnings

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightning_qk import LocAteR, QKSpectrumMonitor, locater_penalty

LORA = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def _penalty(job):
    return 0.5 * locater_penalty(job)


def _adapted(kind):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            models.llama(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"], **LORA[kind])
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(0.1)
    return model


def _fit(model, callbacks, **options):
    """Every parameter before and after some steps."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    models.trainer(callbacks, max_steps=3).fit(models.Job(model, lr=0.05, **options), models.tokens())
    return {name: (before[name], value.detach()) for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", LORA)
def test_both_ways_train_the_adapter_alike(kind):
    plain = _fit(_adapted(kind), [])
    callback = _fit(_adapted(kind), [LocAteR(0.5)])
    loss = _fit(_adapted(kind), [], loss=_penalty)
    for name, (before, after) in callback.items():
        if "lora_" not in name:
            assert torch.equal(before, after), name
            continue
        torch.testing.assert_close(after, loss[name][1], rtol=1e-4, atol=1e-6, msg=name)
        assert (after - plain[name][1]).norm() > 1e-3 * (after - before).norm(), name


def test_adapters_that_take_no_part_are_named():
    model = _adapted("lora")
    model.merge_adapter()
    # The head trains, so that the step has something to do.
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="expected query or key weights that the optimizer trains, got none"):
        _fit(model, [LocAteR(0.5)])


def test_the_monitor_follows_the_adapter():
    monitor = QKSpectrumMonitor(every_n_steps=1)
    _fit(_adapted("dora"), [monitor])
    curve = monitor.history.series("trace_sq")
    assert len(curve) >= 3
    assert not torch.allclose(curve[0], curve[-1], rtol=1e-4)
