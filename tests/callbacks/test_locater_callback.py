"""The callback's gradient against the penalty as a term of the loss, and its schedule, state and errors."""

import math
from pathlib import Path

import lightning as L
import models
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy

from lightning_qk import LocAteR, head_projections, locater_penalty

WEIGHT = 5.0


class Recorder(L.Callback):
    """Keeps the gradients that the optimizer steps with, after clipping."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.keep(pl_module))

    def keep(self, pl_module: L.LightningModule) -> None:
        self.gradients.append(
            {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        )


def gradients_of(loss=None, callbacks=(), model=models.gpt2, **kwargs) -> list[dict[str, torch.Tensor]]:
    L.seed_everything(3, verbose=False)
    recorder = Recorder()
    job = models.Job(model(), loss=loss, lr=0.01)
    models.trainer([*callbacks, recorder], max_steps=2, **kwargs).fit(job, models.tokens())
    assert len(recorder.gradients) == 2
    return recorder.gradients


@pytest.mark.parametrize(
    "setup",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["variance", "target"])
def test_gradient_equals_that_of_a_loss_term(setup, form):
    target = 0.01 if form == "target" else None
    term = gradients_of(loss=lambda job: WEIGHT * locater_penalty(job, form=form, target=target), **setup)
    callback = gradients_of(callbacks=[LocAteR(WEIGHT, form=form, target=target)], **setup)
    without = gradients_of(**setup)
    for with_term, with_callback, plain in zip(term, callback, without, strict=True):
        assert set(with_term) == set(with_callback)
        for name, want in with_term.items():
            error = (with_callback[name] - want).norm() / want.norm().clamp_min(1e-12)
            assert error < 1e-5, name
        assert any(not torch.equal(with_callback[name], plain[name]) for name in plain)


def test_every_layer_once_with_several_optimizers():
    class Manual(models.Job):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.inner["network"](input_ids=batch, labels=batch).loss
            if self.extra_loss is not None:
                loss = loss + self.extra_loss(self)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            first = list(self.inner["network"].transformer.h[0].parameters())
            ids = {id(p) for p in first}
            rest = [p for p in self.parameters() if id(p) not in ids]
            return [torch.optim.SGD(first, lr=0.1), torch.optim.SGD(rest, lr=0.1)]

    weights = []
    for loss, callbacks in (
        (lambda job: WEIGHT * locater_penalty(job), []),
        (None, [LocAteR(WEIGHT)]),
    ):
        L.seed_everything(3, verbose=False)
        job = Manual(loss=loss)
        models.trainer(callbacks, max_steps=2).fit(job, models.tokens())
        weights.append([p.detach().clone() for p in job.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_frozen_weights_are_left_alone():
    job = models.Job(optimizer="adamw")
    for parameter in job.inner["network"].transformer.h[0].parameters():
        parameter.requires_grad = False
    before = job.inner["network"].transformer.h[0].attn.c_attn.weight.clone()
    models.trainer([LocAteR(WEIGHT)]).fit(job, models.tokens())
    assert torch.equal(job.inner["network"].transformer.h[0].attn.c_attn.weight, before)
    assert job.inner["network"].transformer.h[0].attn.c_attn.weight.grad is None


def test_a_penalty_that_reaches_nothing_is_told_once():
    job = models.Job()
    for block in job.inner["network"].transformer.h:
        block.attn.requires_grad_(False)
    with pytest.warns(UserWarning, match="weights that the optimizer trains, got none") as caught:
        models.trainer([LocAteR(WEIGHT)]).fit(job, models.tokens())
    assert len([w for w in caught if "got none" in str(w.message)]) == 1


def test_shrinks_the_spectrum_and_logs():
    job = models.Job()
    before = locater_penalty(job).item()
    trainer = models.trainer([LocAteR(40.0)], max_steps=8)
    trainer.fit(job, models.tokens())
    assert locater_penalty(job).item() < 0.9 * before
    metrics = trainer.callback_metrics
    assert metrics["locater/weight"].item() == 40.0
    assert 0 < metrics["locater/penalty"].item() < before
    # The logged loss does not contain it.
    torch.testing.assert_close(metrics["train/loss"], job.losses[-1])


def test_modules_by_pattern():
    name = next(iter(head_projections(models.Job())))
    gradients = [gradients_of(callbacks=c)[0] for c in ([], [LocAteR(WEIGHT, modules=name)])]
    changed = {key for key, value in gradients[0].items() if not torch.equal(value, gradients[1][key])}
    assert changed == {f"{name}.c_attn.weight"}


def test_linear_warm_up():
    callback = LocAteR(2.0, schedule="linear", warmup_steps=4)
    assert [callback.current_weight(step) for step in (0, 1, 2, 4, 9)] == [0.0, 0.5, 1.0, 2.0, 2.0]
    assert [LocAteR(2.0).current_weight(step) for step in (0, 9)] == [2.0, 2.0]
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(round(trainer.callback_metrics.get("locater/weight", torch.tensor(-1.0)).item(), 6))

    trainer = models.trainer(
        [LocAteR(2.0, schedule="linear", warmup_steps=4), Watch()], max_steps=3, accumulate_grad_batches=2
    )
    trainer.fit(models.Job(), models.tokens())
    assert trainer.callback_metrics["locater/weight"].item() == 1.0


def test_means_at_the_start_survive_a_resume(tmp_path):
    def fit(steps, checkpoint=None):
        L.seed_everything(3, verbose=False)
        job = models.Job(lr=0.05)
        callback = LocAteR(WEIGHT, form="target", nu=10.0)
        trainer = models.trainer([callback], max_steps=steps, max_epochs=-1, default_root_dir=tmp_path)
        trainer.fit(job, models.tokens(), ckpt_path=checkpoint)
        return callback, trainer

    whole, _ = fit(6)
    first, trainer = fit(3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(6, tmp_path / "half.ckpt")
    for name, mean in whole._held.start.items():
        assert torch.equal(resumed._held.start[name], mean)
        assert torch.equal(first._held.start[name], mean)
    assert resumed.history.steps == whole.history.steps
    for a, b in zip(
        resumed.history.values["locater/penalty"], whole.history.values["locater/penalty"], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


def test_two_callbacks_in_one_trainer(tmp_path):
    first, second = LocAteR(1.0, modules="*.h.0.*"), LocAteR(2.0, modules="*.h.1.*")
    assert first.state_key != second.state_key
    job = models.Job(lr=0.0)
    logger = CSVLogger(tmp_path)
    trainer = models.trainer([first, second], logger=logger)
    trainer.fit(job, models.tokens())
    metrics = trainer.callback_metrics
    for place, callback in (("1", first), ("2", second)):
        want = locater_penalty(job, modules=callback.modules)
        torch.testing.assert_close(metrics[f"locater/{place}/penalty"], want.detach())
        assert metrics[f"locater/{place}/weight"].item() == callback.weight
    assert "locater/penalty" not in metrics
    settings = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert settings["lightning_qk"]["LocAteR 1"]["modules"] == "*.h.0.*"
    assert settings["lightning_qk"]["LocAteR 2"]["weight"] == 2.0


def test_names_tell_callbacks_apart():
    first, second = LocAteR(1.0, name="scale"), LocAteR(1.0, form="target", target=0.1, name="mean")
    assert first.state_key != second.state_key
    trainer = models.trainer([first, second])
    trainer.fit(models.Job(), models.tokens())
    assert {"locater/scale/penalty", "locater/mean/weight"} <= trainer.callback_metrics.keys()
    with pytest.raises(ValueError, match="different names in one trainer, got same, same"):
        models.trainer([LocAteR(1.0, name="same"), LocAteR(1.0, form="target", name="same")]).fit(
            models.Job(), models.tokens()
        )


class Manual(models.Job):
    """Manual optimization, one optimizer, a step every second batch."""

    automatic_optimization = False
    wrapped = True

    def training_step(self, batch, batch_idx):
        loss = self.inner["network"](input_ids=batch, labels=batch).loss
        if self.extra_loss is not None and batch_idx % 2 == 0:
            loss = loss + self.extra_loss(self)
        self.manual_backward(loss)
        if batch_idx % 2 == 1:
            optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
            optimizer.step()
            optimizer.zero_grad()


def weights_after(job, callbacks=(), **kwargs) -> list[torch.Tensor]:
    models.trainer(list(callbacks), **{"max_steps": 2, **kwargs}).fit(job, models.tokens())
    return [p.detach().clone() for p in job.parameters()]


def test_manual_optimization_with_accumulation():
    weights = []
    for loss, callbacks in ((lambda job: WEIGHT * locater_penalty(job), []), (None, [LocAteR(WEIGHT)])):
        L.seed_everything(3, verbose=False)
        weights.append(weights_after(Manual(loss=loss, lr=0.1), callbacks))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_steps_that_lightning_does_not_see_are_told():
    job = Manual()
    job.wrapped = False
    with pytest.warns(UserWarning, match="expected optimizer steps that Lightning sees, got none"):
        models.trainer([LocAteR(WEIGHT)], max_steps=-1, max_epochs=1).fit(job, models.tokens())


def test_every_evaluation_of_a_closure_has_the_gradient():
    class Closure(models.Job):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    weights = []
    for loss, callbacks in ((lambda job: WEIGHT * locater_penalty(job), []), (None, [LocAteR(WEIGHT)])):
        L.seed_everything(3, verbose=False)
        job = Closure(loss=loss)
        for module in job.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        weights.append(weights_after(job, callbacks))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_scales_the_penalty_where_the_optimizer_unscales(fused):
    """Fused optimizers divide by the loss scale in their own step, after the hook."""

    class Fused(models.Job):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, fused=fused)

    weights = []
    for loss, callbacks in ((lambda job: WEIGHT * locater_penalty(job), []), (None, [LocAteR(WEIGHT)])):
        L.seed_everything(3, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        weights.append(weights_after(Fused(loss=loss), callbacks, plugins=[precision]))
        assert scaler.get_scale() == 256.0  # no step was skipped
    change = weights[0][0] - weights_after(Fused(), max_steps=0)[0]
    assert change.any()
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_averaged_weights():
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    weights = []
    for callbacks in ([], [averaging.EMAWeightAveraging(decay=0.5)]):
        L.seed_everything(3, verbose=False)
        recorder = Recorder()
        models.trainer([LocAteR(WEIGHT), *callbacks, recorder]).fit(
            models.Job(lr=0.05), models.tokens(), models.tokens()
        )
        weights.append(recorder.gradients)
    for plain, averaged in zip(*weights, strict=True):
        for name, gradient in plain.items():
            assert torch.equal(gradient, averaged[name])


def test_modules_that_are_replaced_in_training_are_found():
    class Replace(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                attention = pl_module.inner["network"].model.layers[0].self_attn
                old, attention.q_proj = attention.q_proj, torch.nn.Linear(32, 32, bias=False)
                with torch.no_grad():
                    attention.q_proj.weight.copy_(10 * old.weight)

    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.callback_metrics["locater/penalty"].item())

    job = models.Job(models.llama(), lr=0.0)
    models.trainer([LocAteR(WEIGHT), Replace(), Watch()], max_steps=2).fit(job, models.tokens())
    assert seen[1] > 10 * seen[0]
    assert seen[1] == pytest.approx(locater_penalty(job).item(), rel=1e-5)


def test_deepspeed_is_refused_with_the_way_out(monkeypatch):
    callback = LocAteR(1.0)
    trainer = models.trainer([callback])
    strategy = object.__new__(DeepSpeedStrategy)
    strategy._lightning_module = models.Job()
    monkeypatch.setattr(type(trainer), "strategy", property(lambda self: strategy))
    with pytest.raises(ValueError, match=r"got DeepSpeed.*locater_penalty\(self\) to the loss.*FSDP2"):
        callback.setup(trainer, models.Job(), "fit")


def test_weights_that_are_not_finite_do_not_stop_training():
    job = models.Job()
    with torch.no_grad():
        job.inner["network"].transformer.h[1].attn.c_attn.weight[0, 0] = torch.nan
    trainer = models.trainer([LocAteR(1.0)])
    with pytest.warns(UserWarning, match="the penalty is nan at step 0"):
        trainer.fit(job, models.tokens())
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "expected a finite weight of at least 0, got -1.0"),
        ({"weight": math.nan}, "expected a finite weight of at least 0, got nan"),
        ({"weight": math.inf}, "got inf"),
        ({"weight": 1.0, "nu": -1.0}, "finite nu"),
        ({"weight": 1.0, "form": "spread"}, "'variance', 'target' or 'limit', got 'spread'"),
        ({"weight": 1.0, "support": "all"}, "support to be"),
        ({"weight": 1.0, "target": 1.0}, "no target with form='variance'"),
        ({"weight": 1.0, "form": "target", "target": math.nan}, "finite target"),
        ({"weight": 1.0, "schedule": "cosine"}, "'constant' or 'linear'"),
        ({"weight": 1.0, "schedule": "linear"}, "warmup_steps above 0"),
        ({"weight": 1.0, "warmup_steps": 5}, "0 with 'constant', got 5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocAteR(**arguments)


def test_errors_come_before_training():
    class Plain(models.Job):
        def __init__(self):
            super().__init__(torch.nn.Linear(2, 2))

    # No callback takes a module: what can be done is said of the job.
    found = "expected a model that contains transformer attention, found none in Plain: build the network"
    with pytest.raises(ValueError, match=found):
        models.trainer([LocAteR(1.0)]).fit(Plain(), models.tokens())
    with pytest.raises(ValueError, match=r"matches none of 2"):
        models.trainer([LocAteR(1.0, modules="decoder.*")]).fit(models.Job(), models.tokens())
