"""The callback's token-aware penalty: its gradient is that of a loss term with the same tokens, constants."""

import warnings

import lightning as L
import models
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightning_qk import LocAteR, locater_penalty
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.tokens import LayerInputs

WEIGHT = 3.0


class Recorder(L.Callback):
    """Gradients that the optimizer steps with, and the moments that LocAteR had."""

    def __init__(self, locater: LocAteR | None = None) -> None:
        self.locater = locater
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.moments: list[dict[str, torch.Tensor]] = []
        self.inputs: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
        self.penalties: list[float] = []

    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.keep(pl_module))

    def keep(self, pl_module):
        self.gradients.append(
            {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        )
        if self.locater is not None:
            self.moments.append(dict(self.locater.moments or {}))
            self.inputs.append(dict(self.locater.inputs))

    def on_train_batch_end(self, trainer, *args):
        if "locater/penalty" in trainer.callback_metrics:
            self.penalties.append(trainer.callback_metrics["locater/penalty"].item())


def still(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def fit(make=models.gpt2, locater=None, loss=None, **kwargs) -> Recorder:
    L.seed_everything(3, verbose=False)
    recorder = Recorder(locater)
    job = models.Job(still(make()), loss=loss, lr=0.01)
    callbacks = [recorder] if locater is None else [locater, recorder]
    models.trainer(callbacks, **{"max_steps": 2, **kwargs}).fit(job, models.tokens())
    return recorder


@pytest.mark.parametrize(
    "setup",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=str,
)
@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_gradient_equals_that_of_a_loss_term(make, setup):
    target = {"form": "target", "target": 0.3} if make is models.llama else {}
    callback = fit(make, LocAteR(WEIGHT, sigma="tokens", tokens=24, **target), **setup)
    steps = iter(range(100))
    micro = setup.get("accumulate_grad_batches", 1)

    def term(job):
        moments = callback.moments[next(steps) // micro]
        return WEIGHT * locater_penalty(job, moments=moments, **target)

    loss, without = fit(make, loss=term, **setup), fit(make, **setup)
    for one, other, plain in zip(callback.gradients, loss.gradients, without.gradients, strict=True):
        assert one.keys() == other.keys()
        for name, want in other.items():
            assert (one[name] - want).norm() <= 1e-5 * want.norm().clamp_min(1e-9), name
        assert any(not torch.allclose(one[name], plain[name]) for name in plain)


def lora() -> torch.nn.Module:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_gradient_reaches_adapters_alone():
    callback = fit(lora, LocAteR(WEIGHT, sigma="tokens", tokens=24))
    moments = iter(callback.moments)
    loss = fit(lora, loss=lambda job: WEIGHT * locater_penalty(job, moments=next(moments)))
    for one, other in zip(callback.gradients, loss.gradients, strict=True):
        assert all("lora_" in name for name in one)
        for name, want in other.items():
            assert (one[name] - want).norm() <= 1e-5 * want.norm().clamp_min(1e-9), name


def test_tokens_are_those_of_all_micro_batches_of_the_step_and_no_others():
    seen = []

    def watch(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    class Watch(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            layer = pl_module.inner["network"].transformer.h[1].attn
            self.handle = layer.register_forward_pre_hook(watch, with_kwargs=True)

        def on_validation_start(self, *_):
            self.before = len(seen)

        def on_validation_end(self, *_):
            del seen[self.before :]

    L.seed_everything(3, verbose=False)
    batch, length = next(iter(models.tokens())).shape
    locater = LocAteR(WEIGHT, sigma="tokens", tokens=2 * batch * (length - 1))
    recorder = Recorder(locater)
    trainer = models.trainer([locater, Watch(), recorder], accumulate_grad_batches=2, val_check_interval=1)
    trainer.fit(models.Job(), models.tokens(), models.tokens())
    for step, (moments, inputs) in enumerate(zip(recorder.moments, recorder.inputs, strict=True)):
        hidden = torch.cat(seen[2 * step : 2 * step + 2])[:, 1:].flatten(0, 1)
        root = next(own for name, own in moments.items() if ".h.1." in name)
        want = torch.cov(hidden.double().T, correction=0)
        torch.testing.assert_close((root.mT @ root).double(), want, rtol=1e-4, atol=1e-6)
        tokens, weight = next(own for name, own in inputs.items() if ".h.1." in name)
        mean = (weight @ tokens) / weight.sum()
        torch.testing.assert_close(mean, hidden.mean(0), rtol=1e-4, atol=1e-6)


def test_padding_and_first_tokens_are_left_out():
    model = still(models.bert()).eval()
    batch = torch.randint(5, 50, (3, 12))
    mask = torch.ones_like(batch)
    mask[0, 7:] = 0
    with LayerInputs(model, tokens=6 + 11 + 11) as inputs:
        model(input_ids=batch, attention_mask=mask)
    first = inputs.names[0]
    hidden = model.bert.embeddings(batch)
    counted = hidden[:, 1:][mask[:, 1:].bool()]
    root = inputs.moments()[first]
    torch.testing.assert_close(root.mT @ root, torch.cov(counted.T, correction=0), rtol=1e-4, atol=1e-6)
    tokens, weight = inputs.inputs()[first]
    mean = (weight @ tokens) / weight.sum()
    torch.testing.assert_close(mean, counted.mean(0), rtol=1e-4, atol=1e-6)


def test_generation_recomputation_and_what_comes_after_are_not_sampled():
    model = still(models.gpt2())
    batch = torch.randint(5, 50, (2, 12))
    with LayerInputs(model, tokens=8) as inputs:
        model.generate(batch, max_new_tokens=2, do_sample=False)
        assert not inputs.moments()
        model.gradient_checkpointing_enable()
        model.train()
        model(input_ids=batch, labels=batch).loss.backward()
        assert {len(root) for root in inputs.moments().values()} == {8}
    model(input_ids=batch)
    assert {len(root) for root in inputs.moments().values()} == {8}


def test_the_newest_tokens_are_kept():
    model = still(models.gpt2()).eval()
    batches = torch.randint(5, 50, (5, 2, 12))
    with LayerInputs(model, tokens=22, keep=50) as inputs:
        for batch in batches:
            model(input_ids=batch)
        name = inputs.names[1]
        tokens, weight = inputs.taken(name)
        inputs.clear()
        model(input_ids=batches[-1])
    assert tokens.shape == (50, 32)
    assert torch.equal(weight, torch.ones(50))
    torch.testing.assert_close(tokens[-22:], inputs.taken(name)[0])


@pytest.mark.slow
def test_the_same_under_torch_compile():
    def compiled():
        return torch.compile(models.gpt2(), backend="aot_eager")

    eager = fit(locater=LocAteR(WEIGHT, sigma="tokens", tokens=24))
    graphs = fit(compiled, LocAteR(WEIGHT, sigma="tokens", tokens=24))
    for one, other in zip(eager.gradients, graphs.gradients, strict=True):
        plain = {name.replace("_orig_mod.", ""): grad for name, grad in other.items()}
        for name, want in one.items():
            assert (plain[name.replace("_orig_mod.", "")] - want).norm() <= 1e-4 * want.norm().clamp_min(1e-6)


def test_the_target_form_holds_the_means_of_the_first_tokens(tmp_path):
    def job_and_callback(steps, checkpoint=None):
        L.seed_everything(3, verbose=False)
        job, locater = models.Job(lr=0.05), LocAteR(WEIGHT, sigma="tokens", form="target", nu=5.0)
        trainer = models.trainer([locater], max_steps=steps, default_root_dir=tmp_path, max_epochs=-1)
        trainer.fit(job, models.tokens(), ckpt_path=checkpoint)
        return locater, trainer

    first, trainer = job_and_callback(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert first._held.start
    assert all(mean.any() for mean in first._held.start.values())
    resumed, _ = job_and_callback(3, tmp_path / "one.ckpt")
    for name, mean in first._held.start.items():
        assert torch.equal(resumed._held.start[name], mean)


def test_inputs_that_are_not_seen_are_told_and_cost_no_training():
    class Packed(models.Job):
        """Calls forward itself, past all hooks."""

        def on_fit_start(self):
            for block in self.inner["network"].transformer.h:
                block.__class__ = _Direct

    class _Direct(type(models.gpt2().transformer.h[0])):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states + self.attn.forward(self.ln_1(hidden_states))[0]

    job = Packed()
    trainer = models.trainer([LocAteR(WEIGHT, sigma="tokens")], max_steps=2)
    with pytest.warns(UserWarning, match="what enters it is not known, since no forward of it was seen"):
        trainer.fit(job, models.tokens())
    assert trainer.global_step == 2
    assert trainer.callback_metrics["locater/penalty"].item() == 0


def test_a_token_that_is_not_finite_is_left_out():
    class Broken(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            def spoil(module, args, kwargs):
                hidden = (args[0] if args else kwargs["hidden_states"]).clone()
                hidden[0, 3] = torch.inf
                locater._inputs._inputs._hear(name, hidden.detach(), None)

            name = next(iter(locater._inputs.widths))
            layer = pl_module.get_submodule(name)
            self.handle = layer.register_forward_pre_hook(spoil, with_kwargs=True)

    locater = LocAteR(WEIGHT, sigma="tokens", tokens=64)
    recorder = Recorder(locater)
    models.trainer([locater, Broken(), recorder], max_steps=2).fit(models.Job(), models.tokens())
    assert all(grad.isfinite().all() for step in recorder.gradients for grad in step.values())


@pytest.mark.parametrize("copy", ["frozen", "averaged"])
def test_copies_that_do_not_train_are_left_out(copy):
    """A teacher or reference asks for no gradient; averaged weights may, but no optimizer has them."""

    class Distilled(models.Job):
        def __init__(self):
            super().__init__(still(models.gpt2()))
            self.copy = models.gpt2().requires_grad_(copy == "averaged")

        def configure_optimizers(self):
            return torch.optim.SGD(self.inner.parameters(), lr=0.01)

    locater, job = LocAteR("10%", sigma="tokens"), Distilled()
    recorder = Recorder(locater)
    models.trainer([locater, recorder], max_steps=1).fit(job, models.tokens())
    assert set(recorder.moments[0]) == {name for name in ProjectionReader(job) if "copy" not in name}
    assert not any("copy" in name for name in recorder.gradients[0])

    plain, job = LocAteR(WEIGHT), Distilled()
    want = locater_penalty(job.inner).item()
    assert locater_penalty(job).item() > 1.5 * want  # a term of a loss knows of no optimizer
    recorder = Recorder()
    models.trainer([plain, recorder], max_steps=1).fit(job, models.tokens())
    assert recorder.penalties == pytest.approx([want], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": "cov"}, "'identity' or 'tokens', got 'cov'"),
        ({"sigma": "tokens", "tokens": 1}, "tokens of at least 2"),
        ({"sigma": "tokens", "cross_attention": True}, "have no covariance"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocAteR(1.0, **arguments)


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_the_limit_forms_gradient_equals_that_of_a_loss_term(make):
    locater = LocAteR(WEIGHT, form="limit", limit=0.01, tokens=24)
    recorder = fit(make, locater, max_steps=1)
    given = {"form": "limit", "limit": 0.01, "inputs": recorder.inputs[0]}
    loss = fit(make, loss=lambda job: WEIGHT * locater_penalty(job, **given), max_steps=1)
    plain = fit(make, max_steps=1)
    for name, want in loss.gradients[0].items():
        got = recorder.gradients[0][name]
        assert (got - want).norm() <= 1e-5 * want.norm().clamp_min(1e-9), name
    assert any(not torch.allclose(loss.gradients[0][n], g) for n, g in plain.gradients[0].items())


def test_without_arguments_it_changes_nothing_while_logits_are_small():
    locater = LocAteR()
    assert (locater.form, locater.sigma, locater.weight, locater.limit) == ("limit", "tokens", 1.0, 8.0)
    callback, without = fit(models.llama, locater), fit(models.llama)
    assert callback.penalties[-1] == 0
    for one, other in zip(callback.gradients, without.gradients, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_options_of_the_limit_form():
    assert LocAteR(0.1).form == "variance"
    assert LocAteR(0.1).sigma == "identity"
    with pytest.raises(ValueError, match="expected a weight with form='variance', got none"):
        LocAteR(form="variance")
    with pytest.raises(ValueError, match="expected sigma='tokens' with form='limit'"):
        LocAteR(form="limit", sigma="identity")
    with pytest.raises(ValueError, match="expected a number for weight with form='limit'"):
        LocAteR("1%", form="limit")
    with pytest.raises(ValueError, match="expected a limit above 0, got 0"):
        LocAteR(limit=0)


def test_several_forwards_of_a_step_have_their_share_of_the_tokens():
    class Pairs(models.Job):
        """Embeds two texts with one network, as siamese encoders do."""

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + super().training_step(batch[:, :4], batch_idx)

    L.seed_everything(3, verbose=False)
    batch, length = next(iter(models.tokens())).shape
    locater = LocAteR(tokens=60)
    recorder = Recorder(locater)
    models.trainer([locater, recorder], max_steps=2).fit(Pairs(), models.tokens())
    for step in recorder.inputs:
        for tokens, weight in step.values():
            assert tokens.shape == (60, 32)
            # Of 60 rows half are of each forward; they stand for all tokens but first ones.
            torch.testing.assert_close(weight[:30].sum(), torch.tensor(batch * (length - 1.0)))
            torch.testing.assert_close(weight[30:].sum(), torch.tensor(batch * 3.0))


class _Turns(models.Job):
    """Two networks of one optimizer take turns; the first is replaced in between."""

    def __init__(self):
        super().__init__()
        self.inner["other"] = models.gpt2()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        name = "network" if self.steps % 2 else "other"
        return self.inner[name](input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def test_a_network_that_waits_for_its_turn_is_left_alone(recwarn):
    """No gradient of zero, by which AdamW would move it, and no word that it is never run."""
    ends = []
    for callbacks in ([], [LocAteR()]):
        L.seed_everything(3, verbose=False)
        job = _Turns()
        models.trainer(callbacks, max_steps=4).fit(job, models.tokens())
        ends.append(job.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not [one for one in recwarn if "has no penalty" in str(one.message)]


def test_a_step_without_any_known_layer_has_no_penalty_and_later_ones_have():
    """Merging adapters gives all layers other names."""

    class Merged(models.Job):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.inner["network"] = self.inner["network"].merge_and_unload()
                self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())
                self.requires_grad_(True)

    locater = LocAteR(WEIGHT, form="limit", limit=1e-3)
    recorder = Recorder(locater)
    models.trainer([locater, recorder], max_steps=4).fit(Merged(still(lora())), models.tokens())
    first, empty, *later = recorder.penalties
    assert empty == 0
    assert min(first, *later) > 0


def test_a_resumed_run_draws_the_tokens_of_one_that_was_not_stopped(tmp_path):
    def ended(steps, checkpoint=None, seed=3):
        L.seed_everything(seed, verbose=False)
        locater = LocAteR(form="limit", limit=1e-3, tokens=24)
        recorder = Recorder(locater)
        trainer = models.trainer(
            [locater, recorder], max_steps=steps, max_epochs=-1, default_root_dir=tmp_path
        )
        trainer.fit(models.Job(still(models.gpt2())), data, ckpt_path=checkpoint)
        return trainer, recorder.inputs

    # One batch again and again: Lightning begins with the first one of an epoch that was left.
    data = torch.utils.data.DataLoader([next(iter(models.tokens()))] * 8, batch_size=None)
    _, whole = ended(3)
    trainer, _ = ended(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = ended(3, tmp_path / "half.ckpt", seed=5)
    for name, (tokens, _) in whole[2].items():
        torch.testing.assert_close(resumed[0][name][0], tokens)
