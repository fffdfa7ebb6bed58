"""A weight that is a share of the gradient's norm: measured over the first steps, and kept."""

import statistics

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_qk import LocAteR, locater_penalty
from lightning_qk.heads.reader import ProjectionReader


class Watch(L.Callback):
    """Weights as logged, and per step the norms of both gradients on query and key weights, by autograd."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.ratios: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        sides = {}
        for layer in ProjectionReader(pl_module).layers.values():
            for side in ("query", "key"):
                sides[layer.name, side] = layer.gradient_view(side, {}).clone()
        own = {name: parameter.clone().requires_grad_() for name, parameter in pl_module.named_parameters()}
        with torch.enable_grad():
            value = torch.func.functional_call(
                _Penalty(pl_module), {f"job.{n}": p for n, p in own.items()}, ()
            )
            found = torch.autograd.grad(value, list(own.values()), allow_unused=True)
        penalty = sum(grad.square().sum() for grad in found if grad is not None).sqrt()
        loss = sum(grad.square().sum() for grad in sides.values()).sqrt()
        self.ratios.append(float(loss / penalty))

    def on_train_batch_end(self, trainer, *args):
        if "locater/weight" in trainer.callback_metrics:
            self.weights.append(trainer.callback_metrics["locater/weight"].item())


class _Penalty(torch.nn.Module):
    def __init__(self, job):
        super().__init__()
        self.job = job

    def forward(self):
        return locater_penalty(self.job)


def still() -> models.Job:
    """A job that draws no random numbers."""
    job = models.Job(lr=0.05)
    for module in job.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return job


def fit(locater, steps=12, watch=None, job=None, ckpt_path=None, **kwargs):
    L.seed_everything(3, verbose=False)
    watch = watch or Watch()
    trainer = models.trainer([watch, locater], max_steps=steps, max_epochs=-1, **kwargs)
    trainer.fit(still() if job is None else job, models.tokens(), ckpt_path=ckpt_path)
    return watch, trainer


def test_a_share_is_that_of_the_gradients_norm_over_the_first_steps():
    locater = LocAteR("20%")
    watch, _ = fit(locater)
    for step, weight in enumerate(watch.weights):
        want = 0.2 * statistics.median(watch.ratios[: min(step + 1, 10)])
        assert weight == pytest.approx(want, rel=1e-4), step
    assert len(set(watch.weights[9:])) == 1
    assert locater.weight == "20%"


def test_the_same_gradient_as_with_the_coefficient_it_comes_to():
    """One step: the coefficient is known from the step itself."""
    gradients = []
    weight: float | str = "30%"
    for _ in range(2):
        torch.manual_seed(1)
        job = models.Job(lr=0.05)
        locater = LocAteR(weight, sigma="tokens", tokens=60)
        watch, _ = fit(locater, 1, Plain(), job)
        gradients.append([p.grad.clone() for p in job.parameters() if p.grad is not None])
        weight = watch.weights[0]
        assert weight > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


class Plain(Watch):
    """Only the logged weights, and gradients that stay."""

    def on_before_optimizer_step(self, *_):
        pass

    def on_fit_start(self, trainer, pl_module):
        pl_module.optimizer_zero_grad = lambda *args: None


def test_a_resumed_run_goes_on_with_what_was_measured(tmp_path):
    whole, _ = fit(LocAteR("20%"), 13)
    first, trainer = fit(LocAteR("20%"), 8)  # an epoch, after which batches begin anew
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")
    watch, _ = fit(LocAteR("20%"), 13, ckpt_path=tmp_path / "epoch.ckpt")
    assert first.weights + watch.weights == pytest.approx(whole.weights, rel=1e-3)


def test_warm_up_grows_to_it_and_measures_meanwhile():
    watch, _ = fit(LocAteR("20%", schedule="linear", warmup_steps=4), 6)
    assert watch.weights[0] == 0
    assert watch.weights[2] == pytest.approx(0.5 * 0.2 * statistics.median(watch.ratios[:3]), rel=1e-4)
    assert watch.weights[5] == pytest.approx(0.2 * statistics.median(watch.ratios[:6]), rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_does_not_change_it(fused):
    class Fused(models.Job):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, fused=fused)

    weights = []
    for scale in (64.0, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        torch.manual_seed(1)
        watch, _ = fit(LocAteR("20%"), 2, Plain(), Fused(), plugins=[plugin])
        weights.append(watch.weights)
    assert weights[0] == pytest.approx(weights[1], rel=0.05)


def test_steps_without_a_gradient_do_not_count():
    class Silent(models.Job):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (batch_idx > 1)

    locater = LocAteR("20%")
    watch, _ = fit(locater, 4, Plain(), Silent(lr=0.0))
    assert watch.weights[:2] == [0.0, 0.0]
    assert watch.weights[2] > 0
    assert len(locater.share.ratios) == 2


@pytest.mark.parametrize("weight", ["ten", "10", "-5%", "5 percent", "nan%"])
def test_what_is_no_share_is_refused(weight):
    with pytest.raises(ValueError, match="number of at least 0 or a share such as '10%'"):
        LocAteR(weight)
