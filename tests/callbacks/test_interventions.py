"""What holds for every callback that changes a training: resumes, second fits, copies, faults in mid-run."""

import copy
import inspect
import pickle
import warnings

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.nn.utils import parametrizations, prune

import lightning_qk
from lightning_qk import (
    LocAteR,
    QKClip,
    SigmaReparam,
    SpectrumScaling,
    UpdateCap,
)
from lightning_qk.callbacks._intervention import Intervention
from lightning_qk.logging.history import RunRecord

# As strong as makes a difference within a few steps; whatever is not named here is made without arguments.
ARGUMENTS = {
    "AttentionPrior": {"weight": 1.0, "prior": "window"},
    "EntropyBand": {"low": 0.5, "high": 0.6, "weight": 1.0},
    "LocAteR": {"weight": 0.3, "form": "target"},
    "QKClip": {"tau": 1.0},
    "UpdateCap": {"tau": 1e-4, "iterations": 1},
}
KINDS = {
    name: value
    for name in lightning_qk.__all__
    if inspect.isclass(value := getattr(lightning_qk, name)) and issubclass(value, Intervention)
}
EDITORS = {name: kind for name, kind in KINDS.items() if "when" in inspect.signature(kind).parameters}


def make(name, **more):
    return KINDS[name](**ARGUMENTS.get(name, {}), **more)


class Seeded(models.Job):
    """Random numbers of a step depend on the step alone."""

    def __init__(self, seed=0, model=None):
        torch.manual_seed(seed)
        super().__init__(models.gpt2() if model is None else model, lr=1e-2, optimizer="adamw")
        self.train()

    def training_step(self, batch, batch_idx):
        torch.manual_seed(1000 + self.global_step)
        return super().training_step(batch, batch_idx)


def data(count=64):
    return models.tokens(count)


def fit(callbacks, job=None, val=False, ckpt=None, **arguments):
    job = Seeded() if job is None else job
    trainer = models.trainer(callbacks, **{"num_sanity_val_steps": 0, **arguments})
    more = {} if ckpt is None else {"ckpt_path": ckpt, "weights_only": False}
    trainer.fit(job, data(), data(8) if val else None, **more)
    return trainer, job


def weights(job):
    return {name: value.clone() for name, value in job.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def account(callback):
    record = RunRecord()
    own = callback if isinstance(callback, LocAteR) else getattr(callback, "account", None)
    if own is not None:
        own.contribute(record)
    return record.scalars, record.events


def test_there_are_interventions():
    assert {"QKClip", "UpdateCap", "SigmaReparam", "LocAteR", "SoftCap", "SpectrumScaling"} <= KINDS.keys()
    assert set(EDITORS) == {"QKClip", "UpdateCap", "SigmaReparam"}
    for name in KINDS:
        callback = make(name)
        assert callback.begin.__func__ is not Intervention.begin


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_is_one_that_was_not_interrupted(name, tmp_path):
    whole = make(name)
    logged = {"log_every_n_steps": 3}
    _, want = fit([whole], max_steps=8, val=True, **logged)
    half, path = make(name), tmp_path / "half.ckpt"
    trainer, _ = fit([half], max_steps=4, val=True, **logged)
    trainer.save_checkpoint(path)
    resumed = make(name)
    _, got = fit([resumed], Seeded(seed=7), val=True, max_steps=8, ckpt=path, **logged)
    assert_same(weights(got), weights(want))
    assert account(resumed) == account(whole)


@pytest.mark.parametrize("name", KINDS)
def test_a_second_fit_is_that_of_a_new_callback(name):
    callback, fresh = make(name), make(name)
    fit([callback], Seeded(seed=1), max_steps=3, val=True)
    _, got = fit([callback], Seeded(seed=2), max_steps=3, val=True)
    _, want = fit([fresh], Seeded(seed=2), max_steps=3, val=True)
    assert_same(weights(got), weights(want))
    assert account(callback) == account(fresh)
    assert repr(callback.kept()) == repr(fresh.kept())


@pytest.mark.parametrize("name", KINDS)
def test_they_can_be_copied_and_pickled_after_a_fit(name):
    callback = make(name)
    pickle.loads(pickle.dumps(callback))
    fit([callback], max_steps=2, val=True)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert account(other) == account(callback)
        _, got = fit([other], max_steps=2, val=True)
        _, want = fit([make(name)], max_steps=2, val=True)
        assert_same(weights(got), weights(want))


class CopyInMidRun(L.Callback):
    def __init__(self, other):
        self.other = other
        self.copies = []

    def on_train_batch_end(self, *_):
        self.copies += [copy.deepcopy(self.other), pickle.loads(pickle.dumps(self.other))]


@pytest.mark.parametrize("name", KINDS)
def test_they_can_be_copied_while_they_work(name):
    callback = make(name)
    fit([callback, own := CopyInMidRun(callback)], max_steps=2)
    assert len(own.copies) == 4


def test_two_of_one_key_keep_their_own_accounts(tmp_path):
    """Lightning refuses two callbacks of one key that have a ``state_dict``."""

    def pair():
        return [UpdateCap(1e-4, modules="*"), UpdateCap(1e-5, modules="*")]

    trainer, _ = fit(first := pair(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    fit(second := pair(), max_steps=3, ckpt=tmp_path / "run.ckpt")
    assert account(first[0]) != account(first[1])
    assert [account(one) for one in second] == [account(one) for one in first]


def test_a_test_from_a_checkpoint_leaves_the_account(tmp_path):
    clip = QKClip(1.0)
    trainer, job = fit([clip], max_steps=2)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    trainer, job = fit([clip], max_steps=5)
    before = account(clip)
    trainer.validate(job, data(8), ckpt_path=tmp_path / "early.ckpt", weights_only=False, verbose=False)
    assert account(clip) == before


# Faults in mid-run


class At(L.Callback):
    """Does something to the job once, after some step."""

    def __init__(self, action, step=2, hook="on_train_batch_end"):
        self.action, self.step = action, step
        setattr(self, hook, self._run)

    def _run(self, trainer, pl_module, *_):
        if trainer.global_step >= self.step and self.action is not None:
            action, self.action = self.action, None
            action(pl_module)


def attention(job, index=0):
    return job.inner["network"].model.layers[index].self_attn


def pruned(job):
    prune.l1_unstructured(attention(job).q_proj, "weight", amount=0.3)


def weight_normed(job):
    parametrizations.weight_norm(attention(job).k_proj)


def replaced_projection(job):
    attention(job).q_proj = copy.deepcopy(attention(job).q_proj)


def replaced_attention(job):
    job.inner["network"].model.layers[0].self_attn = copy.deepcopy(attention(job))


def other_attention(job):
    class Identity(nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states, None

    for layer in job.inner["network"].model.layers:
        layer.self_attn = Identity()


def removed_layer(job):
    network = job.inner["network"].model
    network.layers = network.layers[:1]


def frozen(job):
    attention(job).requires_grad_(False)


def reshaped(job):
    own = attention(job).q_proj
    own.weight = nn.Parameter(own.weight.detach()[:8].clone())
    own.bias = None
    own.register_forward_hook(lambda module, args, output: output.repeat_interleave(4, -1))


def adapter_merged(job):
    """A composition that was not there at the start."""
    own = attention(job).q_proj
    attention(job).q_proj = nn.Sequential(own, nn.Linear(own.out_features, own.out_features))


def broken_weights(job):
    with torch.no_grad():
        attention(job).q_proj.weight.fill_(torch.nan)


FAULTS = [
    pruned,
    weight_normed,
    replaced_projection,
    replaced_attention,
    other_attention,
    removed_layer,
    frozen,
    reshaped,
    adapter_merged,
    broken_weights,
]


class LlamaJob(Seeded):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(model=models.llama())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", KINDS)
def test_nothing_that_happens_in_mid_run_ends_it(name, fault):
    if fault is pruned and name == "SigmaReparam":
        pytest.skip("torch's pruning refuses a parametrized weight itself")
    job = LlamaJob()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, _ = fit(
            [make(name), At(fault)], job, max_steps=5, val=True, val_check_interval=1, limit_val_batches=1
        )
    assert trainer.global_step == 5


class Raises:
    """Fails from its third call on, as whatever a callback uses may."""

    def __init__(self, original):
        self.original, self.calls = original, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("injected")
        return self.original(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("QKClip", "lightning_qk.callbacks.qk_clip.apply_clip"),
        ("QKClip", "lightning_qk.callbacks.qk_clip.call_max_logits"),
        ("UpdateCap", "lightning_qk.interventions.update_cap.subspace_iteration"),
        ("LocAteR", "lightning_qk.regularizers.locater.penalties_and_gradients"),
        ("EntropyBand", "lightning_qk.interventions.auxiliary.attention_arguments"),
        ("SoftCap", "lightning_qk.interventions.soft_cap.soft_capped_attention"),
        ("DifferentiableAttentionMask", "lightning_qk.interventions.attention_mask.gated_attention"),
        ("SpectrumScaling", "lightning_qk.interventions.spectrum_scaling._eta"),
    ],
)
def test_an_error_of_its_own_does_not_end_the_run_and_is_told_once(name, where, monkeypatch):
    module, _, attribute = where.rpartition(".")
    original = getattr(__import__(module, fromlist=["_"]), attribute)
    monkeypatch.setattr(where, Raises(original))
    with pytest.warns(UserWarning, match="injected") as caught:
        trainer, _ = fit([make(name, modules="*.0.*")], max_steps=5, val=True, val_check_interval=1)
    assert trainer.global_step == 5
    assert len([one for one in caught if "injected" in str(one.message)]) == 1


class BrokenLogger(Logger):
    name = version = "broken"

    def log_metrics(self, metrics, step=None):
        if any(
            key.startswith(("clip/", "update_cap/", "sigma_reparam/", "spectrum_scaling/")) for key in metrics
        ):
            raise OSError("no space left")

    def log_hyperparams(self, *_, **__):
        pass


@pytest.mark.parametrize("name", ["QKClip", "UpdateCap", "SigmaReparam", "SpectrumScaling"])
def test_a_logger_that_raises_does_not_change_the_training(name):
    _, want = fit([make(name)], max_steps=4, val=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, got = fit(
            [make(name, **({"per_layer": True} if name == "QKClip" else {}))],
            max_steps=4,
            val=True,
            logger=BrokenLogger(),
        )
    assert_same(weights(got), weights(want))


def test_a_layer_whose_weights_change_form_is_left_alone_and_the_other_is_not():
    clip = QKClip(0.05)
    with pytest.warns(UserWarning, match="is not clipped any more") as caught:
        fit([clip, At(pruned)], job := LlamaJob(), max_steps=6)
    said = [str(one.message) for one in caught if "any more" in str(one.message)]
    assert len(said) == 1
    assert "model.layers.0.self_attn" in said[0]
    assert "something makes from others" in said[0]
    assert list(clip.left) == ["inner.network.model.layers.0.self_attn"]
    assert list(clip.gammas) == ["inner.network.model.layers.1.self_attn"]
    assert clip.gammas["inner.network.model.layers.1.self_attn"].max() < 1
    assert prune.is_pruned(attention(job))


# Frozen layers


class Unfreeze(BaseFinetuning):
    """The network's first layer trains from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(attention(pl_module))

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(attention(pl_module), optimizer, lr=1e-2)


def two_epochs(callbacks):
    job = LlamaJob()
    models.trainer(callbacks, max_steps=-1, max_epochs=2).fit(job, models.tokens(8))
    return job


class Late(LlamaJob):
    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=1e-2)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", EDITORS)
def test_frozen_layers_are_refused_at_the_start_with_the_way_out(name, order):
    job = LlamaJob()
    attention(job).requires_grad_(False)
    before = weights(job)
    with pytest.raises(
        ValueError, match=r"frozen ones in inner\.network\.model\.layers\.0.*when='unfrozen'.*modules="
    ):
        fit([make(name)], job)
    assert_same(weights(job), before)
    fit([make(name, modules="*layers.1*")], LlamaJob(), max_steps=1)


class Watch(L.Callback):
    """The weights of the first layer's queries after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(attention(pl_module).q_proj.weight.detach().clone())


@pytest.mark.parametrize("name", EDITORS)
def test_layers_that_are_unfrozen_later_are_waited_for(name):
    if name == "SigmaReparam":
        callbacks = [SigmaReparam(when="unfrozen")]
    else:
        callbacks = [make(name, when="unfrozen")]
    job, watch = Late(), Watch()
    start = attention(job).q_proj.weight.detach().clone()
    models.trainer([*callbacks, Unfreeze(), watch], max_steps=-1, max_epochs=2).fit(job, models.tokens(8))
    first, second = watch.seen[:2], watch.seen[2:]
    for seen in first:
        torch.testing.assert_close(seen, start, rtol=1e-6, atol=1e-6)
    assert not torch.equal(second[-1], start)
    if name == "UpdateCap":
        change = torch.linalg.matrix_norm(second[0] - start, 2) / torch.linalg.matrix_norm(start, 2)
        assert change < 1.1e-4
    if name == "QKClip":
        assert callbacks[0].gammas["inner.network.model.layers.0.self_attn"].min() < 1
        # What it did in the first epoch it did to the other layer.
        assert ("layer_00" in callbacks[0].account.events[-1][1]) != (
            "layer_00" in callbacks[0].account.events[0][1]
        )


def test_when_is_checked():
    for kind in EDITORS.values():
        with pytest.raises(ValueError, match="'always' or 'unfrozen', got 'never'"):
            kind(when="never")


# What is refused at the start, or has no value


def test_logits_that_cannot_be_told_are_refused_at_the_start():
    """Swin takes its softmax itself, of logits with a bias of relative positions."""
    import transformers

    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1], num_heads=[2], window_size=4, num_labels=3
    )

    class Images(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = transformers.SwinForImageClassification(config)

        def training_step(self, batch, batch_idx):
            raise AssertionError("work was begun")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        ValueError, match=r"got network.*attention.*leave such a layer out with QKClip\(modules=…\)"
    ):
        models.trainer([QKClip()]).fit(Images(), models.tokens())


class Padding(models.Job):
    """Nothing but padding at some steps."""

    def training_step(self, batch, batch_idx):
        mask = torch.ones_like(batch) if batch_idx % 2 else torch.zeros_like(batch)
        return self.inner["network"](input_ids=batch, attention_mask=mask, labels=batch).loss


def test_a_step_without_logits_logs_none():
    class Finite(L.Callback):
        def __init__(self):
            self.keys = []

        def on_train_batch_end(self, trainer, *_):
            found = {key: float(value) for key, value in trainer.logged_metrics.items() if "clip/" in key}
            found |= {key: float(value) for key, value in trainer.callback_metrics.items() if "clip/" in key}
            assert all(torch.tensor(list(found.values())).isfinite())
            self.keys.append(found)

    clip, finite = QKClip(1.0, per_layer=True, per_head=True), Finite()
    models.trainer([clip, finite], max_steps=3).fit(Padding(models.bert()), models.tokens())
    assert "clip/max_logit/max" not in finite.keys[0]
    assert "clip/max_logit/max" in finite.keys[1]
    steps, values = account(clip)[0]["clip/max_logit/max"]
    assert steps == [1]
    assert values[0] > 0


def test_locater_leaves_frozen_copies_out_of_its_value():
    class Taught(Seeded):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.inner["network"]).requires_grad_(False)
            with torch.no_grad():
                for parameter in self.teacher.parameters():
                    parameter.mul_(3)

    alone, _ = fit([LocAteR(0.0)], max_steps=1)
    taught, _ = fit([LocAteR(0.0)], Taught(), max_steps=1)
    assert taught.callback_metrics["locater/penalty"] == alone.callback_metrics["locater/penalty"]


def test_locater_blames_no_pattern_that_nobody_gave():
    class Crossing(models.Job):
        def __init__(self):
            super().__init__(nn.ModuleDict({"cross_attn": models.gpt2().transformer.h[0].attn}))
            self.inner["network"]["cross_attn"].is_cross_attention = True

    with pytest.raises(ValueError, match="got inner.network.cross_attn") as caught:
        models.trainer([LocAteR(1.0)]).fit(Crossing(), models.tokens())
    assert "modules=None" not in str(caught.value)


def test_a_layer_that_is_read_wrongly_is_refused(monkeypatch):
    name = "inner.network.transformer.h.1.attn"
    for module in ("qk_clip", "update_cap", "sigma_reparam", "locater", "spectrum_scaling"):
        monkeypatch.setattr(
            f"lightning_qk.callbacks.{module}.misread_layers",
            lambda *_: {name: "whose queries are not W x + b"},
        )
    for kind in (QKClip, UpdateCap, SigmaReparam, SpectrumScaling, lambda: LocAteR(1.0)):
        with pytest.raises(ValueError, match=rf"got {name}, whose queries are not W x \+ b.*modules="):
            fit([kind()], max_steps=1)


def test_a_layer_can_be_given_up_in_mid_run():
    name = "inner.network.transformer.h.1.attn"
    for callback in (QKClip(1.0), UpdateCap(1e-4), LocAteR(1.0)):
        with pytest.warns(UserWarning, match=rf"{name}.*any more: it is read wrongly"):
            fit(
                [callback, At(lambda _, own=callback: own.leave_alone({name: "it is read wrongly"}))],
                max_steps=5,
            )
