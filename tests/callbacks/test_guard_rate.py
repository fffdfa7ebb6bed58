"""The guard's learning rates: untouched until it acts, and then those that the optimizer is about to use."""

import lightning as L
import models
import pytest
import torch

from lightning_qk import CollapseGuard
from lightning_qk.callbacks.guard._rate import RateLimit
from lightning_qk.guard.detector import Verdict

STEPS = 8


def rate_of(step):
    return 1e-3 * (1 + step % 3)


class Base(models.Job):
    def __init__(self):
        torch.manual_seed(3)
        super().__init__(lr=1e-3, optimizer="adamw")

    def set_rate(self):
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_of(self.trainer.global_step)


class InStep(Base):
    def training_step(self, batch, index):
        self.set_rate()
        return super().training_step(batch, index)


class BeforeStep(Base):
    def on_before_optimizer_step(self, optimizer):
        self.set_rate()


class InHook(Base):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()

        def hook(own, args, kwargs):
            own.param_groups[0]["lr"] = rate_of(self.trainer.global_step)

        optimizer.register_step_pre_hook(hook)
        return optimizer


class Scheduled(Base):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TensorRate(Base):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=torch.tensor(1e-3), capturable=False, foreach=False)


class ByHand(Base):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        self.set_rate()
        optimizer.step()


class AddedGroup(Base):
    def configure_optimizers(self):
        self.late, *rest = list(self.parameters())
        return torch.optim.AdamW(rest, lr=1e-3)

    def on_train_batch_start(self, batch, index):
        if self.trainer.global_step == 3 and len(self.trainer.optimizers[0].param_groups) == 1:
            self.trainer.optimizers[0].add_param_group({"params": [self.late], "lr": 2e-3})


JOBS = [InStep, BeforeStep, InHook, Scheduled, TensorRate, ByHand, AddedGroup]


def train(job, guard, tmp_path, **arguments):
    used = []

    class Watch(L.Callback):
        """The rate that a step is really taken with."""

        def on_fit_start(self, trainer, module):
            for optimizer in trainer.optimizers:
                inner = optimizer._optimizer_step_code
                optimizer._optimizer_step_code = lambda own=optimizer, inner=inner: (
                    used.append([float(group["lr"]) for group in own.param_groups]),
                    inner(),
                )

        def on_train_batch_end(self, trainer, module, *_):
            rates.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])

    rates = []
    callbacks = [Watch(), *([guard] if guard else [])]
    trainer = models.trainer(
        callbacks, max_steps=STEPS, max_epochs=-1, default_root_dir=tmp_path, **arguments
    )
    torch.manual_seed(1)
    trainer.fit(job, models.tokens(64))
    return torch.cat([p.detach().flatten() for p in job.parameters()]), used, rates


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_guard_that_warns_leaves_weights_bit_identical(kind, factor, tmp_path):
    guard = CollapseGuard(every_n_steps=2, lr_factor=factor, checkpoint_every=0)
    plain = train(kind(), None, tmp_path)
    watched = train(kind(), guard, tmp_path)
    assert torch.equal(plain[0], watched[0])
    assert plain[1:] == watched[1:]


def test_with_accumulated_gradients_too(tmp_path):
    guard = CollapseGuard(every_n_steps=2)
    plain = train(InStep(), None, tmp_path, accumulate_grad_batches=2)
    assert torch.equal(plain[0], train(InStep(), guard, tmp_path, accumulate_grad_batches=2)[0])


@pytest.mark.parametrize("kind", JOBS)
def test_it_multiplies_the_rate_that_is_about_to_be_used(kind, tmp_path):
    guard = CollapseGuard(every_n_steps=1, lr_factor=0.5, checkpoint_every=0)
    alarm = 3

    def observe(reading):
        return Verdict(reading.step, 2.0, reading.step == alarm, "it was told to")

    guard.detector.observe = observe
    _, plain, rates = train(kind(), None, tmp_path)
    _, used, own = train(kind(), guard, tmp_path)
    assert rates == own  # nobody else sees it
    peaks = [max(row[0] for row in plain[: alarm + 1])]
    for step, (want, got) in enumerate(zip(plain, used, strict=True)):
        for index, rate in enumerate(want):
            scaled = rate if step <= alarm else 0.5 * (min(rate, peaks[0]) if index == 0 else rate)
            assert got[index] == pytest.approx(scaled, rel=1e-6)


def parameter_with(optimizer):
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    return parameter, optimizer([parameter], lr=1.0)


def tight(*optimizers):
    limit = RateLimit()
    limit.attach(optimizers)
    for optimizer in optimizers:
        optimizer.step()
    limit.tighten(0.5)
    return limit


def test_a_rate_that_is_set_inside_of_a_step_stays():
    _, optimizer = parameter_with(torch.optim.SGD)
    tight(optimizer)
    code = optimizer._optimizer_step_code
    optimizer._optimizer_step_code = lambda: (optimizer.param_groups[0].update(lr=0.25), code())
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_step_that_raises_leaves_the_rate():
    _, optimizer = parameter_with(torch.optim.SGD)
    limit = tight(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.param_groups[0]["lr"] == 1.0
    optimizer._optimizer_step_code = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    limit.settle()
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_step_inside_of_a_step_is_scaled_once():
    parameter, inner = parameter_with(torch.optim.SGD)

    class Outer(torch.optim.Optimizer):
        def __init__(self):
            super().__init__([parameter], {"lr": 1.0})
            self.param_groups = inner.param_groups

        def step(self, closure=None):
            inner.step()

    outer = Outer()
    tight(outer, inner)
    before = parameter.item()
    outer.step()
    assert before - parameter.item() == pytest.approx(0.5)
    assert inner.param_groups[0]["lr"] == 1.0


def test_a_closure_sees_the_rate_as_it_is():
    parameter, optimizer = parameter_with(torch.optim.LBFGS)
    tight_on = RateLimit()
    tight_on.attach([optimizer])
    tight_on.tighten(0.5)
    seen = []

    def closure():
        seen.append(optimizer.param_groups[0]["lr"])
        parameter.grad = 2 * (parameter.detach() - 3)
        return (parameter.detach() - 3).square().sum()

    optimizer.step(closure)
    assert set(seen) == {1.0}
    assert optimizer.param_groups[0]["lr"] == 1.0
