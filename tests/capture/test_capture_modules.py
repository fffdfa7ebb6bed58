"""Copies and pickles made while somebody listens have nothing of what hangs on their originals."""

import copy
import io
import pickle
import pickletools

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qk import AttentionMonitor, HiddenStateMonitor, QKSpectrumMonitor
from lightning_qk.capture.call import AttentionCall
from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.captured import FunctionCall
from lightning_qk.capture.hooks.modules import Hook, hook_after, hook_before
from lightning_qk.heads.reader import ProjectionReader, find_attention
from lightning_qk.verification.check import SelfCheck

TOKENS = torch.arange(3, 15).reshape(2, 6)


def hooks(model: nn.Module) -> list[object]:
    return [
        hook
        for module in model.modules()
        for book in (module._forward_hooks, module._forward_pre_hooks)
        for hook in book.values()
    ]


def left_behind(model: nn.Module) -> list[str]:
    """Names in the modules' dictionaries that speak of this package, and hooks with their flags."""
    names = [
        name
        for module in model.modules()
        for name, value in vars(module).items()
        if "lightning_qk" in name or "lightning_qk" in type(value).__module__
    ]
    flags = [
        key
        for module in model.modules()
        for name in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
        for key in getattr(module, name)
    ]
    return [*names, *map(repr, hooks(model)), *map(str, flags)]


def test_a_copy_loses_its_hooks_when_it_runs_or_when_the_originals_are_taken_away():
    called = []
    block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    own = block[1].register_forward_hook(lambda *_: called.append("own"))
    handles = [
        hook_after(block[0], lambda module, args, output: called.append("after")),
        hook_before(block[0], lambda module, args, kwargs: called.append("before")),
    ]
    first, second, third = (copy.deepcopy(block) for _ in range(3))
    grandchild = copy.deepcopy(second)
    alone = copy.deepcopy(block[0])
    first(torch.zeros(1, 3))
    assert called == ["own"]  # that of the user goes along
    assert left_behind(first[0]) == []
    assert left_behind(second[0]) != []
    block(torch.zeros(1, 3))
    assert called == ["own", "before", "after", "own"]
    for handle in handles:
        handle.remove()
    for made in (second, third, grandchild, block):
        assert left_behind(made[0]) == []
        assert len(made[1]._forward_hooks) == 1
    assert left_behind(alone) == []
    own.remove()


def test_a_pickle_needs_nothing_of_this_package():
    block = nn.Linear(3, 3)
    called = []
    hook_after(block, lambda *_: called.append(1))
    hook_before(block, lambda *_: called.append(2))
    data = pickle.dumps(block)
    assert not [arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str) and "qk" in arg]
    loaded = pickle.loads(data)
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), F.linear(x, block.weight, block.bias))
    assert called == []
    assert not any(isinstance(hook, Hook) for hook in hooks(loaded))


class Averaged(models.Job):
    """Copies and pickles its network in every step, as an average of weights would be made."""

    def __init__(self, model=None) -> None:
        super().__init__(model)
        self.made = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.made.append(copy.deepcopy(self.inner["network"]))
        pickle.dumps(self.inner["network"])
        return loss


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_copies_of_a_job_are_clean_after_its_fit(kind):
    job = Averaged(getattr(models, kind)())
    monitors = [
        QKSpectrumMonitor(report=False),
        AttentionMonitor(report=False),
        HiddenStateMonitor(report=False),
    ]
    trainer = models.trainer(monitors, max_steps=3)
    trainer.fit(job, models.tokens())
    assert trainer.global_step == 3
    assert len(job.made) == 3
    for made in (*job.made, job.inner["network"]):
        assert left_behind(made) == []


def test_tensors_that_a_check_keeps_do_not_stand_in_a_copys_way():
    model = models.gpt2()
    check = SelfCheck(model, ProjectionReader(model))
    with check.looking():
        block = model.transformer.h[0].attn
        made = []
        block.c_proj.register_forward_hook(lambda *_: made.append(copy.deepcopy(model)))
        model(input_ids=TOKENS)
        model(input_ids=TOKENS)
    assert len(made) == 2
    assert not any(isinstance(hook, Hook) for one in made for hook in hooks(one))


class Own(nn.Module):
    """Keeps torch's function in an attribute and, where asked, a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.attend = F.scaled_dot_product_attention

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class Bound:
    """A forward that a library puts before a module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x):
        return type(self.module).forward(self.module, x)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_copy_computes_with_its_own_weights(is_wrapped):
    attention = Own()
    if is_wrapped:
        attention.forward = Bound(attention)
    model = nn.Sequential(attention)
    heard = []
    capture = AttentionCapture({attention: "own"}, lambda name, call: heard.append(name), model=model)
    capture.install()
    capture.enabled = True
    x = torch.randn(2, 5, 8)
    model(x)
    assert heard == ["own"]
    made = copy.deepcopy(model)
    loaded = pickle.load(io.BytesIO(pickle.dumps(model)))
    for other in (made, loaded):
        nn.init.zeros_(other[0].qkv.weight)
        nn.init.zeros_(other[0].qkv.bias)
        assert not other(x).any()
        assert other[0].attend is not attention.attend
    assert heard == ["own"]
    capture.remove()
    assert model(x).any()
    assert attention.attend is made[0].attend is F.scaled_dot_product_attention
    assert left_behind(made) == left_behind(model) == []


@pytest.mark.parametrize("value", [0, 0.0, None, 3.0])
def test_a_soft_cap_of_zero_is_none(value):
    model = models.llama()
    [layer, *_] = find_attention(model).values()
    query, key, v = torch.randn(3, 1, 4, 5, 8)
    call = AttentionCall(layer, query, key[:, :2], v[:, :2], None, "eager", {"softcap": value})
    given = FunctionCall(call).logits(self_attention=True)
    assert given.softcap == (3.0 if value else None)
